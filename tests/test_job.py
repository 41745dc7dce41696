"""Values of a request that are no values: each is one line that names the option."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from vidsparse import cli
from vidsparse.generate.job import prepare
from vidsparse.generate.model_files import InputError
from vidsparse.generate.request import Request

NOT_A_VALUE = {
    "model": ["", " \t", 3],
    "prompt": ["", "\n", 3, "\udcff"],
    "negative_prompt": [3, "\udcff"],
    "preset": ["", " ", 3],
    "out": ["", " ", 3],
    "dtype": ["", "bfloat16", 3],
    "device": [
        "",
        "mps",
        "meta",
        "cuda:99",
        "cuda:01",
        "cuda:-1",
        "cuda:\u0663",
        "cuda:" + "9" * 40,
        3,
    ],
    "height": [0, -16, 1.5, "64", True, 2**63, 10**40, float("nan")],
    "width": [0, -16, 1.5, "64", True, 2**63, 10**40],
    "frames": [0, -1, 1.5, "5", True, 2**63, 10**40],
    "steps": [0, -1, 1.5, "5", True, 2**63, 99999999999],
    "seed": [-1, 2**63, 1.5, "5", True, None],
    "guidance": [-1, 1e308, float("nan"), float("inf"), "5", True],
}
CASES = [(name, value) for name, values in NOT_A_VALUE.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda item: str(item)[:12])
def test_what_is_no_value_is_refused_by_name(name, value):
    with pytest.raises(InputError) as caught:
        prepare(Request(**{name: value}))
    text = str(caught.value)
    assert f"--{name.replace('_', '-')} " in text and "\n" not in text


def test_numbers_of_numpy_and_paths_are_values(tmp_path):
    job = prepare(Request(height=np.int64(64), seed=np.int32(1), out=tmp_path / "a"))
    assert (job.call["height"], job.seed, job.out) == (64, 1, tmp_path / "a")


def test_home_is_expanded_in_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prepare(Request(out="~/a")).out == tmp_path / "a"
    assert prepare(Request(out=Path("~/a"))).out == tmp_path / "a"


@pytest.mark.parametrize("option", ["--out", "--model", "--prompt", "--device", "--dtype"])
def test_an_empty_option_is_one_line_and_code_2(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["generate", option, ""], prog_name="vidsparse")
    assert result.exit_code == 2 and option in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_an_unsupported_model_is_named_before_a_prompt_is_asked_for(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "LattePipeline"}')
    with pytest.raises(InputError, match="LattePipeline is not supported"):
        prepare(Request(model=str(tmp_path)))
