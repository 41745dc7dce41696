"""The lines of the CPU bench: what is kept is read again, and what is aimed at where."""

import csv
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels" / "bench"))
import cpu_rows
from cpu_rows import Result, save, targets

from vidsparse.kernels.cpu import machine

KERNELS = Path(__file__).resolve().parent.parent / "kernels"


def lines(path: Path) -> list[Result]:
    with path.open(newline="") as file:
        return [Result(**line) for line in csv.DictReader(file)]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cpu.csv", "cpu_2_threads.csv", "cpu_full.csv"])
def test_what_is_kept_is_read_whatever_its_age(name: str, tmp_path: Path) -> None:
    """A newer line replaces the one of its key, and no other."""
    kept = lines(KERNELS / "results" / name)
    assert kept and len({line.key() for line in kept}) == len(kept)
    copy = tmp_path / "cpu.csv"
    copy.write_bytes((KERNELS / "results" / name).read_bytes())
    newer = Result(**{**vars(kept[-1]), "ms_p50": 1.25})
    other = Result(**{**vars(kept[-1]), "blocks": "16/16", "route": "none"})
    save(copy, [newer, other])
    found = lines(copy)
    assert len(found) == len(kept) + 1 and found[-2].ms_p50 == "1.25"
    assert [line.key() for line in found] == [*(line.key() for line in kept), other.key()]


@pytest.mark.parametrize(
    ("flags", "environment", "aim"),
    [
        ({"avx2", "avx512f", "avx512_bf16", "amx_bf16"}, {}, 3.8),
        ({"avx2", "avx512f", "avx512_bf16"}, {}, 8.8),
        ({"avx2", "avx512f"}, {}, None),
        ({"avx2"}, {}, None),
        ({"avx2", "avx512f", "avx512_bf16"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, None),
        ({"avx2", "avx512f", "avx512_bf16"}, {"OMP_NUM_THREADS": "1"}, 8.8),
    ],
)
def test_each_kind_of_processor_has_its_targets_and_an_imitated_one_none(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], environment: dict[str, str], aim: float | None
) -> None:
    monkeypatch.setattr(machine, "flags", lambda: frozenset(flags))
    monkeypatch.setattr(machine, "fingerprint", lambda: {"environment": environment})
    assert targets().get(("bfloat16", 128)) == aim


def test_what_larger_blocks_cost_is_known_and_rises() -> None:
    cost = {blocks: float(error) for blocks, error in cpu_rows.quality().items()}
    assert cost["64/64"] == 1.0 < cost["128/64"] < cost["256/64"]
    assert cost["64/64"] < cost["128/128"]
