"""The process-wide precision flag: who may set it, when, and what it may not do to others."""

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cpu_calls import (
    calm,  # noqa: F401 - a fixture
    exact_plan,
    tensors,
)

from vidsparse.kernels.cpu import call as cpu_call
from vidsparse.kernels.cpu import engine, machine, routes, store
from vidsparse.kernels.cpu import probe as cpu_probe

FLAG = torch.backends.mkldnn.matmul
GOOD = {"onednn_gain": 1.8, "onednn_error": 1e-7, "onednn_loss": 1.1, "bf16_gain": 2.0}


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which nothing has been measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(routes, "_probed", None)
    monkeypatch.setattr(store, "_records", {})


@contextmanager
def others_multiply() -> Iterator[Callable[[], set[str]]]:
    """A thread that multiplies all the time; yields what flags it has seen, and checks it at the
    end: every product is that of the thread alone."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(192, 192, generator=generator) for _ in range(2))
    alone, scale = a @ b, float((a @ b).abs().max())
    stop, worst, flags = threading.Event(), [0.0], set[str]()

    def work() -> None:
        while not stop.is_set():
            flags.add(FLAG.fp32_precision)
            worst.append(float((a @ b - alone).abs().max()) / scale)
            time.sleep(1e-3)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield lambda: flags
    finally:
        stop.set()
        thread.join()
    assert len(worst) > 10 and max(worst) <= 1e-6


@pytest.mark.slow
def test_probing_leaves_other_threads_alone(
    unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real child process measures; the flag of this one is never touched."""
    monkeypatch.setattr(machine, "flags", lambda: frozenset({"avx512f"}))
    before = FLAG.fp32_precision
    with others_multiply() as flags:
        found = routes.probe()
    assert flags() == {before}
    assert found.onednn_gain > 0 and 0 < found.onednn_error < 1e-2 and found.reason is None


def test_running_leaves_other_threads_alone(unmeasured: None) -> None:
    """Whatever route this machine has, products beside the engine's are exact."""
    plan = exact_plan()
    q, k, v = tensors(plan, 64)
    with others_multiply():
        for _ in range(5):
            engine.execute(q, k, v, plan, workers=2)


@pytest.mark.parametrize("flag", ["amx_bf16", "amx_tile", "amx_int8"])
def test_never_on_a_cpu_with_amx(
    unmeasured: None, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setattr(machine, "flags", lambda: frozenset({"avx512f", "avx512_bf16", flag}))
    monkeypatch.setattr(cpu_probe, "in_child", lambda: pytest.fail("a child was started"))
    plan = exact_plan()
    q, k, v = tensors(plan, 64)
    before, seen, run = FLAG.fp32_precision, set(), engine.Worker.run

    def spy(worker: engine.Worker, job: cpu_call.Job) -> None:
        seen.add(FLAG.fp32_precision)
        run(worker, job)

    monkeypatch.setattr(engine.Worker, "run", spy)
    engine.execute(q, k, v, plan)
    assert seen == {before}
    info = engine.engine_info()
    assert info["fp32"] == "native" and "AMX" in info["refusal"]


def no_program(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys, "executable", "/nowhere/python3")


def not_python(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys, "executable", "/usr/bin/uwsgi")


def frozen(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys, "frozen", True, raising=False)


def forbidden(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    patch.setattr(subprocess, "run", refuse)


def silent(patch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, timeout: float, **__: object) -> None:
        raise subprocess.TimeoutExpired("python", timeout)

    patch.setattr(subprocess, "run", hang)


def killed(patch: pytest.MonkeyPatch) -> None:
    ended = subprocess.CompletedProcess([], -9, "noise\n", "")
    patch.setattr(subprocess, "run", lambda *_, **__: ended)


@pytest.mark.parametrize(
    ("hinder", "words"),
    [
        (no_program, "could be started"),
        (not_python, "uwsgi is not Python"),
        (frozen, "is not Python itself"),
        (forbidden, "not permitted"),
        (silent, "no answer in 120 s"),
        (killed, "ended with -9"),
    ],
)
def test_without_a_child_products_are_native(
    unmeasured: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    hinder: Callable[[pytest.MonkeyPatch], None],
    words: str,
) -> None:
    """With the reason, and without keeping it: the next process may be luckier."""
    monkeypatch.setattr(machine, "flags", lambda: frozenset({"avx512f"}))
    with monkeypatch.context() as patch:
        hinder(patch)
        found = routes.probe()
    assert not found.onednn and words in str(found.refusal)
    assert found.bf16_gain > 0
    assert not list(tmp_path.rglob("*.json"))


def test_what_the_child_measured_is_kept(unmeasured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "flags", lambda: frozenset({"avx512f"}))
    started = []
    monkeypatch.setattr(cpu_probe, "in_child", lambda: started.append(1) or dict(GOOD))
    assert routes.probe().onednn
    routes.forget()
    store.forget()  # as a new process
    assert routes.probe().onednn and len(started) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"onednn_error": 3e-3}, "error 3.0e-03"),
        ({"onednn_loss": 900.0}, "factor of 900"),
        ({"onednn_gain": 1.0}, "1.00x as fast"),
        ({"onednn_error": routes.MAX_ERROR, "onednn_gain": routes.MIN_GAIN}, None),
    ],
)
def test_only_exact_and_faster_routes(change: dict[str, float], words: str | None) -> None:
    probe = routes.Probe(**{**GOOD, **change})
    assert probe.onednn == (words is None)
    assert probe.refusal is None if words is None else words in str(probe.refusal)


def test_a_flag_that_rounds_is_found_out() -> None:
    """Products that are rounded to bf16 while the flag is set, as with AMX, lose a lot."""

    class Rounding:
        fp32_precision = "none"

    flags, mm = Rounding(), torch.mm

    def rounding(a: torch.Tensor, b: torch.Tensor, **out: torch.Tensor) -> torch.Tensor:
        if flags.fp32_precision == "bf16" and a.dtype == torch.float32:
            a, b = a.bfloat16().float(), b.bfloat16().float()
        return mm(a, b, **out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", rounding)
        found = cpu_probe.measure(flags)
    probe = routes.Probe(**{**found, "onednn_gain": 2.0})
    assert found["onednn_error"] > 1e-4 and found["onednn_loss"] > 100 and not probe.onednn


def global_state() -> tuple[object, ...]:
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    flag = torch.backends.mkldnn.matmul.fp32_precision
    return torch.get_num_threads(), fresh[0], flag, torch.get_rng_state().tolist()


def test_global_state_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thread counts, oneDNN flag and random state are the caller's again, also with a new pool."""
    monkeypatch.setattr(routes, "_probed", None)
    plan = exact_plan()
    q, k, v = tensors(plan, 64)
    torch.set_num_threads(2)
    before = global_state()
    for workers in (3, 2):
        engine.execute(q, k, v, plan, workers=workers)
        assert global_state() == before


def test_overlapping_calls_restore_the_flag() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    first, second = routes.onednn(True), routes.onednn(True)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    second.__exit__(None, None, None)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_native_never_touches_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    run = engine.Worker.run

    def spy(worker: engine.Worker, job: cpu_call.Job) -> None:
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        run(worker, job)

    plan = exact_plan()
    q, k, v = tensors(plan, 64)
    monkeypatch.setattr(routes, "_probed", routes.Probe(2.0, 1e-7, 2.0))
    monkeypatch.setattr(engine.Worker, "run", spy)
    before = torch.backends.mkldnn.matmul.fp32_precision
    engine.execute(q, k, v, plan, route=routes.Route())
    assert set(seen) == {before}
    engine.execute(q, k, v, plan)
    assert set(seen) == {before, "bf16"}


def test_calls_of_many_threads_restore_the_flag() -> None:
    before = FLAG.fp32_precision
    inside = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(200):
            with routes.onednn(chance.random() < 0.7) as _:
                time.sleep(chance.random() * 1e-4)
                inside.append(routes._users == 0 or FLAG.fp32_precision == "bf16")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert FLAG.fp32_precision == before and routes._users == 0
    assert sum(inside) >= 0.99 * len(inside)  # between both looks another thread may leave


def test_a_setting_of_all_backends_stays_in_charge() -> None:
    """The flag that only followed `torch.backends.fp32_precision` follows it again."""
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        with routes.onednn(True):
            assert FLAG.fp32_precision == "bf16"
        assert FLAG.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert FLAG.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before
    assert FLAG.fp32_precision == before


@pytest.mark.parametrize("value", ["ieee", "tf32"])
def test_what_the_user_sets_stays(value: str) -> None:
    """Before a call, and also during it."""
    before = FLAG.fp32_precision
    try:
        FLAG.fp32_precision = value
        with routes.onednn(True):
            pass
        assert FLAG.fp32_precision == value
        FLAG.fp32_precision = before
        with routes.onednn(True):
            FLAG.fp32_precision = value
        assert FLAG.fp32_precision == value
    finally:
        FLAG.fp32_precision = before
