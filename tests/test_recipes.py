"""pipelines/compare_psnr.py and compare_vbench.py, from finished jobs to tables."""

import csv
import importlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from job_folders import write_job

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("a red circle", "a blue ring")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """compare_psnr with finished jobs, those of the first preset with dense videos."""
    monkeypatch.syspath_prepend(str(ROOT / "pipelines"))
    module = importlib.import_module("compare_psnr")
    made = {}
    for preset, noise in (("quality", 3.0), ("fast", 9.0)):
        made[preset] = []
        for n, prompt in enumerate(PROMPTS):
            folder = tmp_path / "jobs" / preset / f"j{n}"
            write_job(folder, prompt, n, preset, noise=noise, dense=preset == "quality",
                      threads=2, versions={"torch": "2.13"})  # fmt: skip
            made[preset].append(SimpleNamespace(out=folder, prompt=prompt, seed=n, fps=8.0))
    monkeypatch.setattr(module, "generate_arms", lambda options, console: made)
    return module


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["recipe", *map(str, arguments)])
    module.main()


def test_the_table_of_presets(recipe, tmp_path, monkeypatch, capsys):
    table = tmp_path / "table.csv"
    run(recipe, monkeypatch, "--out", tmp_path / "jobs", "--table", table)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["preset"], row["prompt"]) for row in rows] == [
        (preset, prompt) for preset in ("quality", "fast") for prompt in reversed(PROMPTS)
    ]
    assert {float(row["speedup"]) for row in rows} == {1.5}
    assert table.with_suffix(".png").stat().st_size > 1000
    kept = json.loads((tmp_path / "jobs" / "compare" / "metrics.json").read_text())
    for clip, row in zip(kept["clips"], rows, strict=True):
        assert float(row["psnr_pool"]) == pytest.approx(clip["psnr_pool"], abs=5e-4)
    assert "1.50x" in capsys.readouterr().out


def test_what_vbench_gets(recipe, tmp_path, monkeypatch):
    vbench = importlib.import_module("compare_vbench")
    monkeypatch.setattr(vbench, "generate_arms", recipe.generate_arms)
    run(vbench, monkeypatch, "--out", tmp_path / "jobs")
    for arm in ("quality", "fast", "dense"):
        videos = tmp_path / "jobs" / "vbench" / arm / "videos"
        assert sorted(os.listdir(videos)) == ["a blue ring-0.mp4", "a red circle-0.mp4"]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(ValueError("no such preset"), 2, "no such preset"), (KeyboardInterrupt(), 130, "goes on")],
)
def test_mistakes_and_interrupts_are_one_line(
    recipe, tmp_path, monkeypatch, capsys, error, code, said
):
    def fail(options, console):
        raise error

    monkeypatch.setattr(recipe, "generate_arms", fail)
    with pytest.raises(SystemExit) as ended:
        run(recipe, monkeypatch, "--out", tmp_path / "jobs")
    found = capsys.readouterr().err
    assert ended.value.code == code and said in found and found.count("\n") == 1
