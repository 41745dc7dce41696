"""From a request to files: what is written, measured and left behind; what a request becomes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from vidsparse import run_report, shipped
from vidsparse.generate import run as runs
from vidsparse.generate.job import Request, prepare, slug
from vidsparse.generate.results import ABOUT, METRICS, staging
from vidsparse.quality.frames import read_clip
from vidsparse.quality.metrics import compare_clips, psnr

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"height": 64, "width": 48, "frames": 5, "steps": 3}
SPARSE = (
    "schedule.min_tokens=0",
    "schedule.dense_layers=[]",
    "compensation.name=none",
    "kernel.block_q=16",
    "kernel.block_k=16",
)
"""Few tokens, and a method that is sparse on them and differs from dense."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny operations on threads that other processes hold up take a hundred times longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved pipeline with random weights."""
    path = tmp_path_factory.mktemp("models") / "tiny-wan"
    tiny.build("wan")[0].save_pretrained(path)
    return path


def request(model, out, **options):
    options = {"prompt": "a monkey dances", "overrides": SPARSE, **SMALL, **options}
    return Request(model=str(model), out=out, **options)


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def compared(model, tmp_path_factory):
    """Folder of one comparison and what `generate` returned for it."""
    out = tmp_path_factory.mktemp("outputs") / "a" / "b"
    return out, runs.generate(request(model, out, compare_dense=True, seed=3))


def test_comparison_writes_every_file(compared):
    out, content = compared
    assert names(out) == set(ABOUT) == set(content["files"])
    assert Path(content["out"]) == out
    on_file = json.loads((out / METRICS).read_text())
    assert {**on_file, "out": content["out"]} == content


def test_metrics_agree_with_the_files(compared):
    out, metrics = compared
    quality = metrics["quality"]
    again = compare_clips(out / "dense.mkv", out / "sparse.mkv", fps=metrics["fps"]).to_dict()
    assert quality == json.loads(json.dumps(again))
    dense, sparse = read_clip(out / "dense.mkv"), read_clip(out / "sparse.mkv")
    assert dense.shape == sparse.shape == (5, 64, 48, 3)
    mse = float(np.mean((dense.astype(float) - sparse.astype(float)) ** 2))
    assert mse > 0 and math.isclose(quality["psnr_pool"], psnr(mse))
    assert [len(quality["frames"]), metrics["frames"]] == [5, 5]
    mp4 = {
        name: read_clip(out / f"{name}.mp4").shape for name in ("dense", "sparse", "side_by_side")
    }
    assert mp4["dense"] == mp4["sparse"] == (5, 320, 240, 3)  # five times as large
    assert mp4["side_by_side"][2] >= 2 * 240


def test_metrics_say_all_that_it_takes_to_repeat(compared):
    metrics = compared[1]
    assert metrics["schema"] == "vidsparse.generate/1"
    assert metrics["model"]["pipeline"] == "WanPipeline"
    expected = {"height": 64, "width": 48, "steps": 3, "seed": 3, "dtype": "fp32", "device": "cpu"}
    assert {key: metrics[key] for key in expected} == expected
    assert metrics["tokens"] == 2 * 4 * 3
    assert metrics["preset"]["config"]["kernel"]["block_q"] == 16
    assert metrics["preset"]["overrides"] == list(SPARSE)
    assert metrics["versions"]["torch"] == torch.__version__
    dense, sparse = metrics["arms"]["dense"], metrics["arms"]["sparse"]
    for arm in (dense, sparse):
        assert len(arm["step_seconds"]) == len(arm["step_density"]) == 3
        assert math.isclose(sum(arm["step_seconds"]), arm["denoise_seconds"], rel_tol=1e-6)
        assert arm["denoise_seconds"] < arm["total_seconds"]
    ratio = dense["denoise_seconds"] / sparse["denoise_seconds"]
    assert math.isclose(metrics["speedup"]["denoise"], ratio)
    assert dense["step_density"] == [1, 1, 1] and sparse["step_density"][0] == 1
    assert 0 < metrics["density"] < 1
    assert math.isclose(metrics["attention_density"], np.mean(sparse["step_density"]))
    calls = metrics["sparse_calls"], metrics["dense_calls"]
    assert calls == (8, 4) and metrics["dense_reasons"] == {"warmup-step": 4}


def test_rerun_replaces_its_own_files_only(model, tmp_path):
    out = tmp_path / "out"
    runs.generate(request(model, out, compare_dense=True, steps=1))
    (out / "notes.txt").write_text("mine")
    runs.generate(request(model, out, steps=2, seed=5))
    assert names(out) == {"sparse.mp4", METRICS, "notes.txt"}
    metrics = json.loads((out / METRICS).read_text())
    assert metrics["seed"] == 5 and metrics["files"] == ["sparse.mp4", METRICS]
    assert metrics["quality"] is metrics["speedup"] is metrics["arms"]["dense"] is None


def test_density_one_is_the_dense_pipeline_up_to_rounding(model, tmp_path):
    overrides = (*SPARSE, "schedule.density=1", "schedule.dense_steps=0")
    asked = request(model, tmp_path, overrides=overrides, compare_dense=True, steps=2)
    metrics = runs.generate(asked)
    assert metrics["quality"]["mse"] < 1e-2  # the token order is not the same
    assert metrics["sparse_calls"] == 0 and set(metrics["dense_reasons"]) == {"user"}


class Interrupt(runs.Listener):
    """Ctrl-C at the end of the second step of an arm."""

    def __init__(self, arm):
        self.arm, self.now = arm, ""

    def begin(self, arm, steps):
        self.now = arm

    def step(self, done, density):
        if self.now == self.arm and done == 2:
            raise KeyboardInterrupt


def test_interrupt_leaves_nothing_and_the_pipeline_works(model, compared, tmp_path):
    out = tmp_path / "new" / "out"
    job = prepare(request(model, out, compare_dense=True, seed=3))
    pipe = runs.load(job, runs.Listener())
    for arm in ("dense", "sparse"):
        with pytest.raises(KeyboardInterrupt), staging(out) as folder:
            runs.render(pipe, job, folder, Interrupt(arm))
        assert names(tmp_path) == set()
        with pytest.raises(ValueError, match="not accelerated"):
            run_report(pipe)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in pipe.transformer.modules())
    with staging(out) as folder:
        after = runs.render(pipe, job, folder, runs.Listener())
    assert names(out) == set(ABOUT)
    assert after["quality"] == compared[1]["quality"]


def test_failed_run_keeps_the_files_of_the_last_one(tmp_path):
    (tmp_path / "sparse.mp4").write_text("old")
    with pytest.raises(KeyboardInterrupt), staging(tmp_path) as folder:
        (folder / "sparse.mp4").write_text("new")
        raise KeyboardInterrupt
    assert names(tmp_path) == {"sparse.mp4"} and (tmp_path / "sparse.mp4").read_text() == "old"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A large, red circle!", "a-large-red-circle"),
        ("../../etc/passwd", "etc-passwd"),
        ("Привет", "video"),
        ("x" * 80, "x" * 60),
        ("word " * 30, "-".join(["word"] * 12)),
    ],
)
def test_slug(text, name):
    assert slug(text) == name


def test_shipped_folders(tmp_path, monkeypatch):
    assert shipped.folder("configs/methods") == ROOT / "configs" / "methods"
    package = tmp_path / "site-packages" / "vidsparse"
    (package / "configs" / "methods").mkdir(parents=True)
    (package.parent / "assets" / "demo-wan").mkdir(parents=True)  # of somebody else
    monkeypatch.setattr(shipped, "PACKAGE", package)
    assert shipped.folder("configs/methods") == package / "configs" / "methods"
    with pytest.raises(FileNotFoundError, match="reinstall"):
        shipped.folder("assets/demo-wan")
