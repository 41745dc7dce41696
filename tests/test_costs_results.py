"""Rows of the GPU suite take the place of the table's constants."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels" / "gpu"))
import gpu_rows

from vidsparse.costs import clock, gpus, machine, results, stages
from vidsparse.costs.forward import Forward
from vidsparse.costs.stage import AROUND, Method
from vidsparse.grid import TokenGrid

H100 = machine.table()["H100"]
BLANK = gpu_rows.Result(
    "c0ffee", "5eed", "2026-12-01", "NVIDIA H100 80GB HBM3, sm_90", "2.13", "13.0", "3.9",
    shape="wan2.1-14b-720p", tokens=75_600, heads=40, head_dim=128, dtype="bfloat16",
    density=1.0, impl="sdpa-cudnn", stage="whole",
)  # fmt: skip
FORWARD = Forward(TokenGrid(1, 1, 75_600), 1, 40, 128, (), 0.0, 0, "bfloat16")
SLOWER = 1.5
"""Times the model, of the rows below."""


@pytest.fixture
def path(tmp_path):
    """What the suite would write: dense at 600 TFLOP/s, listed tiles at 400."""
    work = 4 * 75_600**2 * 5120
    method = Method(128, 64, first_order=True)
    rates = {**H100.constants, "sparse": replace(H100.constants["sparse"], value=400e12)}
    rows = [replace(BLANK, ms_p50=1e3 * work / 600e12, tflops=600.0, rel_l2=2e-3)]
    rows += [replace(rows[0], impl="sdpa-flash", ms_p50=1.2 * rows[0].ms_p50, tflops=500.0)]
    for density in (0.1, 0.2):
        exact = 1e3 * density * work / 400e12
        around = [
            one for one in stages.sparse_layer(FORWARD, method, density) if one.name in AROUND
        ]
        more = 1e3 * SLOWER * clock.timed(around, replace(H100, constants=rates)).seconds
        kept = replace(BLANK, impl="triton-tma", density=density, rel_l2=3e-3, blocks="128x64")
        rows += [
            replace(kept, stage="sparse", ms_p50=exact, tflops=400.0),
            replace(kept, stage="whole", ms_p50=exact + more, tflops=1.0),
        ]
    rows += [replace(row, blocks="128x128", ms_p50=1.0, tflops=1.0) for row in rows[2:]]
    rows += [replace(row, impl="triton-pointer", ms_p50=1.0, tflops=1.0) for row in rows[2:6]]
    rows += [replace(BLANK, impl="sdpa-flash", density=1.0, shape="other", message="out of memory")]
    rows += [replace(rows[0], gpu="NVIDIA A100-SXM4-80GB", tflops=1.0)]
    for row in rows:
        gpu_rows.add(tmp_path / "gpu_bench.csv", row)
    return tmp_path / "gpu_bench.csv"


def test_measured_rows_take_the_place_of_what_was_assumed(path):
    found = results.measured(H100, H100.names, path)
    assert found.constants["dense"].value == 600e12
    assert found.constants["sparse"].value == pytest.approx(400e12)
    for name in AROUND:
        assert found.slower[name].value == pytest.approx(SLOWER, rel=1e-3)
    for one in (*found.slower.values(), found.constants["dense"], found.constants["sparse"]):
        assert one.source == "measured" and "commit c0ffee" in one.origin
        assert results.LEAST <= one.error < 0.1
    assert found.constants["matmul"] == H100.constants["matmul"]
    assert found.sources() == ["measured", "published", "assumed"]


def test_rows_of_another_gpu_and_no_rows_change_nothing(path, tmp_path):
    h200 = machine.table()["H200"]
    for one, where in ((h200, path), (H100, tmp_path / "none.csv")):
        around = dict.fromkeys(AROUND, one.around)
        assert results.measured(one, one.names, where) == replace(one, slower=around)
        bare = replace(one, around=None)
        assert results.measured(bare, bare.names, where) == bare


def test_the_shipped_results_are_read(path, monkeypatch):
    monkeypatch.setattr(results, "folder", lambda name: {"kernels/results": path.parent}[name])
    assert gpus.named("H100").constants["dense"].source == "measured"
    assert gpus.recognised("NVIDIA H100 PCIe").constants["sparse"].source == "measured"
