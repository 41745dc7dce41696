"""What doctor says about the CPU is what the engine does."""

import json
from pathlib import Path

import pytest
import torch
from test_cpu_crossover import PROCESSORS

from vidsparse import doctor
from vidsparse.kernels.cpu import contest, crossover, routes, store
from vidsparse.kernels.cpu.executor import EXECUTOR as executor
from vidsparse.kernels.cpu.routes import Probe


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A processor whose times are known, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(store, "_records", {})
    monkeypatch.setattr(crossover, "_known", {})
    monkeypatch.setattr(routes, "_probed", Probe(0.0, 0.0, 2.0))
    monkeypatch.setattr(contest, "_known", {})
    monkeypatch.setattr(contest, "measure", lambda *_: figures(0.9))
    monkeypatch.setattr(crossover, "measure", PROCESSORS["amx-bf16"].measure)


def figures(gain: float) -> store.Figures:
    """Of a contest that torch's attention runs with this gain over products."""
    values = {"ms": 1.0, "products": gain, "error": 1e-6}
    return {f"{name}_{block}": x for name, x in values.items() for block in contest.BLOCKS}


def line(text: str, name: str) -> str:
    """The line that begins with a word, blanks before it left out."""
    return next(s for found in text.splitlines() if (s := found.strip()).startswith(name))


def test_the_chosen_route_has_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "_probed", Probe(1.83, 2.5e-7, 2.1))
    said = line(doctor.report(doctor.examine()), "bfloat16: ")
    assert "through oneDNN, 1.83x" in said and "2.5e-07" in said
    assert "in bfloat16, 2.10x" in said and "oneDNN rejected" not in said
    assert "gathered keys rejected: 0.900x as fast, needed 1.1x" in said
    monkeypatch.setattr(contest, "_known", {})
    monkeypatch.setattr(contest, "measure", lambda *_: figures(2.5))
    executor.forget()
    monkeypatch.setattr(routes, "_probed", Probe(1.83, 2.5e-7, 2.1))
    said = line(doctor.report(doctor.examine()), "bfloat16: ")
    assert "gathered keys, 2.50x at blocks of 64 and 2.50x at blocks of 128" in said


@pytest.mark.parametrize(
    ("probe", "why"),
    [
        (Probe(1.83, 2.5e-3, 0.5), "error 2.5e-03, allowed 1e-06"),
        (Probe(0.93, 2.5e-7, 0.5), "0.93x as fast, needed 1.2x"),
        (
            Probe(1.83, 2.5e-7, 0.5, 812.0),
            "products of other shapes lose a factor of 812 in precision",
        ),
        (Probe(0.0, 0.0, 0.5, reason="no child process: so"), "no child process: so"),
    ],
)
def test_a_rejected_route_is_named_as_rejected(
    monkeypatch: pytest.MonkeyPatch, probe: Probe, why: str
) -> None:
    """Its figures stand in the words that reject it, and nowhere else."""
    monkeypatch.setattr(routes, "_probed", probe)
    facts = doctor.examine()
    said = line(doctor.report(facts), "bfloat16: ")
    assert f"fp32 by torch's own products (oneDNN rejected: {why})" in said
    assert "in float32 (bfloat16 rejected: 0.50x as fast)" in said
    assert "1.83" not in said and "gathered keys rejected: 0.900x" in said
    assert facts["executors"]["cpu"]["figures"]["fp32"] == "native"


def test_the_table_is_what_auto_decides() -> None:
    facts = json.loads(json.dumps(doctor.examine()))
    table = facts["auto"]
    assert len(table) == 2 * 2 * len(doctor.TOKENS)
    processor, heads = PROCESSORS["amx-bf16"], doctor.HEADS
    for cell in table:
        n, d = cell["tokens"], cell["density"]
        if d > 0:
            assert processor.sparse(n, heads, d) <= processor.dense(n, heads)
    text = doctor.report(facts)
    assert "bfloat16, head dim 128: 1,024: " in text and "auto on cpu" in text


def test_where_figures_are_kept_or_why_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = line(doctor.report(doctor.examine()), "auto on cpu")
    assert str(tmp_path / "vidsparse") in said and "--remeasure" in said
    lost = Probe(0.0, 0.0, 2.0, problem="/x cannot be written: Read-only file system")
    monkeypatch.setattr(routes, "_probed", lost)
    assert "Read-only" in line(doctor.report(doctor.examine()), "auto on cpu")


def test_remeasure(monkeypatch: pytest.MonkeyPatch) -> None:
    before = doctor.examine()["auto"]
    monkeypatch.setattr(crossover, "measure", PROCESSORS["avx512"].measure)
    assert doctor.examine()["auto"] == before
    after = doctor.examine(remeasure=True)["auto"]
    assert all(a["density"] > b["density"] for a, b in zip(after, before, strict=True))
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"
