"""vidsparse compare on what it must refuse, on a full disk, and broken off."""

import json

import numpy as np
import pytest
from disks import small_disk
from golden import pair, write_pair
from job_folders import frames, write_job, write_presets
from typer.testing import CliRunner

from vidsparse.cli import app
from vidsparse.compare import files
from vidsparse.compare.files import FILES
from vidsparse.compare.measure import KEPT
from vidsparse.compare.run import InputError, Listener, Request, compare
from vidsparse.quality.frames import write_clip


@pytest.fixture
def golden(tmp_path):
    return write_pair(tmp_path)


@pytest.fixture
def presets(tmp_path):
    return write_presets(tmp_path)


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_bad_input_is_one_line_and_code_2(golden, tmp_path):
    reference, test = golden
    other = write_clip(tmp_path / "other.mkv", frames(), 8)
    tiny = write_clip(tmp_path / "tiny.mkv", frames(height=10), 8)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(test.read_bytes()[:200])
    (tmp_path / "empty").mkdir()
    faster = write_clip(tmp_path / "faster.mkv", pair()[1], 16)
    np.savez(tmp_path / "deep.npz", frames=np.zeros((3, 16, 18, 3), np.uint16))
    np.savez(tmp_path / "flat.npz", frames=np.zeros(3, np.uint8))
    base = ["--ref", reference, "-o", tmp_path / "out"]
    for arguments, said in [
        ([*base, "--test", tmp_path / "nowhere"], "nowhere does not exist"),
        ([*base, "--test", other], "the reference is 120x208, the test 48x64"),
        (["--ref", tiny, "--test", tiny, "-o", tmp_path / "out"], "at least 11x11"),
        ([*base, "--test", cut], "no video that ffmpeg can read"),
        ([*base, "--test", tmp_path / "empty"], "holds no clip"),
        ([*base, "--test", test, "--metrics", "fvd"], "--metrics fvd"),
        ([*base, "--test", test, "--compat", "vbench"], "--compat vbench"),
        ([*base, "--test", test, "--workers", 0], "--workers 0"),
        ([*base, "--test", test, "--workers", 257], "--workers 257: expected an integer 1 .. 256"),
        ([*base, "--test", test, "--fps", 0], "--fps 0: expected a positive number"),
        ([*base, "--test", ""], "--test is empty"),
        ([*base, "--test", "name="], "--test is empty"),
        (["--ref", "", "--test", test, "-o", tmp_path / "out"], "--ref is empty"),
        (["--ref", reference, "--test", test, "-o", ""], "--out is empty"),
        ([*base, "--test", "/dev/null"], "/dev/null is neither a file nor a folder"),
        ([*base, "--test", faster], "the reference has 8 fps, the test 16"),
        ([*base, "--test", tmp_path / "deep.npz"], "got uint16 (3, 16, 18, 3)"),
        ([*base, "--test", tmp_path / "flat.npz"], "got uint8 (3,)"),
        ([*base, "--test", test, "--fail-under", "psnr"], "--fail-under 'psnr'"),
        ([*base, "--test", test, "--fail-under", "vmaf=9"], "--metrics vmaf"),
        ([*base, "--test", test, "--allow-mismatch", "colour"], "--allow-mismatch colour"),
        ([*base, "--test", test, "--report-mb", 0], "--report-mb 0"),
        ([*base, "--test", f"a={test}", "--test", f"a={other}"], "two arms named 'a'"),
        (["--ref", reference, "--test", test, "-o", reference], "is a file, expected a folder"),
    ]:
        done = run(*arguments)
        assert done.exit_code == 2, (arguments, done.output)
        lines = [line for line in done.stderr.splitlines() if line.startswith("vidsparse: ")]
        assert len(lines) == 1 and said in lines[0], (said, done.output)


def test_a_mismatch_of_sidecars_names_the_field(presets):
    write_job(presets / "other" / "j", "a red circle", 0, steps=99)
    done = run("--ref", presets / "balanced", "--test", presets / "other", "-o", presets / "out")
    assert done.exit_code == 2 and "steps is 99, the reference has 6" in done.output
    done = run("--ref", presets / "balanced", "--test", presets / "other", "-o", presets / "out",
               "--allow-mismatch", "steps")  # fmt: skip
    assert done.exit_code == 0, done.output
    content = json.loads((presets / "out" / "metrics.json").read_text())
    assert content["protocol"]["mismatch_allowed"] == ["steps"]
    assert content["unmatched"] == ["reference: a-blue-ring-seed1"]
    assert any("a-blue-ring-seed1" in warning for warning in content["warnings"])


def test_an_interrupt_while_writing_leaves_the_files_of_before(golden, tmp_path, monkeypatch):
    reference, test = golden
    out = tmp_path / "out"
    request = Request(reference, [("t", test)], out)
    compare(request)
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    assert set(before) == set(FILES)

    def broken(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write_page", broken)
    with pytest.raises(KeyboardInterrupt):
        compare(Request(reference, [("other", test)], out))
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    assert {p.name for p in out.iterdir() if p.is_dir()} == {KEPT}


def test_a_full_disk_leaves_nothing_half_written(golden, tmp_path):
    reference, test = golden
    with small_disk(tmp_path / "small", "64k") as disk:
        with pytest.raises(InputError, match="No space left"):
            compare(Request(reference, [("t", test)], disk / "out"))
        left = {p.name for p in (disk / "out").rglob("*") if p.is_file()}
        assert not [name for name in left if ".part" in name]
        assert "metrics.json" not in left


@pytest.mark.slow
def test_one_interrupted_clip_costs_one_clip(presets):
    """A second run measures what the first has not, and no more."""

    class Interrupted(Listener):
        seen = 0

        def pair(self, arm, clip):
            self.seen += 1
            if self.seen == 3:
                raise KeyboardInterrupt

    class Counting(Listener):
        measured = 0

        def frame(self, done):
            self.measured += 1

    tests = [(None, presets / "balanced"), (None, presets / "fast")]
    request = Request(presets / "balanced", tests, presets / "out")
    with pytest.raises(KeyboardInterrupt):
        compare(request, Interrupted())
    assert [p.name for p in (presets / "out").iterdir()] == [KEPT]
    second, third = Counting(), Counting()
    first = compare(request, second)
    assert second.measured == 2 * 12
    again = compare(request, third)
    assert third.measured == 0
    assert [row.measured.values() for row in again.rows] == [
        row.measured.values() for row in first.rows
    ]
