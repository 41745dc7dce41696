"""From a request to files: what is written, measured and left behind; what a request becomes."""

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from disks import small_disk

from vidsparse import run_report, shipped
from vidsparse.generate import run as runs
from vidsparse.generate.job import prepare
from vidsparse.generate.model_files import InputError
from vidsparse.generate.request import Request
from vidsparse.generate.results import Arm, write
from vidsparse.interrupts import Interrupted, listening, take
from vidsparse.jobs import publish
from vidsparse.jobs.layout import ABOUT, METRICS, REPORT, STILLS
from vidsparse.jobs.publish import publishing
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

ALONE = {"sparse.mp4", "sparse.mkv", REPORT, METRICS}
"""Files of a job that was not compared."""


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


def contents(folder):
    """Every file below a folder, and its bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def compared(model, tmp_path_factory):
    """Folder of one comparison and what `generate` returned for it."""
    out = tmp_path_factory.mktemp("outputs") / "a" / "b"
    return out, runs.generate(request(model, out, compare_dense=True, seed=3))


def test_comparison_writes_every_file(compared):
    out, content = compared
    assert names(out) == set(ABOUT) - STILLS == set(content["files"])
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
    before = contents(out)
    with pytest.raises(InputError, match=r'another job, "a monkey dances".*--overwrite'):
        runs.generate(request(model, out, steps=2, seed=5))
    assert contents(out) == before and names(tmp_path) == {"out"}
    runs.generate(request(model, out, steps=2, seed=5, overwrite=True))
    assert names(out) == {*ALONE, "notes.txt"}
    metrics = json.loads((out / METRICS).read_text())
    assert metrics["seed"] == 5 and set(metrics["files"]) == ALONE
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
        with pytest.raises(KeyboardInterrupt), publishing(out, job.id) as stage:
            runs.render(pipe, job, stage, Interrupt(arm))
        assert names(tmp_path) == set()
        with pytest.raises(ValueError, match="not accelerated"):
            run_report(pipe)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in pipe.transformer.modules())
    with publishing(out, job.id) as stage:
        after = runs.render(pipe, job, stage, runs.Listener())
    assert names(out) == set(ABOUT) - STILLS
    assert after["quality"] == compared[1]["quality"]


class Signal(runs.Listener):
    """A signal at the end of the first step, which a library then swallows."""

    def __init__(self, signum):
        self.signum, self.steps = signum, 0

    def step(self, done, density):
        self.steps += 1
        with contextlib.suppress(Interrupted):
            os.kill(os.getpid(), self.signum)
            time.sleep(0.1)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_library_swallows_still_ends_the_run(model, tmp_path, signum):
    listener = Signal(signum)
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(signal.SIGTERM))
    try:
        with pytest.raises(KeyboardInterrupt):
            runs.generate(request(model, tmp_path / "out"), listener)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert listener.steps == 1 and names(tmp_path) == set()
    assert seen == [signal.SIGTERM] * (signum == signal.SIGTERM), "the handler that was there"


def test_an_interrupt_after_the_end_says_where_the_files_are(model, tmp_path, monkeypatch):
    def late(place, id, overwrite):
        first(place, id, overwrite)
        os.kill(os.getpid(), signal.SIGINT)

    first = publish._publish
    monkeypatch.setattr(publish, "_publish", late)
    out = tmp_path / "out"
    with listening():
        with pytest.raises(KeyboardInterrupt) as raised:
            runs.generate(request(model, out, steps=1))
        take()
    assert raised.value.__notes__ == [f"the files are in {out}"]
    assert names(out) == ALONE


class Full(OSError):
    """No room."""


def no_room(*args, **options):
    raise Full(errno.ENOSPC, "No space left on device")


@pytest.fixture
def room(tmp_path, monkeypatch):
    """The only folder in which a rescue finds room."""
    folder = tmp_path / "room"
    folder.mkdir()
    monkeypatch.setattr("vidsparse.generate.rescue.places", lambda: [folder])
    return folder


def test_videos_that_cannot_be_written_are_kept(model, compared, tmp_path, monkeypatch, room):
    monkeypatch.setattr(runs, "write", no_room)
    asked = request(model, tmp_path / "out", compare_dense=True, seed=3)
    with pytest.raises(InputError, match="No space left on device") as failure:
        runs.generate(asked)
    (kept,) = room.iterdir()
    assert str(kept) in str(failure.value) and names(tmp_path) == {"room"}
    for name in ("dense.mkv", "sparse.mkv"):
        assert np.array_equal(read_clip(kept / name), read_clip(compared[0] / name))
    assert json.loads((kept / METRICS).read_text())["id"] == compared[1]["id"]


def test_a_full_disk_costs_no_video(model, tmp_path, room):
    with small_disk(tmp_path / "small", "100k") as disk:
        asked = request(model, disk / "out", compare_dense=True, steps=1)
        with pytest.raises(InputError, match="No space left on device") as failure:
            runs.generate(asked)
        assert names(disk) == set()
    (kept,) = room.iterdir()
    assert str(kept) in str(failure.value) and names(kept) == set(ABOUT) - STILLS
    assert read_clip(kept / "sparse.mkv").shape == (5, 64, 48, 3)


def test_a_defect_in_drawing_costs_no_frames(model, compared, tmp_path, monkeypatch, room):
    def broken(*args, **options):
        raise ZeroDivisionError("a defect of ours")

    monkeypatch.setattr("vidsparse.generate.results.measure", broken)
    with pytest.raises(ZeroDivisionError) as failure:
        runs.generate(request(model, tmp_path / "out", compare_dense=True, seed=3))
    (kept,) = room.iterdir()
    assert any(str(kept) in note for note in failure.value.__notes__)
    for name in ("dense", "sparse"):
        theirs = read_clip(compared[0] / f"{name}.mkv")
        assert np.array_equal(read_clip(kept / f"{name}.npz"), theirs)


def test_a_failure_of_the_second_arm_keeps_the_first(model, compared, tmp_path, monkeypatch, room):
    def second(pipe, job, name, listener):
        if name == "sparse":
            raise torch.OutOfMemoryError("as on a GPU")
        return first(pipe, job, name, listener)

    first = runs.run_arm
    monkeypatch.setattr(runs, "run_arm", second)
    with pytest.raises(InputError, match=r"too little memory.*what was computed is in"):
        runs.generate(request(model, tmp_path / "out", compare_dense=True, seed=3))
    (kept,) = room.iterdir()
    assert np.array_equal(read_clip(kept / "dense.mkv"), read_clip(compared[0] / "dense.mkv"))


def test_without_room_anywhere_what_is_complete_stays(model, tmp_path, monkeypatch):
    monkeypatch.setattr("vidsparse.generate.rescue.places", list)
    monkeypatch.setattr("vidsparse.generate.results.write_clip", no_room)
    monkeypatch.setattr(runs, "check_encoder", lambda folder: None)
    with pytest.raises(InputError, match=r"dense.mp4, sparse.mp4 is in .*out-part1"):
        runs.generate(request(model, tmp_path / "out", compare_dense=True, steps=1))
    assert names(tmp_path) == {"out-part1"}
    assert names(tmp_path / "out-part1") == {"dense.mp4", "sparse.mp4"}
    assert read_clip(tmp_path / "out-part1" / "sparse.mp4").shape == (5, 320, 240, 3)


def test_no_encoder_is_found_out_before_anything_is_computed(model, tmp_path, monkeypatch):
    monkeypatch.setattr("vidsparse.generate.results.write_preview", no_room)
    monkeypatch.setattr(runs, "load", no_room)
    with pytest.raises(InputError, match=r"no video can be written.*doctor"):
        runs.generate(request(model, tmp_path / "out"))
    assert names(tmp_path) == set()


def strings(value):
    """All strings in a JSON value, keys too."""
    if isinstance(value, dict):
        return [s for item in value.items() for s in strings(list(item))]
    if isinstance(value, list):
        return [s for item in value for s in strings(item)]
    return [value] if isinstance(value, str) else []


def test_files_carry_no_path_of_the_machine(model, tmp_path):
    preset = tmp_path / "presets" / "mine.yaml"
    preset.parent.mkdir()
    shutil.copy(ROOT / "configs/methods/balanced.yaml", preset)
    out = tmp_path / "out"
    runs.generate(request(model, out, compare_dense=True, preset=str(preset), steps=1))
    metrics = json.loads((out / METRICS).read_text())
    assert [s for s in strings(metrics) if Path(s).is_absolute()] == []
    assert metrics["preset"]["name"] == "mine.yaml"
    here = [model.parent, tmp_path, Path.home(), Path.cwd(), Path(sys.prefix)]
    for path, content in contents(out).items():
        found = [str(folder) for folder in here if os.fsencode(folder) + b"/" in content]
        assert not found, path


def test_a_prompt_that_is_no_text_is_written_as_it_came(model, tmp_path):
    job = prepare(request(model, tmp_path / "out", prompt="a monkey dances"))
    arm = Arm(np.zeros((5, 64, 48, 3), np.uint8), 1.0, 1.0, 1.0, (1.0,), (1.0,))
    prompt = "a \x1b[31mmonkey\udcff\n" + "x" * 100_000
    tmp_path.joinpath("out").mkdir()
    write(replace(job, prompt=prompt), arm, None, tmp_path / "out")
    assert json.loads((tmp_path / "out" / METRICS).read_text())["prompt"] == prompt


def test_shipped_folders(tmp_path, monkeypatch):
    assert shipped.folder("configs/methods") == ROOT / "configs" / "methods"
    package = tmp_path / "site-packages" / "vidsparse"
    (package / "configs" / "methods").mkdir(parents=True)
    (package.parent / "assets" / "demo-wan").mkdir(parents=True)  # of somebody else
    monkeypatch.setattr(shipped, "PACKAGE", package)
    assert shipped.folder("configs/methods") == package / "configs" / "methods"
    with pytest.raises(FileNotFoundError, match="reinstall"):
        shipped.folder("assets/demo-wan")
