"""The command line: what it says, on which stream, and how it ends."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from typer.testing import CliRunner

from vidsparse import cli
from vidsparse.generate import run as runs
from vidsparse.jobs.layout import ABOUT, METRICS, STILLS

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"height": 64, "width": 48, "frames": 5, "steps": 3}
SPARSE = (
    "schedule.min_tokens=0",
    "schedule.dense_layers=[]",
    "compensation.name=none",
    "kernel.block_q=16",
    "kernel.block_k=16",
)
"""Few tokens, and a method that is sparse on them."""


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


def run(*args):
    """`vidsparse args`."""
    return CliRunner().invoke(cli.app, [*map(str, args)], prog_name="vidsparse")


def generate(model, out, *args, **options):
    """`vidsparse generate` at a small size; SPARSE makes so few tokens sparse."""
    settings = [item for key in SPARSE for item in ("--set", key)]
    options = {"prompt": "a monkey dances", **SMALL, **options}
    flags = [f"--{name}={value}" for name, value in options.items()]
    return run("generate", "--model", model, "--out", out, *settings, *flags, *args)


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_generate_prints_one_json_document_and_writes_the_files(model, tmp_path):
    out = tmp_path / "out"
    result = generate(model, out, "--compare-dense", "--json", seed=3)
    assert result.exit_code == 0, result.stderr
    assert names(out) == set(ABOUT) - STILLS
    printed = json.loads(result.stdout)
    assert Path(printed.pop("out")) == out
    assert printed == json.loads((out / METRICS).read_text())
    assert printed["seed"] == 3 and printed["steps"] == 3
    assert "Traceback" not in result.stderr
    for said in ("loading tiny-wan", "dense: 3/3 steps", "sparse: 3/3 steps", "PSNR", "as fast"):
        assert said in result.stderr


def test_generate_without_json_prints_nothing_on_stdout(model, tmp_path):
    words = ("--set", "schedule.density=1", "--prompt", "a purple monkey")
    result = generate(model, tmp_path / "out", *words, steps=1)
    assert result.exit_code == 0 and result.stdout == ""
    assert (
        "nothing was sparse" in result.stderr and "never learnt the words: purple" in result.stderr
    )


def test_interrupted_command_ends_with_130(model, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "render", interrupted)
    result = generate(model, tmp_path / "out", "--json")
    assert result.exit_code == 130 and result.stdout == ""
    assert "interrupted" in result.stderr and "Traceback" not in result.stderr
    assert names(tmp_path) == set()


def test_defects_keep_their_traceback(model, tmp_path, monkeypatch):
    def broken(*args):
        raise ValueError("a defect of ours")

    monkeypatch.setattr(runs, "write", broken)
    (tmp_path / "room").mkdir()
    monkeypatch.setattr("vidsparse.generate.rescue.places", lambda: [tmp_path / "room"])
    result = generate(model, tmp_path / "out", steps=1)
    assert isinstance(result.exception, ValueError) and result.exit_code == 1
    assert names(tmp_path) == {"room"}, "and the video is kept"


def test_what_others_wrote_reaches_the_terminal_as_text(model, tmp_path):
    prompt = "a \x1b[31mred\x07 circle\r\n\u202emoves \x9b2J" + "left " * 20_000
    result = generate(model, tmp_path / "out", "--json", prompt=prompt, steps=1)
    assert result.exit_code == 0, result.stderr
    assert set(result.stderr) & set("\x1b\x07\r\x9b\u202e") == set()
    assert r"a \x1b[31mred\x07 circle\r\n" in result.stderr
    assert len(result.stderr) < 5000 and " characters ... " in result.stderr, "what is left out"
    assert json.loads(result.stdout)["prompt"] == prompt
    assert json.loads((tmp_path / "out" / METRICS).read_text())["prompt"] == prompt
    refused = generate(model, tmp_path / "out2", "--preset", "\x1b[2J" + "x" * 100_000)
    assert refused.exit_code == 2 and "\x1b" not in refused.stderr
    assert len(refused.stderr) < 2000 and len(refused.stderr.splitlines()) == 1


def test_a_folder_of_another_job_is_not_overwritten(model, tmp_path):
    out = tmp_path / "out"
    assert generate(model, out, steps=1).exit_code == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    result = generate(model, out, steps=2)
    assert result.exit_code == 2 and "--overwrite" in result.stderr
    assert len(result.stderr.splitlines()) == 1, "before anything is loaded"
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    again = generate(model, out, steps=1)
    assert again.exit_code == 0 and "holds this job already" in again.stderr
    assert generate(model, out, "--overwrite", steps=2).exit_code == 0
    assert json.loads((out / METRICS).read_text())["steps"] == 2
    assert names(tmp_path) == {"out"}


@pytest.fixture(scope="module")
def broken(model):
    """Folders beside `model` that look like models and are none: name -> path."""
    made = {name: model.parent / name for name in ("empty", "index", "latte", "image", "weights")}
    for path in made.values():
        path.mkdir()
    (made["index"] / "model_index.json").write_text("{")
    part = ["diffusers", "LatteTransformer3DModel"]
    index = {"_class_name": "LattePipeline", "transformer": part}
    (made["latte"] / "model_index.json").write_text(json.dumps(index))
    part = ["diffusers", "WanTransformer3DModel"]
    index = {"_class_name": "WanImageToVideoPipeline", "transformer": part}
    (made["image"] / "model_index.json").write_text(json.dumps(index))
    shutil.copytree(model, made["weights"], dirs_exist_ok=True)
    weights = next((made["weights"] / "transformer").glob("*.safetensors"))
    weights.write_text("version https://git-lfs.github.com/spec/v1")
    return made


BLOCK_TAYLOR = ["--set", "compensation.name=taylor", "--set", "compensation.scope=block"]
USAGE = {
    "unknown option": (["--stepz", "3"], "--steps"),
    "no number": (["--steps", "few"], "--steps"),
    "unknown preset": (["--preset", "fastest"], "balanced"),
    "preset file": (["--preset", "nowhere.yaml"], "nowhere.yaml"),
    "unknown method": (["--set", "selector.name=magic"], "topk"),
    "unknown key": (["--set", "schedule.densty=0.2"], "dense_steps"),
    "set without value": (["--set", "schedule"], "section.key=value"),
    "density": (["--set", "schedule.density=1.5"], "(0, 1]"),
    "layer": (["--set", "schedule.dense_layers=[7]"], "2 layers"),
    "steps": (["--steps", "0"], "1 or more"),
    "guidance": (["--guidance", "nan"], "nan"),
    "seed": (["--seed", "-1"], "0 .. 2^63"),
    "dtype": (["--dtype", "fp8"], "fp32, bf16, fp16"),
    "device": (["--device", "tpu"], "cuda:N"),
    "engine": (["--set", "kernel.impl=triton"], "impl 'triton' on cpu: "),
    "8-bit": (["--set", "kernel.qk=int8"], "kernel.qk='int8': impl 'cpu'"),
    "taylor": (BLOCK_TAYLOR, "impl='reference'"),
    "height": (["--height", "100"], "near it: 96, 112"),
    "width": (["--width", "8"], "near it: 16"),
    "frames": (["--frames", "20"], "near it: 17, 21"),
    "too long": (["--frames", "1001"], "at most"),
    "no folder": (["--model", "nowhere"], "no such folder"),
    "path": (["--model", "./no/where"], "no such folder"),
    "hub": (["--model", "nobody/nothing"], "hub cannot be reached"),
}
MODELS = {
    "empty": "save_pretrained",
    "index": "not valid JSON",
    "latte": "LattePipeline is not supported; `vidsparse models` lists",
    "image": "transformer/config.json is missing",
    "weights": "cannot be loaded",
}


def assert_refused(result, said, folder):
    assert result.exit_code == 2, (result.exception, result.output)
    lines = [line for line in result.stderr.splitlines() if line.startswith("vidsparse: ")]
    assert len(lines) == 1 and result.stderr.endswith(lines[0] + "\n")
    assert said in lines[0]
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert names(folder) == set()


@pytest.mark.parametrize("case", USAGE)
def test_mistake_is_one_line_and_code_2(model, tmp_path, case, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of the hub's client, between tries
    args, said = USAGE[case]
    result = generate(model, tmp_path / "out", "--json", *args)
    assert_refused(result, said, tmp_path)
    quiet = case not in ("hub", "layer")  # these say first what they are doing
    assert len(result.stderr.splitlines()) == 1 or not quiet


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there(model, tmp_path):
    assert_refused(generate(model, tmp_path / "out", device="cuda"), "no GPU", tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_model_that_is_none(broken, tmp_path, name):
    assert_refused(generate(broken[name], tmp_path / "out"), MODELS[name], tmp_path)


def test_missing_prompt(model, tmp_path):
    sizes = [f"--{name}={value}" for name, value in SMALL.items()]
    result = run("generate", "--model", model, "--out", tmp_path / "out", *sizes)
    assert_refused(result, "--prompt is missing", tmp_path)


def test_unwritable_out(model, tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    result = generate(model, file / "out" / "deeper")
    assert result.exit_code == 2 and "cannot write there" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert names(tmp_path) == {"file"}


def test_presets():
    result = run("presets", "--json")
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert rows["balanced"]["density"] == 0.2 and all(row["about"] for row in rows.values())
    lines = run("presets").stdout.splitlines()
    assert len(lines) == len(rows) and all(
        name in line for name, line in zip(rows, lines, strict=True)
    )


def test_doctor():
    result = run("doctor", "--json")
    facts = json.loads(result.stdout)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["dense_backends"]["math"] is True and facts["ffmpeg"]
    assert facts["executors"]["cpu"]["figures"]["fp32"] in ("onednn", "native")
    assert all(set(item) == {"what", "costs", "cure"} for item in facts["missing"])
    text = run("doctor").stdout
    assert "dense backends" in text and facts["cpu"]["name"] in text


def test_help_and_version():
    assert run("--version").stdout.startswith("vidsparse ")
    bare, asked = run(), run("--help")
    assert bare.exit_code == asked.exit_code == 0
    assert "generate" in bare.stdout and "doctor" in asked.stdout
    assert run("generate", "--help").exit_code == 0


LIGHT = """
import sys, time
start = time.perf_counter()
from typer.testing import CliRunner
from vidsparse.cli import app
for args in ([], ["generate", "--help"], ["presets"]):
    assert CliRunner().invoke(app, args).exit_code == 0
print(sorted({"torch", "diffusers", "transformers", "numpy"} & set(sys.modules)))
"""


def test_help_and_presets_import_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
