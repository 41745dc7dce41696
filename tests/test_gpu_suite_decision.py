"""The last lines of a report of the GPU suite: what one decides by."""

from dataclasses import replace
from pathlib import Path

import pytest
from gpu_suite import FACTS

pytest.importorskip("triton", reason="triton is not installed")

import gpu_rows
from gpu_decide import MOST, SHAPE, TARGETS, decision
from gpu_plot import plot
from gpu_report import failed, report
from gpu_rows import Check, Result
from gpu_watch import Watched

GPU = "NVIDIA H100 80GB HBM3, sm_90"
ROW = Result(**vars(replace(FACTS, gpu=GPU)), shape=SHAPE, tokens=75600, heads=40, head_dim=128,
             dtype="bfloat16", density=0.1, impl="fa4", stage="whole", blocks="128x128",
             dense_impl="sdpa-cudnn", rel_l2=2e-3)  # fmt: skip
CHECK = Check(**vars(replace(FACTS, gpu=GPU)), check="exact tiles", shape="ragged",
              dtype="bfloat16", impl="fa4", error=1e-3, limit=5e-3, verdict="right")  # fmt: skip
ABSENT = replace(CHECK, check="engine runs here", impl="cudnn", error=None, verdict="absent",
                 message="cudnn is not installed")  # fmt: skip


def timing(density: float, impl: str, stage: str, ms: float, blocks: str = "128x64") -> Result:
    """Beside dense attention of 189 ms."""
    return replace(ROW, density=density, impl=impl, stage=stage, blocks=blocks, ms_p50=ms,
                   speedup_vs_dense=round(189 / ms, 3))  # fmt: skip


BENCH = [
    timing(0.1, "fa4", "whole", 23.0, "128x128"),
    timing(0.2, "fa4", "whole", 45.0, "128x128"),
    timing(0.1, "triton-tma", "whole", 25.0),
    timing(0.2, "triton-tma", "whole", 50.0),
    timing(0.1, "triton-pointer", "whole", 20.0),
    timing(0.1, "triton-tma", "sparse", 20.0),
    timing(0.2, "triton-tma", "sparse", 40.0),
    timing(1.0, "triton-tma", "sparse", 210.0),
    timing(0.2, "flex", "sparse", 60.0),
    timing(0.2, "triton-int8", "sparse", 38.0),
    *(timing(0.1, "triton", stage, 0.5) for stage in ("pool", "draft", "select", "rest")),
]
TUNED = [
    timing(0.2, "triton-tma", "128x64 w4 s3, random", 9.0),
    timing(0.2, "triton-tma", "128x64 w4 s2, random", 8.0),
    timing(0.2, "triton-tma", "128x128 w4 s2, random", 7.0),
    timing(0.2, "triton-levels", "128x64 w8 s3, random", 7.5),
    timing(0.2, "triton-tma-64", "64x64 w4 s2, random", 9.5),
    timing(0.2, "triton-rest", "128x64 w8 s2", 1.5),
    timing(0.2, "triton-rest", "128x32 w8 s3", 1.4),
    replace(timing(0.2, "triton-tma", "128x64 w4 s4, random", 1.0), rel_l2=0.5),
    replace(timing(0.2, "triton-tma", "128x64 w8 s3, random", 9.0), head_dim=64),
]


def test_decision() -> None:
    assert decision([CHECK, ABSENT], BENCH, TUNED, GPU) == [
        "target met: exact tiles against dense, d 1: 0.9 (triton-tma 128x64 210 ms, "
        "baseline sdpa-cudnn), wanted at least 0.85",
        "target met: whole call against dense, d 0.2: 4.2 (fa4 128x128 45 ms, "
        "baseline sdpa-cudnn), wanted at least 4",
        "target met: whole call against dense, d 0.1: 9.45 (triton-pointer 128x64 20 ms, "
        "baseline sdpa-cudnn), wanted at least 7.5",
        "target met: exact tiles against FlexAttention, same mask, d 0.2: 1.5 (triton-tma 128x64 "
        "40 ms, baseline flex 60 ms), wanted at least 1.3",
        "target MISSED: 8-bit against exact tiles, same mask, d 0.2: 1.05 (8-bit 38 ms, "
        "baseline triton-tma 128x64 40 ms), wanted at least 1.1",
        "target met: stages around the tiles against the tiles, d 0.1: 0.1 (2 ms, "
        "baseline triton-tma 128x64), wanted at most 0.15",
        "fastest at d 0.1, whole: triton-pointer 128x64 20 ms (9.45x sdpa-cudnn, error 2.0e-03), "
        "fa4 128x128 23 ms (8.217x sdpa-cudnn, error 2.0e-03), "
        "triton-tma 128x64 25 ms (7.56x sdpa-cudnn, error 2.0e-03)",
        "fastest at d 0.2, whole: fa4 128x128 45 ms (4.2x sdpa-cudnn, error 2.0e-03), "
        "triton-tma 128x64 50 ms (3.78x sdpa-cudnn, error 2.0e-03)",
        "fastest at d 1, sparse: triton-tma 128x64 210 ms (0.9x sdpa-cudnn, error 2.0e-03)",
        "checks: 1 right, wrong or failed 0; not here: cudnn",
        'PREFERRED = ("fa4", "triton")  # exact/__init__.py; fa4 128x128 32.17 ms; '
        "triton tma 128x64 35.36 ms",
        "exact/triton.py: TMA (9, 128): Tiling(128, 128, 4, 2), (9, 64): Tiling(128, 64, 8, 3); "
        "TMA_64 9: Tiling(64, 64, 4, 2)",
        "rest_merge.py: TILINGS (9, 0): Tiling(128, 32, 8, 3)",
        "levels_forward.py: TILINGS (9, 128): Tiling(128, 64, 8, 3)",
    ]


@pytest.mark.parametrize("bad", ["check", "timing"])
def test_what_is_wrong_is_not_preferred(bad: str) -> None:
    """Neither by a check nor by the error beside its speed; it is named."""
    checks, bench = [CHECK], list(BENCH)
    if bad == "check":
        checks = [replace(CHECK, error=1.0, verdict="wrong")]
    else:
        bench[0] = replace(bench[0], rel_l2=0.1)
    lines = decision(checks, bench, [], GPU)
    (said,) = (line for line in lines if line.startswith("checks: "))
    assert "wrong or failed 1: " in said and "fa4" in said
    (line,) = (line for line in lines if line.startswith("PREFERRED"))
    assert line.startswith('PREFERRED = ("triton",)  # ')


def test_without_figures() -> None:
    lines = decision([CHECK], [], [], GPU)
    assert sum(line.startswith("target open: ") for line in lines) == len(TARGETS)
    assert "PREFERRED: no engine has right figures of whole calls at d 0.1 and 0.2" in lines
    assert all("no figure" in line for line in lines if line.startswith("fastest"))


def test_a_report_ends_in_the_decision(tmp_path: Path) -> None:
    """It fits the last lines of a terminal; what is not here is no failure."""
    for name, rows in {
        "gpu_bench": BENCH,
        "gpu_tune": TUNED,
        "gpu_checks": [CHECK, ABSENT],
    }.items():
        for row in rows:
            gpu_rows.add(tmp_path / f"{name}.csv", row)
    seen = Watched(facts=vars(replace(FACTS, gpu=GPU)))
    lines = list(report(tmp_path, seen, {}))
    want = decision([CHECK, ABSENT], BENCH, TUNED, GPU)
    assert len(want) <= MOST and lines[-len(want) :] == want
    assert gpu_rows.fault(ABSENT) == "" and not failed(seen, {})


def test_pictures(tmp_path: Path) -> None:
    """Of any engine's rows; one is drawn for each GPU."""
    for row in BENCH:
        gpu_rows.add(tmp_path / "gpu_bench.csv", row)
    written = [path.name for path in plot(tmp_path)]
    assert written == ["gpu_speedup.png", "gpu_stages.png"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in written)
    with pytest.raises(FileNotFoundError, match=r"run kernels/gpu/suite\.py first"):
        plot(tmp_path / "nothing")
