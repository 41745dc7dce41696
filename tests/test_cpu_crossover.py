"""When a call on a CPU goes dense: against processors whose times are known by arithmetic."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from vidsparse import SparseConfig, TokenGrid, attention, registry, sparse_attention
from vidsparse.attention import attend, decision_for
from vidsparse.kernels.cpu import contest, engine, executor, store
from vidsparse.kernels.cpu import crossover as cpu_crossover
from vidsparse.kernels.cpu.crossover import DENSITIES, LENGTHS, MARGIN

GRIDS = {n: TokenGrid(n // 256, 16, 16) for n in (1024, 1536, 2048, 3072, 4096, 8192, 16384)}


@dataclass(frozen=True)
class Processor:
    """Seconds of attention: dense a N^2, sparse fixed + heads (b N + c N^2 (d + centroids))."""

    dense_pair: float
    fixed: float
    token: float
    sparse_pair: float

    def dense(self, tokens: int, heads: int) -> float:
        return heads * self.dense_pair * tokens**2

    def sparse(self, tokens: int, heads: int, density: float) -> float:
        pairs = tokens**2 * (density + 1 / 64)
        return self.fixed + heads * (self.token * tokens + self.sparse_pair * pairs)

    def measure(self, kind: cpu_crossover.Kind, length: int, _: object) -> dict[str, float]:
        low, high = (self.sparse(length, kind.heads, d) for d in DENSITIES)
        dense = self.dense(length, kind.heads)
        return {"dense": dense, "sparse_low": low, "sparse_high": high, "noise": 0.0}


PROCESSORS = {
    "avx512": Processor(3.1e-9, 1e-3, 4e-7, 2.2e-9),
    "avx2": Processor(5.5e-9, 1.5e-3, 2e-6, 8e-9),
    "amx-bf16": Processor(0.8e-9, 1.5e-3, 1.2e-6, 2.4e-9),
    "sparse-never": Processor(0.3e-9, 2e-3, 3e-6, 6e-9),
}


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(store, "_records", {})
    monkeypatch.setattr(cpu_crossover, "_known", {})
    slower = {"ms": 2.0, "products": 1.0, "error": 1e-6}
    held = {f"{name}_{block}": x for name, x in slower.items() for block in contest.BLOCKS}
    monkeypatch.setattr(contest, "_known", {})
    monkeypatch.setattr(contest, "measure", lambda *_: held)


@cache
def config(density: float, **kernel: object) -> SparseConfig:
    schedule = {"name": "constant", "density": density}
    return SparseConfig.from_dict({"schedule": schedule, "kernel": kernel})


def decide(tokens: int, heads: int, density: float, dtype: torch.dtype = torch.float32):
    q = torch.empty(1, tokens, heads, 64, dtype=dtype)
    return decision_for(q, grid=GRIDS[tokens], config=config(density))


@pytest.mark.parametrize("name", PROCESSORS)
def test_dense_exactly_where_dense_is_faster(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Over lengths, densities and heads: never slower than dense, no real gain left out."""
    processor = PROCESSORS[name]
    monkeypatch.setattr(cpu_crossover, "measure", processor.measure)
    decided = set()
    for tokens in GRIDS:
        for heads in (1, 2, 12, 40):
            for density in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.99):
                ratio = processor.dense(tokens, heads) / processor.sparse(tokens, heads, density)
                reason = decide(tokens, heads, density).reason
                decided.add(reason)
                assert reason in (None, "not-faster")
                most = 1.25 if tokens <= 4096 else 1.4  # longer ones follow shorter ones
                assert ratio >= 1 if reason is None else ratio < most, (tokens, heads, density)
    assert decided == ({"not-faster"} if name == "sparse-never" else {None, "not-faster"})


def test_short_calls_are_timed_with_more_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the call has, four at most at 1,024 tokens: what a call costs beside its heads
    would else be taken for a cost of each. One a thread where there are more threads."""
    asked = counted(monkeypatch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for heads in (1, 3, 4, 40):
        decide(1024, heads, 0.3)
    assert [(kind.heads, n) for kind, n in asked] == [(1, 1024), (3, 1024), (4, 1024)]
    decide(2048, 40, 0.3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    decide(1024, 40, 0.3)
    assert [(kind.heads, n) for kind, n in asked[3:]] == [(2, 2048), (8, 1024)]


def test_between_two_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,024 * sqrt(2) tokens lie half way between 1,024 and 2,048. Three rounds of 8,192 tokens
    take 1,400 s and can be afforded, of 16,384 tokens 5,600 s."""
    at = {1024: 0.2, 2048: 0.6, 4096: 0.5, 8192: 0.4, 16384: 0.3}

    def measure(kind: object, length: int, _: object) -> dict[str, float]:
        goal, scale = 10 * (1 - MARGIN), (length / 2048) ** 2
        low, high = goal - (at[length] - 0.2), goal + (0.6 - at[length])
        found = {"dense": 10.0, "sparse_low": low, "sparse_high": high}
        return {**{name: scale * seconds for name, seconds in found.items()}, "noise": 0.0}

    monkeypatch.setattr(cpu_crossover, "measure", measure)
    kind = cpu_crossover.kind(torch.float32, 64, 1, "")
    monkeypatch.setattr(cpu_crossover, "AFFORDABLE", 2000.0)
    for tokens, want in ((1024, 0.2), (1448, 0.4), (2048, 0.6), (3000, 0.545), (99999, 0.4)):
        found = cpu_crossover.density(kind, tokens, lambda *_: None)
        assert found == pytest.approx(want, abs=1e-3), tokens


def test_what_short_calls_cost_beside_their_pairs_hides_no_gain_of_longer_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Times of the demo's calls on two threads of an Intel Xeon with AMX, where sparse calls of
    2,048 and 4,096 tokens gain nothing at density 0.2, and calls of 8,192 tokens 1.7x."""
    seconds = {2048: (0.0082, 0.0160, 0.0200), 4096: (0.0304, 0.0269, 0.0425),
               8192: (0.1188, 0.0747, 0.1502)}  # fmt: skip

    def measure(kind: object, length: int, _: object) -> dict[str, float]:
        return dict(zip(cpu_crossover.FIGURES, (*seconds[length], 0.02), strict=True))

    monkeypatch.setattr(cpu_crossover, "measure", measure)
    kind = cpu_crossover.kind(torch.float32, 64, 2, "")
    found = [cpu_crossover.density(kind, n, lambda *_: None) for n in (2048, 4096, 6336, 8192)]
    assert found == sorted(found) and found[0] == 0
    assert found[1] < 0.25 < 0.3 < found[2] < found[3] < 0.4


@pytest.mark.parametrize("selector", ["topk", "topp"])
def test_calls_go_dense_with_the_reason(monkeypatch: pytest.MonkeyPatch, selector: str) -> None:
    """Bit for bit as dense; what is asked for by name, or pinned by number, stays sparse."""
    monkeypatch.setattr(cpu_crossover, "measure", PROCESSORS["sparse-never"].measure)
    q, k, v = (torch.randn(1, 1024, 2, 16) for _ in range(3))
    method = config(0.2).override(f"selector.name={selector}")
    grid = GRIDS[1024]
    found = attend(q, k, v, grid=grid, config=method)
    inner = (x.transpose(1, 2) for x in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(*inner).transpose(1, 2)
    assert found.reason == "not-faster" and torch.equal(found.out, dense)
    assert attend(q, k, v, grid=grid, config=method, impl="cpu").reason is None
    assert attend(q, k, v, grid=grid, config=method.override("kernel.impl=cpu")).reason is None
    assert attend(q, k, v, grid=grid, config=method.override("kernel.crossover=1")).reason is None


@pytest.mark.parametrize(("crossover", "reason"), [(0.3, None), (0.29, "not-faster")])
def test_a_pinned_crossover(crossover: float, reason: str | None) -> None:
    """The density itself is still sparse; nothing is measured."""
    q = torch.empty(1, 2048, 2, 64)
    found = decision_for(q, grid=GRIDS[2048], config=config(0.3, crossover=crossover))
    assert found.reason == reason
    assert not cpu_crossover._known


@pytest.mark.parametrize("value", [0, -1, 1.5, "never"])
def test_refused_crossovers(value: object) -> None:
    with pytest.raises(ValueError, match=r"kernel.crossover.*\(0, 1\], or auto"):
        config(0.3, crossover=value)


def test_forced_blocks_on_top_of_the_budget_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of density .2 and the same frame on top is as dense as it is, .2 and .25 at least."""
    method = config(0.2, crossover=0.25).override("force.same_frame=true", "force.in_budget=false")
    q = torch.randn(1, 1024, 2, 16)
    assert attend(q, q, q, grid=GRIDS[1024], config=method).reason == "not-faster"
    sparse = attend(q, q, q, grid=GRIDS[1024], config=method.override("kernel.crossover=0.9"))
    assert sparse.reason is None and min(sparse.density) > 0.25


def test_short_calls_follow_min_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever lowers it wants them sparse; nothing is measured."""
    monkeypatch.setattr(cpu_crossover, "measure", PROCESSORS["sparse-never"].measure)
    grid, q = TokenGrid(4, 16, 15), torch.empty(1, 960, 2, 64)
    assert decision_for(q, grid=grid, config=config(0.3)).reason == "too-short"
    short = config(0.3).override("schedule.min_tokens=0")
    assert decision_for(q, grid=grid, config=short).reason is None
    dense = short.override(f"schedule.density={executor.CROSSOVER_DENSITY + 0.01}")
    assert decision_for(q, grid=grid, config=dense).reason == "not-faster"
    assert not cpu_crossover._known


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[cpu_crossover.Kind, int]]:
    """What is measured, on a fast processor."""
    asked: list[tuple[cpu_crossover.Kind, int]] = []

    def measure(kind: cpu_crossover.Kind, length: int, trial: object) -> dict[str, float]:
        asked.append((kind, length))
        return PROCESSORS["avx512"].measure(kind, length, trial)

    monkeypatch.setattr(cpu_crossover, "measure", measure)
    return asked


def test_one_measurement_decides_for_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for the next process, which finds other times."""
    asked = counted(monkeypatch)
    assert [decide(8192, 12, 0.3).reason for _ in range(3)] == [None] * 3
    assert len(asked) == len(set(asked)) and 2 <= len(asked) <= 3
    store.forget()
    monkeypatch.setattr(cpu_crossover, "_known", {})
    monkeypatch.setattr(cpu_crossover, "measure", PROCESSORS["sparse-never"].measure)
    assert decide(8192, 12, 0.3).reason is None


def test_what_a_busy_machine_gave_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same answer in one process, so that a seed gives one video; the next one asks anew."""
    noise, made = [0.29], []
    times = PROCESSORS["avx512"].measure(cpu_crossover.Kind("float32", 64, 4, 1, ""), 2048, None)

    def figures(*args: object) -> dict[str, float]:
        made.append(args)
        return {**times, "noise": noise[0]}

    monkeypatch.setattr(cpu_crossover, "_figures", figures)
    monkeypatch.setattr(engine, "execute", lambda q, k, v, plan, **how: (q, None))
    busy = [decide(2048, 12, 0.9).reason for _ in range(2)]
    assert busy == ["not-faster"] * 2 and len(made) == 1
    assert not list(tmp_path.rglob("cpu-crossover-*.json"))
    noise[0] = 0.0
    assert decide(2048, 12, 0.9).reason == "not-faster" and len(made) == 1
    for _ in range(2):
        store.forget()
        cpu_crossover.forget()
        assert decide(2048, 12, 0.9).reason is None
    assert len(made) == 2 and list(tmp_path.rglob("cpu-crossover-*.json"))


@pytest.mark.parametrize(
    "change",
    [
        lambda: decide(2048, 12, 0.3, torch.bfloat16),
        lambda: decide(1024, 12, 0.3),
        lambda: torch.set_num_threads(1) or decide(2048, 12, 0.3),
        lambda: decision_for(torch.empty(1, 2048, 12, 128), grid=GRIDS[2048], config=config(0.3)),
        lambda: decision_for(
            torch.empty(1, 2048, 12, 64),
            grid=GRIDS[2048],
            config=config(0.3).override("compensation.name=taylor"),
        ),
    ],
    ids=["dtype", "length", "threads", "head dim", "method"],
)
def test_calls_of_another_kind_are_measured(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]
) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        asked = counted(monkeypatch)
        decide(2048, 12, 0.3)
        change()
        assert len(asked) == len(set(asked)) == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("settings", "fresh"), [
    (["layout.name=content", "layout.refresh=4"], [True, False, False, True]),
    (["layout.name=content", "layout.refresh=1"], [True, True, True]),
    (["layout.name=tile"], [True, True, True]),
])  # fmt: skip
def test_orders_of_heads_are_made_in_one_act_of_a_round_alone(
    monkeypatch: pytest.MonkeyPatch, settings: list[str], fresh: list[bool]
) -> None:
    """Every call is of one kind, so that what differs between rounds is noise alone; a call that
    takes over orders makes none."""
    made, seen = [], []
    layout = registry.method("layout", "content")
    monkeypatch.setattr(layout, "head_orders", noting(made, layout.head_orders))
    attend_ = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *qkv, **how: (
        seen.append(len(made)), attend_(*qkv, **how)))  # fmt: skip
    base = SparseConfig.load("tiles", ["schedule.name=constant", *settings])
    asked = executor.Form(
        base, GRIDS[1024], torch.device("cpu"), torch.float32, 16, 2,
        trial=attention.trial_of(base, False),
    )  # fmt: skip
    executor.EXECUTOR.crossover(asked)
    seen.append(len(made))
    rounds = [after > before for before, after in pairwise(seen)][1:]
    want = [one and base.orders_last > 0 for one in fresh[1:]]
    assert len(rounds) % len(want) == 0 and len(rounds) >= 3 * len(want)
    assert rounds == want * (len(rounds) // len(want))


def noting(made: list[object], act: Callable[..., object]) -> Callable[..., object]:
    """The act, and a note of each of its calls."""
    return lambda *given: (made.append(given), act(*given))[1]


def test_what_changes_no_time_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of 64 queries, which "auto" is at this length, the kernel's form, the density."""
    asked, q = counted(monkeypatch), torch.empty(1, 2048, 12, 64)
    decide(2048, 12, 0.3)
    for same in (config(0.4), config(0.3, block_q=64), config(0.3, form="pointer")):
        decision_for(q, grid=GRIDS[2048], config=same)
    assert len(asked) == 1
    decision_for(q, grid=GRIDS[2048], config=config(0.3, block_q=128))
    assert len(asked) == 2


def test_the_measurement_sees_none_of_the_callers_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast, a default device, grad mode; and the random state stays."""
    monkeypatch.setattr(cpu_crossover, "LENGTHS", (1024,))
    seen = []

    def trial(q: torch.Tensor, *_: torch.Tensor, **how: object) -> None:
        seen.append((q.dtype, q.device.type, torch.is_autocast_enabled("cpu")))
        seen.append(threading.current_thread() is threading.main_thread())

    kind = cpu_crossover.kind(torch.float32, 16, 2, "")
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        times = cpu_crossover.times(kind, 1024, trial)
    assert set(seen) == {(torch.float32, "cpu", False), False}
    assert torch.equal(torch.get_rng_state(), state)
    assert times.dense > 0 and min(times.sparse) > 0 and times.noise >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["tiles", "topp", "pyramid", "pisa"])
def test_every_method_can_be_timed(method: str, dtype: torch.dtype) -> None:
    """For real, on this machine; then the call itself is right, whatever was decided."""
    q, k, v = (torch.randn(1, 1024, 2, 16).to(dtype) for _ in range(3))
    loaded = SparseConfig.load(method, ["schedule.name=constant"])
    out = sparse_attention(q, k, v, grid=GRIDS[1024], config=loaded)
    assert out.isfinite().all()
    ((kind, length),) = cpu_crossover._known
    assert (kind.head_dim, length) == (16, LENGTHS[0])
