"""The files that a run leaves, and what metrics.json says: gains, densities, how to repeat it."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import tiny
import torch

from vidsparse import SparseConfig
from vidsparse.generate import results
from vidsparse.generate.forecast import Foretold
from vidsparse.generate.job import prepare
from vidsparse.generate.limit import limit
from vidsparse.generate.model_files import InputError
from vidsparse.generate.request import Request
from vidsparse.generate.results import (
    BANNER,
    GAP,
    PAPER,
    Arm,
    check_encoder,
    compare_arms,
    conditions,
    metrics,
    side_by_side,
    write,
)
from vidsparse.jobs.layout import ABOUT, METRICS, REPORT, STILLS
from vidsparse.pipelines.report import Call, RunReport
from vidsparse.quality.frames import read_clip
from vidsparse.quality.sheet import SheetRow

SHAPE = (5, 64, 48, 3)
ASKED = {
    "prompt": "ein Bär tanzt",
    "negative_prompt": "bad quality",
    "preset": "fast",
    "overrides": ("schedule.min_tokens=0", "schedule.density=0.3"),
    "height": 64,
    "width": 48,
    "frames": 5,
    "steps": 3,
    "guidance": 2.5,
    "seed": 7,
    "dtype": "bf16",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-wan"
    tiny.build("wan")[0].save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def job(model):
    return prepare(Request(model=str(model), **ASKED))


def arm(denoise, cpu, total, steps, report=None):
    densities = (1.0, 0.3, 0.2)
    return Arm(np.zeros(SHAPE, np.uint8), denoise, cpu, total, steps, densities, report)


def test_gains_are_seconds_of_dense_over_seconds_of_sparse(job):
    dense, sparse = arm(12.0, 20.0, 18.0, (5.0, 1.0, 6.0)), arm(3.0, 8.0, 6.0, (0.25, 2.0, 0.5))
    found = metrics(job, sparse, dense)
    assert found["speedup"] == {"denoise": 4.0, "median_step": 10.0, "cpu": 2.5, "total": 3.0}
    assert found["arms"]["dense"] == {
        "denoise_seconds": 12.0,
        "cpu_seconds": 20.0,
        "total_seconds": 18.0,
        "median_step_seconds": 5.0,
        "step_seconds": [5.0, 1.0, 6.0],
        "step_density": [1.0, 0.3, 0.2],
        "predicted": None,
    }
    told = replace(sparse, foretold=Foretold(4.0, 0.1, ("measured",)))
    beside = {"seconds": 4.0, "error": 0.1, "sources": ("measured",)}
    assert metrics(job, told, None)["arms"]["sparse"]["predicted"] == beside
    assert found["arms"]["sparse"]["median_step_seconds"] == 0.5
    alone = metrics(job, sparse, None)
    assert alone["speedup"] is alone["arms"]["dense"] is alone["limit"] is None
    assert found["limit"] is None, "no report"
    assert alone["arms"]["sparse"] == found["arms"]["sparse"]


def test_the_bound_of_a_loop_is_that_of_its_sparse_calls():
    """10 s, of which 8 calls of 1 s are computed at a quarter: 10 - 8 + 2 = 4 s are left."""
    made = RunReport("tiles", SparseConfig.load("tiles"))
    quarter, whole = torch.full((2,), 0.25), torch.ones(2)
    made.calls = [
        Call(0, n, "cond", "transformer", whole, "warmup-step", None, {"dense": s})
        for n, s in enumerate((0.5, 1.5))
    ] + [Call(1, n, "cond", "transformer", quarter, None, None, {"kernel": 0.1}) for n in range(8)]
    assert limit(10.0, made, "cpu") == {"share": 0.8, "speedup": 2.5}
    assert limit(8.0, made, "cpu") == limit(2.0, made, "cpu") == {"share": 1.0, "speedup": 4.0}
    assert limit(10.0, made, "cuda:0") is None, "the time of a launch is not that of a call"
    made.calls = made.calls[2:]
    assert limit(10.0, made, "cpu") is None
    made.calls = []
    assert limit(10.0, made, "cpu") is limit(10.0, None, "cpu") is None


def test_figures_of_attention_are_those_of_its_report(job):
    """By hand: a dense call, two sparse ones of 0.1 and 0.3."""
    report = RunReport("fast", job.config, 3)
    for step, density, reason, seconds in (
        (0, 1.0, "warmup-step", {"dense": 2.0}),
        (1, 0.1, None, {"kernel": 0.25, "estimate": 0.5}),
        (2, 0.3, None, {"kernel": 0.5}),
    ):
        heads = torch.full((2,), density, dtype=torch.float64)
        report.calls.append(Call(step, 0, "cond", "transformer", heads, reason, None, seconds))
    found = metrics(job, arm(1.0, 1.0, 1.0, (1.0,), report), None)
    assert found["density"] == pytest.approx(0.2)
    assert found["attention_density"] == pytest.approx(1.4 / 3)
    assert (found["sparse_calls"], found["dense_calls"]) == (2, 1)
    assert found["dense_reasons"] == {"warmup-step": 1}
    assert found["attention_seconds"] == {"dense": 2.0, "kernel": 0.75, "estimate": 0.5}
    without = metrics(job, arm(1.0, 1.0, 1.0, (1.0,)), None)
    assert without["density"] is without["attention_seconds"] is without["quality"] is None


def test_a_run_can_be_asked_for_again_from_what_its_sidecar_says(model, job, monkeypatch):
    """The same job by its id; only a local folder is not named."""
    said = conditions(job, arm(1.0, 1.0, 1.0, (1.0,)))
    names = ("prompt", "negative_prompt", "height", "width", "frames", "steps", "guidance")
    asked = {name: said[name] for name in (*names, "seed", "dtype", "device")}
    preset = said["preset"]
    asked |= {"preset": preset["name"], "overrides": preset["overrides"]}
    assert asked == {**ASKED, "overrides": list(ASKED["overrides"]), "device": "cpu"}
    assert prepare(Request(model=str(model), **asked)).id == job.id
    assert said["preset"]["config"] == job.config.to_dict()
    assert said["model"] == {
        "name": "tiny-wan",
        "source": None,
        "fingerprint": job.fingerprint,
        "pipeline": "WanPipeline",
    }
    assert said["guidance_2"] is said["gpu"] is None
    assert (said["fps"], said["threads"]) == (job.fps, torch.get_num_threads())
    hub = replace(job, model=replace(job.model, source="owner/name"))
    assert conditions(hub, arm(1.0, 1.0, 1.0, (1.0,)))["model"]["source"] == "owner/name"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the card at {device}")
    elsewhere = conditions(replace(job, device="cuda:1"), arm(1.0, 1.0, 1.0, (1.0,)))
    assert (elsewhere["device"], elsewhere["gpu"]) == ("cuda:1", "the card at cuda:1")


def test_dense_stands_left_and_sparse_right_below_their_labels():
    """An enlarged pixel of a frame is a square of that colour; labels are ink on paper."""
    rng = np.random.default_rng(0)
    dense, sparse = rng.integers(0, 256, (2, 3, 32, 40, 3), np.uint8)
    frames = list(side_by_side(dense, sparse, ("left", "right")))
    assert len(frames) == 3
    _, width, _ = frames[0].shape
    scale = (width - GAP) // 80
    half = 40 * scale
    assert scale > 1 and width == 2 * half + GAP
    for n, frame in enumerate(frames):
        assert frame.shape[0] == BANNER + 32 * scale
        left, right = frame[BANNER:, :half], frame[BANNER:, half + GAP :]
        for found, wanted in ((left, dense[n]), (right, sparse[n])):
            assert np.array_equal(found, wanted.repeat(scale, 0).repeat(scale, 1))
        assert (frame[:, half : half + GAP] == PAPER).all()
        banner = (frame[:BANNER] != PAPER).any(-1)
        assert banner[:, :half].any() and banner[:, half + GAP :].any()
        assert not banner[:3].any() and not banner[-3:].any(), "a label is there as a whole"
    with pytest.raises(ValueError, match="shorter"):
        list(side_by_side(dense, sparse[:2], ("left", "right")))


DARK, BRIGHT = (0, 60), (200, 230)
"""Ranges of the pixels of the dense arm and of the sparse one: no codec mixes them up."""


def filmed(pixels, seconds, frames=3, report=None):
    rng = np.random.default_rng(pixels[0])
    video = rng.integers(*pixels, (frames, *SHAPE[1:])).astype(np.uint8)
    return Arm(video, seconds, 1.0, 2 * seconds, (seconds, seconds), (1.0, 0.5), report)


def found(folder):
    return {path.name for path in folder.iterdir()}


def test_each_file_of_a_comparison_shows_its_arm(job, tmp_path, monkeypatch):
    sheets, labels = [], []
    sheet, beside = results.write_contact_sheet, results.side_by_side
    monkeypatch.setattr(
        results, "write_contact_sheet", lambda *a, **k: (sheets.append((a, k)), sheet(*a, **k))
    )
    monkeypatch.setattr(
        results, "side_by_side", lambda d, s, names: (labels.append(names), beside(d, s, names))[1]
    )
    report = RunReport("fast", job.config, 3)
    report.calls.append(Call(1, 0, "cond", "transformer", torch.tensor([0.25]), None))
    dense, sparse = filmed(DARK, 12.0), filmed(BRIGHT, 3.0, report=report)
    content = write(job, sparse, dense, tmp_path)
    assert found(tmp_path) == set(content["files"]) == set(ABOUT) - STILLS
    assert content == json.loads((tmp_path / METRICS).read_text())
    for name, made in (("dense", dense), ("sparse", sparse)):
        assert np.array_equal(read_clip(tmp_path / f"{name}.mkv"), made.frames)
        shown = read_clip(tmp_path / f"{name}.mp4")
        assert shown.shape == (3, 5 * 64, 5 * 48, 3), "320 pixels on the longer side"
        assert abs(float(shown.mean()) - float(made.frames.mean())) < 10
    both = read_clip(tmp_path / "side_by_side.mp4")[:, BANNER:]
    left, right = np.array_split(both, 2, axis=2)
    assert left.mean() < 60 and right.mean() > 180
    error = float(np.mean((dense.frames.astype(float) - sparse.frames) ** 2))
    assert content["quality"]["mse"] == pytest.approx(error)
    flicker = content["quality"]["flicker_ratio"]
    assert flicker == pytest.approx(0.5, abs=0.05), "half the range, half the change"
    assert labels == [("dense  12.0 s", "vidsparse fast  3.0 s")]
    (((path, first, rows), more),) = sheets
    assert path == tmp_path / "sheet.png"
    assert first == SheetRow("dense", dense.frames, seconds=12.0)
    psnr = 10 * np.log10(255**2 / error)
    ((name, frames, figures),) = [(r.name, r.frames, r.figures()) for r in rows]
    assert (name, frames) == ("fast", sparse.frames)
    ssim = f"SSIM {content['quality']['ssim']:.3f}"
    assert figures == ["4.00x speed", "3.0 s", f"PSNR {psnr:.1f} dB", ssim, "density 0.25"]
    about = f"{job.model.name}, seed 7, 2 steps, {job.dtype} on cpu"
    assert more == {"title": ASKED["prompt"], "subtitle": about, "fps": job.fps}
    assert all(name in (tmp_path / "report.html").read_text() for name in ("fast", "dense"))
    comparison = compare_arms(tmp_path, content, "fast")
    (row,), (test,) = comparison.rows, comparison.tests
    assert (row.arm, row.reference.arm, row.test.arm) == ("fast", "dense", "sparse")
    assert (*row.seconds, row.speedup) == (12.0, 3.0, 4.0)
    assert (comparison.reference.name, [*comparison.reference.clips]) == ("dense", ["dense"])
    assert (test.name, [*test.clips]) == ("fast", ["sparse"])


def test_a_run_alone_and_an_image(job, tmp_path):
    """No dense arm, no report: nothing is said of them. One frame is a picture."""
    for frames, kind in ((2, "mp4"), (1, "png")):
        out = tmp_path / kind
        out.mkdir()
        sparse = filmed(BRIGHT, 3.0, frames)
        content = write(job, sparse, None, out)
        assert found(out) == {f"sparse.{kind}", "sparse.mkv", METRICS} == set(content["files"])
        assert content["quality"] is content["speedup"] is None
    picture = cv2.cvtColor(cv2.imread(str(out / "sparse.png")), cv2.COLOR_BGR2RGB)
    assert np.array_equal(picture, sparse.frames[0])
    for name, report in (("without", None), ("with", RunReport("fast", job.config))):
        both = tmp_path / name
        both.mkdir()
        write(job, replace(sparse, report=report), filmed(DARK, 12.0, 1), both)
        files = {name for name in ABOUT if not name.endswith("mp4")}
        assert found(both) == files - ({REPORT} if report is None else set())
    assert json.loads((both / REPORT).read_text())["preset"] == "fast"


def test_figures_are_json_that_any_reader_takes(job, tmp_path):
    """Letters as they are, no NaN, and nothing in place of a file that could not be written."""
    write(job, filmed(BRIGHT, 3.0), None, tmp_path)
    assert ASKED["prompt"] in (tmp_path / METRICS).read_text(encoding="utf-8")
    assert (tmp_path / METRICS).read_text().endswith("}\n")
    out = tmp_path / "nan"
    out.mkdir()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(job, filmed(BRIGHT, float("nan")), None, out)
    assert METRICS not in found(out)


def test_the_encoder_is_tried_and_leaves_nothing(tmp_path, monkeypatch):
    check_encoder(tmp_path)
    assert not found(tmp_path)
    for name in ("write_clip", "write_preview"):
        for error in (OSError, RuntimeError):
            with monkeypatch.context() as patch:

                def broken(path, *args, error=error):
                    raise error(f"{path}:\n  no\tspace")

                patch.setattr(results, name, broken)
                suffix = "mkv" if name == "write_clip" else "mp4"
                message = f"^no video can be written: try.{suffix}: no space; `vidsparse doctor` "
                with pytest.raises(InputError, match=message):
                    check_encoder(tmp_path)
            assert not found(tmp_path)
