"""vidsparse compare from the outside: files, exit codes, what is kept, what is refused."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from golden import pair, write_pair
from job_folders import frames, write_job, write_presets
from typer.testing import CliRunner

from vidsparse.cli import app
from vidsparse.compare import filters, floor, measure
from vidsparse.compare.files import FILES
from vidsparse.compare.measure import KEPT, Settings
from vidsparse.compare.run import Request, compare
from vidsparse.quality.frames import open_clip, write_clip, write_png, write_preview
from vidsparse.quality.metrics import compare_clips

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def golden(tmp_path):
    return write_pair(tmp_path)


@pytest.fixture
def presets(tmp_path):
    return write_presets(tmp_path)


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_golden_pair(golden, tmp_path):
    reference, test = golden
    done = run("--ref", reference, "--test", test, "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    (clip,) = content["clips"]
    assert clip["psnr_pool"] == pytest.approx(32.526258, abs=5e-7)
    assert clip["ssim"] == pytest.approx(0.8403302985, abs=5e-11)
    assert clip["ssim_y"] == pytest.approx(0.9155365858, abs=5e-11)
    assert clip["psnr_y"] == pytest.approx(35.988420, abs=5e-7)
    assert clip["tf_ref"] == pytest.approx(0.9590557890, abs=5e-11)
    assert (clip["lossy"], clip["speedup"], clip["n_frames"]) == (False, None, 8)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == content
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*FILES, KEPT}
    frames_csv = rows(tmp_path / "out" / "frames.csv")
    assert [int(row["t"]) for row in frames_csv] == list(range(8))
    mse = [float(row["mse"]) for row in frames_csv]
    assert 10 * math.log10(255**2 / np.mean(mse)) == pytest.approx(clip["psnr_pool"], abs=1e-12)


def test_many_clips_and_arms(presets):
    out = presets / "out"
    done = run("--ref", presets / "balanced", "--test", presets / "balanced",
               "--test", f"nine={presets / 'fast'}", "-o", out)  # fmt: skip
    assert done.exit_code == 0, done.output
    arms = {row["arm"]: row for row in rows(out / "pareto.csv")}
    assert list(arms) == ["balanced", "nine"]
    for name, noise, density in (("balanced", 4.0, 0.215), ("nine", 9.0, 0.1)):
        direct = [
            compare_clips(frames(seed), frames(seed, noise=noise)).psnr_pool for seed in (0, 1)
        ]
        assert float(arms[name]["psnr_pool"]) == pytest.approx(np.mean(direct), abs=1e-9)
        assert float(arms[name]["psnr_pool_worst"]) == pytest.approx(min(direct), abs=1e-9)
        assert float(arms[name]["speedup"]) == pytest.approx(1.5)
        assert float(arms[name]["density"]) == pytest.approx(density)
    assert (arms["balanced"]["on_front"], arms["nine"]["on_front"]) == ("True", "False")
    content = json.loads((out / "metrics.json").read_text())
    assert [(p["a"], p["b"], p["wins"], p["low"]) for p in content["pairs"]] == [
        ("balanced", "nine", 2, None)
    ] * 2
    summary = (out / "summary.md").read_text()
    assert "| nine | 2 | 1.50x |" in summary


def test_thresholds_decide_the_exit_code(golden, tmp_path):
    """Measured once: the later commands take what is in the folder."""
    reference, test = golden
    base = ["--ref", reference, "--test", test, "-o", tmp_path / "out", "--fail-under"]
    for limits, code in (
        ("psnr=30,ssim=.8", 0),
        ("psnr=32.53", 1),
        ("psnr.worst=32.52", 0),
        ("ssim=.85", 1),
        ("tf_drop=.001", 1),
        ("tf_drop=.01", 0),
    ):
        done = run(*base, limits)
        assert done.exit_code == code, (limits, done.output)
        missed = json.loads((tmp_path / "out" / "metrics.json").read_text())["missed"]
        assert bool(missed) == bool(code), limits


def test_lossy_files_are_stamped_and_not_judged(golden, tmp_path):
    reference, _ = golden
    write_preview(tmp_path / "lossy.mp4", pair()[1], 8)
    arguments = ["--ref", reference, "--test", tmp_path / "lossy.mp4", "-o", tmp_path / "out"]
    done = run(*arguments, "--fail-under", "psnr=20")
    assert (
        done.exit_code == 2
        and "lossy.mp4 is lossy" in done.output
        and "--allow-lossy" in done.output
    )
    done = run(*arguments, "--fail-under", "psnr=20", "--allow-lossy")
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    (clip,) = content["clips"]
    assert clip["lossy"] and content["protocol"]["lossy_input"]
    assert clip["codec_floor"] == "guessed, optimistic" and 25 < clip["codec_floor_db"] < 60
    assert "its codec alone costs" in content["warnings"][0]
    assert not content["arms"][0]["on_front"] and content["pairs"] == []


def test_codec_floor_is_exact_where_the_original_is_at_hand(tmp_path):
    """Of files of a job that are named one by one; their sidecar counts too."""
    job = write_job(tmp_path / "job", preview=True, size=(6, 64, 80))
    clip, preview = open_clip(job / "sparse.mkv"), open_clip(job / "sparse.mp4")
    expected = compare_clips(clip, preview).psnr_pool
    assert floor.exact(clip, preview).psnr == pytest.approx(expected, abs=1e-9)
    done = run("--ref", job / "dense.mkv", "--test", preview.path, "-o", tmp_path / "out", "--json")
    (row,) = json.loads(done.stdout)["clips"]
    assert (row["codec_floor"], row["speedup"]) == ("exact", pytest.approx(1.5))
    assert row["codec_floor_db"] == pytest.approx(expected, abs=1e-9)
    write_preview(preview.path, clip, 8, scale=2)
    assert floor.exact(clip, open_clip(preview.path)) is None


def test_what_was_measured_of_other_clips_or_otherwise_is_not_taken(golden, tmp_path):
    reference, test = golden
    out = tmp_path / "out"

    def psnr(**settings):
        request = Request(reference, [("t", test)], out, settings=Settings(**settings))
        return compare(request).rows[0].measured

    before = psnr().metrics.psnr_pool
    write_clip(test, pair()[0], 8)
    assert psnr().metrics.psnr_pool == math.inf != before
    assert set(psnr(compat=("svg",)).compat) == {"svg"}
    for file in (out / KEPT).iterdir():
        file.write_text("{")
    assert psnr().metrics.psnr_pool == math.inf


def test_vmaf_and_xpsnr(golden, tmp_path):
    for name in ("vmaf", "xpsnr"):
        if why := filters.lacking(name):
            pytest.skip(why)
    reference, test = golden
    np.savez(tmp_path / "same.npz", frames=pair()[0], fps=8.0)
    (tmp_path / "pngs").mkdir()
    for n, frame in enumerate(pair()[1]):
        write_png(tmp_path / "pngs" / f"{n}.png", frame)
    tests = [f"--test={path}" for path in (test, tmp_path / "same.npz", tmp_path / "pngs")]
    measures = ["--metrics", "psnr,vmaf,xpsnr"]
    done = run("--ref", reference, *tests, *measures, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    noisy, same, pngs = json.loads((tmp_path / "out" / "metrics.json").read_text())["clips"]
    assert same["vmaf"] > 99 and same["xpsnr"] == 100 and same["psnr_pool"] is None
    assert 80 < noisy["vmaf"] < 99 and 30 < noisy["xpsnr"] < 40
    assert pngs["vmaf"] == noisy["vmaf"] and pngs["psnr_pool"] == noisy["psnr_pool"]
    columns = rows(tmp_path / "out" / "frames.csv")[0]
    assert {"vmaf", "xpsnr"} <= set(columns)


def test_what_is_missing_is_a_column_with_the_reason(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_lacking", lambda name: f"no {name} today")
    reference, test = golden
    done = run("--ref", reference, "--test", test, "--metrics", "lpips", "-o", tmp_path / "out")
    assert done.exit_code == 0 and "lpips was not measured: no lpips today" in done.output
    (clip,) = rows(tmp_path / "out" / "clips.csv")
    assert clip["lpips"] == "" and clip["not_measured"] == "lpips: no lpips today"
    limited = run("--ref", reference, "--test", test, "--metrics", "lpips", "-o", tmp_path / "out",
                  "--fail-under", "lpips=.1")  # fmt: skip
    assert limited.exit_code == 1 and "lpips <= 0.1: not measured" in limited.output


def test_trim(tmp_path):
    write_clip(tmp_path / "long.mkv", frames(count=9), 8)
    write_clip(tmp_path / "short.mkv", frames(count=6, noise=3), 8)
    arguments = [
        "--ref",
        tmp_path / "long.mkv",
        "--test",
        tmp_path / "short.mkv",
        "-o",
        tmp_path / "o",
    ]
    done = run(*arguments)
    assert done.exit_code == 2 and "the reference has 9 frames, the test has 6" in done.output
    assert run(*arguments, "--trim").exit_code == 0
    content = json.loads((tmp_path / "o" / "metrics.json").read_text())
    direct = compare_clips(frames(count=9)[:6], frames(count=6, noise=3))
    assert content["clips"][0]["psnr_pool"] == pytest.approx(direct.psnr_pool, abs=1e-12)
    assert content["protocol"]["frames"] == "all of the shorter clip"


def test_fps_may_be_said(golden, tmp_path):
    reference, test = golden
    faster = write_clip(tmp_path / "faster.mkv", pair()[1], 16)
    found = []
    for path, fps in ((test, 8), (faster, 4)):
        out = tmp_path / str(fps)
        done = run("--ref", reference, "--test", path, "-o", out, "--fps", fps)
        assert done.exit_code == 0, done.output
        (clip,) = json.loads((out / "metrics.json").read_text())["clips"]
        found.append(clip)
    assert [clip["fps"] for clip in found] == [8, 4]
    assert found[0]["psnr_slope"] == pytest.approx(2 * found[1]["psnr_slope"])


def test_names_of_paths_with_an_equals_sign(tmp_path):
    path = tmp_path / "guidance=4"
    write_job(path)
    done = run("--ref", path, "--test", path, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_module_command(golden, tmp_path):
    reference, test = golden
    command = [sys.executable, "-m", "vidsparse", "compare", "--ref", reference, "--test", test]
    done = subprocess.run(
        [*map(str, command), "-o", str(tmp_path / "out"), "--compat", "svg,skimage"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for figure in ("0.9133", "0.8610"):
        assert figure in done.stderr
