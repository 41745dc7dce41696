"""What metrics.json says of a run: its gains, its densities, and what it takes to repeat it."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from vidsparse.generate.job import prepare
from vidsparse.generate.request import Request
from vidsparse.generate.results import BANNER, GAP, PAPER, Arm, conditions, metrics, side_by_side
from vidsparse.pipelines.report import Call, RunReport

SHAPE = (5, 64, 48, 3)
ASKED = {
    "prompt": "a monkey dances",
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
    dense, sparse = arm(12.0, 20.0, 18.0, (5.0, 1.0, 6.0)), arm(3.0, 8.0, 6.0, (0.5, 2.0, 1.0))
    found = metrics(job, sparse, dense)
    assert found["speedup"] == {"denoise": 4.0, "median_step": 5.0, "cpu": 2.5, "total": 3.0}
    assert found["arms"]["dense"] == {
        "denoise_seconds": 12.0,
        "cpu_seconds": 20.0,
        "total_seconds": 18.0,
        "median_step_seconds": 5.0,
        "step_seconds": [5.0, 1.0, 6.0],
        "step_density": [1.0, 0.3, 0.2],
    }
    assert found["arms"]["sparse"]["median_step_seconds"] == 1.0
    alone = metrics(job, sparse, None)
    assert alone["speedup"] is alone["arms"]["dense"] is None
    assert alone["arms"]["sparse"] == found["arms"]["sparse"]


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


def test_a_run_can_be_asked_for_again_from_what_its_sidecar_says(model, job):
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
