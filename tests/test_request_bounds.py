"""The edges of what a request may say, and what fills the gaps that it leaves."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from vidsparse.generate.job import prepare
from vidsparse.generate.model_files import InputError
from vidsparse.generate.request import Request
from vidsparse.kernels.gpu import support

BIGGEST = 2**63 - 1
SMALL = {"height": 64, "width": 48, "frames": 5, "steps": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-wan"
    tiny.build("wan")[0].save_pretrained(path)
    return path


@pytest.fixture
def job(model):
    """Prepares a request; what it leaves out is small."""

    def make(**options):
        return prepare(Request(str(model), **{"prompt": "a monkey", **SMALL, **options}))

    return make


@pytest.fixture
def gpus(monkeypatch):
    """A machine with so many GPUs, as far as a job's preparation looks."""

    def found(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        properties = SimpleNamespace(name="A GPU", total_memory=8e10, major=9, minor=0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda name: properties)
        monkeypatch.setattr(support, "refusal", lambda device: None)

    return found


EDGES = {
    "seed": ([0, 1, BIGGEST], [-1, BIGGEST + 1, 2**64]),
    "steps": ([1, 2, 1000], [0, -1, 1001, 99999999999]),
    "guidance": ([0.0, 1.0, 7.5, 100.0], [-1e-9, 100.1, 1e308, math.inf, -math.inf, math.nan]),
    "frames": ([1, 5], [0, -3, 4, 6]),
    "height": ([16, 32], [0, -16, 15, 17]),
    "width": ([16, 32], [0, -16, 15, 17]),
    "dtype": (["fp32", "bf16", "fp16"], ["", "float32", "FP32", "fp64"]),
}


@pytest.mark.parametrize("name", EDGES)
def test_values_at_the_edge_are_taken_and_those_beyond_it_refused_by_name(job, name):
    taken, refused = EDGES[name]
    for value in taken:
        made = job(**{name: value})
        said = {"seed": made.seed, "dtype": made.dtype}
        theirs = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
        said |= {key: made.call[theirs.get(key, key)] for key in (*theirs, "height", "width")}
        said["frames"] = made.call["num_frames"]
        assert said[name] == value
    for value in refused:
        with pytest.raises(InputError, match="^" + re.escape(f"--{name} {value}: ")) as error:
            job(**{name: value})
        assert "\n" not in str(error.value)


def test_every_seed_that_is_taken_makes_noise(job):
    """torch is the judge of the bound; with a smaller one these would be refused."""
    for seed in (0, 2**32, BIGGEST):
        generator = torch.Generator("cpu").manual_seed(job(seed=seed).seed)
        assert torch.randn(2, generator=generator).isfinite().all()
        assert generator.initial_seed() == seed


def test_a_device_is_one_that_this_machine_has(job, gpus):
    gpus(2)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert job(device=name).device == name
    for name in ("cuda:2", "cuda:10"):
        with pytest.raises(InputError, match=f"--device {name}: .* sees 2 GPU"):
            job(device=name)
    gpus(0)
    assert job(device="cpu").device == "cpu"
    for name in ("cuda", "cuda:0"):
        with pytest.raises(InputError, match=f"--device {name}: .* sees no GPU"):
            job(device=name)
    for name in ("", "cuda:", "cuda:x", "cpu:0", "gpu", "cuda:0 ", "xcpu"):
        with pytest.raises(InputError, match="expected cpu, cuda or cuda:N"):
            job(device=name)


def test_device_and_dtype_that_are_left_open(job, gpus):
    gpus(1)
    assert (job().device, job().dtype) == ("cuda", "bf16")
    assert (job(device="cpu").dtype, job(dtype="fp32").dtype) == ("fp32", "fp32")
    gpus(0)
    assert (job().device, job().dtype) == ("cpu", "fp32")
    assert job(dtype="bf16").dtype == "bf16"


def test_a_model_that_nobody_knows_gets_the_defaults_of_its_pipeline(model, job):
    from inspect import signature

    from diffusers import WanPipeline

    stock = {name: p.default for name, p in signature(WanPipeline.__call__).parameters.items()}
    call = prepare(Request(str(model), prompt="x", height=64, width=48, frames=5)).call
    for name in ("num_inference_steps", "guidance_scale"):
        assert call[name] == stock[name]
    assert job().fps == 16
    assert job().tokens == (64 // 16) * (48 // 16) * 2
    assert job().call["prompt"] == job().prompt == "a monkey"


@pytest.mark.parametrize("prompt", ["", " ", "\n\t"])
def test_an_empty_prompt_is_refused_and_never_replaced_by_one_of_the_model(prompt):
    with pytest.raises(InputError, match="--prompt"):
        prepare(Request(prompt=prompt))  # of the demo model, which has a list


def test_what_was_asked_for_reaches_the_job(job):
    made = job(
        preset="fast",
        overrides=("schedule.density=0.5",),
        compare_dense=True,
        out=Path("here"),
        negative_prompt="blurred",
    )
    assert (made.preset, made.overrides) == ("fast", ("schedule.density=0.5",))
    assert made.config.schedule.density == 0.5 and made.out == Path("here")
    assert made.compare_dense is True and job().compare_dense is False
    assert made.call["negative_prompt"] == "blurred" and job().seed == 0


def test_one_string_is_one_override_and_what_is_no_text_is_refused(job):
    one = "schedule.density=0.5"
    for given in (one, [one], iter([one])):
        made = job(overrides=given)
        assert made.overrides == (one,) and made.config.schedule.density == 0.5
    assert job(overrides=None).overrides == ()
    for bad in (3, [3], {"schedule.density": 0.5}, b"x"):
        with pytest.raises(InputError, match=r"^overrides? .*expected"):
            job(overrides=bad)


def test_the_method_is_checked_for_the_dtype_and_the_heads_of_the_model(
    job, gpus, model, tmp_path, monkeypatch
):
    gpus(1)
    monkeypatch.setattr(support, "capability", lambda device: (9, 0))
    tma = ["kernel.form=tma", "kernel.block_q=128"]
    assert job(device="cuda", dtype="bf16", overrides=tma).config.kernel.form == "tma"
    with pytest.raises(InputError, match=r"form 'tma'.*float32|float32.*form 'tma'"):
        job(device="cuda", dtype="fp32", overrides=tma)
    wide = tmp_path / "wide"
    shutil.copytree(model, wide)
    file = wide / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attention_head_dim": 1024}))
    with pytest.raises(InputError, match="head dim 1024: the Triton engine executes 1"):
        prepare(Request(str(wide), prompt="x", device="cuda", overrides="kernel.impl=triton"))
