"""`vidsparse predict`: from a folder or the name of a published model, without weights."""

import json
import shutil
from types import SimpleNamespace

import checkpoints
import pytest
import tiny
import torch
from typer.testing import CliRunner

from vidsparse import cli
from vidsparse.costs import calibrate
from vidsparse.generate.model import find_model
from vidsparse.generate.request import Request
from vidsparse.kernels.cpu import store
from vidsparse.predict.known import known
from vidsparse.predict.subject import subject_of

WAN = "Wan-AI/Wan2.1-T2V-14B-Diffusers"


def run(*args):
    return CliRunner().invoke(cli.app, ["predict", *map(str, args)], prog_name="vidsparse")


@pytest.fixture
def folder(tmp_path):
    """A saved pipeline whose weights are gone."""
    tiny.build("wan")[0].save_pretrained(tmp_path / "tiny-wan")
    for weights in (tmp_path / "tiny-wan").rglob("*.safetensors"):
        weights.unlink()
    return tmp_path / "tiny-wan"


@pytest.fixture
def measured(monkeypatch):
    """This CPU has been measured; whatever asks for more fails."""

    def known(kind, key, measure, names):
        assert kind == "layers"
        return SimpleNamespace(figures=dict.fromkeys(names, 1e9), measured="today")

    monkeypatch.setattr(store, "recall", known)
    monkeypatch.setattr(calibrate.registry.executor("cpu").__class__, "timings", lambda *_: ())


@pytest.mark.parametrize(("gpu", "source"), [("H100", "measured"), ("A100", "assumed")])
def test_a_published_model_on_a_gpu_that_is_not_here(gpu, source):
    done = run("--model", WAN, "--gpu", gpu)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(lines)
    assert "1280x720, 81 frames, 50 steps, 75,600 tokens, bfloat16, 2 forwards" in text
    assert "published and assumed figures" in text
    said = "No kernel of vidsparse has run on such a GPU: its rate is assumed." in text
    assert said == (source == "assumed")
    assert ('set_attention_backend("_native_cudnn")' in text) == (source == "measured")
    assert any("exact tiles" in line and line.endswith(f"sparse, {source}") for line in lines)


def test_json_says_the_same():
    content = json.loads(run("--model", WAN, "--gpu", "A100", "--json").stdout)
    runs, steps = content["run_seconds"], content["step_seconds"]
    assert runs["dense"] == pytest.approx(50 * steps["dense"])
    assert content["speedup"] == pytest.approx(runs["dense"] / runs["sparse"])
    assert content["dense_steps"] == 12 and content["density"] == 0.2
    assert steps["dense"] == pytest.approx(sum(s["dense"] for s in content["stages"].values()))
    assert steps["sparse"] == pytest.approx(sum(s["sparse"] for s in content["stages"].values()))
    assert content["constants"]["sparse"]["source"] == "assumed"
    assert 0 < content["errors"]["speedup"] < content["errors"]["sparse"] < 1


def test_what_does_not_fit_and_what_is_a_guess_is_said():
    text = run("--model", WAN, "--gpu", "4090", "--preset", "topp").stdout
    assert "It does not fit as a whole" in text
    assert "The density of this method follows the data: it is a guess here." in text
    fits = run("--model", WAN, "--gpu", "H100").stdout
    assert "does not fit" not in fits and "follows the data" not in fits


def test_what_a_run_keeps_is_counted_and_too_much_is_said():
    asked = ["--model", WAN, "--gpu", "H100", "--preset", "tiles", "--set"]
    content = json.loads(run(*asked, "keep.residual=true", "--json").stdout)
    kept = 75_600 * 5120 * 2 * 40 * 2
    assert content["memory"]["sparse"]["residual"] == kept
    assert content["stages"]["residual or tail"]["sparse"] > 0
    said = "What is kept takes 61.9 GB, keep.gigabytes=8: runs refuse that; raise it."
    assert said in " ".join(run(*asked, "keep.residual=true").stdout.split())
    enough = run(*asked, "keep.residual=true", "--set", "keep.gigabytes=70").stdout
    assert "runs refuse" not in enough


def test_a_folder_without_weights_on_this_cpu(folder, measured):
    done = run("--model", folder, "--height", 64, "--width", 64, "--frames", 9, "--json")
    assert done.exit_code == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["machine"]["sources"] == ["measured", "assumed"]
    assert content["dtype"] == "float32"
    assert content["run_seconds"]["dense"] > 0


@pytest.mark.parametrize(
    "args, said",
    [
        (["--gpu", "H1000"], "--gpu H1000: expected H100, H200, A100, 4090, B200 or this"),
        (["--gpu", "H100", "--dtype", "fp32"], "the figures of GPUs are of bf16 and fp16"),
        (["--gpu", "H100", "--height", "721"], "--height 721: this model takes multiples of 16"),
        (["--gpu", "H100", "--preset", "none"], "no such preset"),
        (["--dtype", "int8"], "--dtype int8: expected one of fp32, bf16, fp16"),
        (["--steps", "0"], "--steps 0: expected 1 or more"),
    ],
)
def test_a_mistake_is_one_line(args, said):
    model = [] if "--dtype" in args and "int8" in args else ["--model", WAN]
    done = run(*model, *args)
    assert done.exit_code == 2
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_this_gpu_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run("--gpu", "this")
    assert done.exit_code == 2 and "torch sees no GPU here" in done.stderr


QUICK = ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
         "THUDM/CogVideoX-2b", "black-forest-labs/FLUX.1-dev")  # fmt: skip
"""Beside the slow ones, which build every transformer on the meta device."""


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in checkpoints.published()],
)
def test_a_card_tells_what_the_files_of_a_published_model_tell(name, tmp_path):
    """Same work, same memory, same size: from the card alone, and from all small files."""
    files = checkpoints.write(tmp_path / "model", checkpoints.published()[name])
    assert known(name) is not None
    real, card = find_model(str(files)), known(name)
    assert real.card is not None and real.card.name == card.card.name
    sizes = {"height": 480, "width": 832}  # of those that take it from an image
    sizes |= {k: v for k, v in card.defaults.items() if k in (*sizes, "frames", "steps")}
    one, other = (subject_of(model, Request(**sizes), "bf16") for model in (real, card))
    assert (one.size, one.plan.branches, one.plan.steps) == (
        other.size,
        other.plan.branches,
        other.plan.steps,
    )
    assert one.plan.forward.grid == other.plan.forward.grid
    work = [sum(linear.flops for linear in s.plan.forward.linears) for s in (one, other)]
    assert work[0] == pytest.approx(work[1], rel=0.01)
    assert one.weights == pytest.approx(other.weights, rel=0.02)


def test_another_folder_is_no_published_model(folder):
    shutil.copy(folder / "model_index.json", folder / "copy.json")
    assert known(str(folder)) is None and known(None) is None and known("owner/unknown") is None
