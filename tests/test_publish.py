"""A job's folder is published whole or not at all."""

import errno
import os
import shutil
import signal
import stat
from pathlib import Path

import pytest
from disks import small_disk
from published import contents, fill, made, names

from vidsparse.jobs.layout import METRICS
from vidsparse.jobs.publish import NotPlaced, Refused, publishing


def test_a_folder_appears_whole(tmp_path):
    out = tmp_path / "a" / "b"
    with publishing(out, "1") as stage:
        assert names(stage.folder) == set() and not out.exists() and stage.note == ""
        assert stage.folder.stat().st_dev == tmp_path.stat().st_dev
        fill(stage.folder, "1")
        assert not out.exists()
    assert names(out) == {"sparse.mp4", METRICS} and names(out.parent) == {"b"}


def test_the_same_job_replaces_its_files_and_keeps_those_of_the_user(tmp_path):
    out = made(tmp_path / "out", "1", files=("sparse.mp4", "dense.mp4"))
    (out / "notes.txt").write_text("mine")
    (out / "more").mkdir()
    (out / "more" / "notes.txt").write_text("mine too")
    out.chmod(0o2775)
    with publishing(out, "1") as stage:
        assert "holds this job already" in stage.note
        fill(stage.folder, "1")
    kept = {"notes.txt": b"mine", "more/notes.txt": b"mine too", "sparse.mp4": b"new"}
    assert contents(out) == {**kept, METRICS: (out / METRICS).read_bytes()}
    assert stat.S_IMODE(out.stat().st_mode) == 0o2775 and names(tmp_path) == {"out"}


def test_files_of_the_user_stay_whatever_a_sidecar_says_of_them(tmp_path):
    """Only names that a job can write are a job's; where both have one, the new job's counts."""
    out = made(tmp_path / "out", "1", files=("sparse.mp4", "notes.txt"))
    with publishing(out, "1") as stage:
        fill(stage.folder, "1")
    assert (out / "notes.txt").read_text() == "old" and (out / "sparse.mp4").read_text() == "new"
    (out / METRICS).unlink()
    with publishing(out, "2", overwrite=True) as stage:
        fill(stage.folder, "2", "newer", ("dense.mp4", "sparse.mp4"))
    assert {name: (out / name).read_text() for name in names(out) - {METRICS}} == {
        "notes.txt": "old",
        "dense.mp4": "newer",
        "sparse.mp4": "newer",
    }


@pytest.mark.parametrize("what", ["another job", "notes.txt", "no id"])
def test_what_is_of_others_is_refused_by_name(tmp_path, what):
    out = tmp_path / "out"
    if what == "notes.txt":
        out.mkdir()
        (out / what).write_text("mine")
    else:
        made(out, "2" if what == "another job" else None)
    before = contents(out)
    said = what if what == "notes.txt" else 'another job, "of '
    with pytest.raises(Refused, match=f"{said}.*--overwrite"), publishing(out, "1"):
        raise AssertionError("refused before anything is done")
    assert contents(out) == before and names(tmp_path) == {"out"}
    with publishing(out, "1", overwrite=True) as stage:
        fill(stage.folder, "1")
    assert names(out) == {"sparse.mp4", METRICS} | {what} & {"notes.txt"}
    assert (out / "sparse.mp4").read_text() == "new" and names(tmp_path) == {"out"}


def impossible(tmp_path):
    """Targets that cannot be a job's folder: name -> (path, what is said)."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "clash" / "sparse.mp4").mkdir(parents=True)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return {
        "file": (tmp_path / "file", "no folder"),
        "below a file": (tmp_path / "file" / "out" / "deeper", "Not a directory"),
        "target is a folder": (tmp_path / "clash", "a folder is called sparse.mp4"),
        "too long": (tmp_path / ("x" * 300), "File name too long"),
        "loop": (tmp_path / "loop", "no folder"),
        "here": (Path("."), "runs in it"),
        "above": (Path(".."), "runs in it"),
        "root": (Path("/"), "mounted"),
        "proc": (Path("/proc/nowhere/out"), "cannot write"),
        "nul": (tmp_path / "a\0b", "null byte"),
    }


IMPOSSIBLE = (
    *("file", "below a file", "target is a folder", "too long", "loop"),
    *("here", "above", "root", "proc", "nul"),
)


@pytest.mark.parametrize("case", IMPOSSIBLE)
@pytest.mark.parametrize("overwrite", [False, True])
def test_targets_are_checked_before_anything_is_done(tmp_path, monkeypatch, case, overwrite):
    here = tmp_path / "work" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    out, said = impossible(tmp_path)[case]
    before = contents(tmp_path), names(tmp_path)
    with pytest.raises(Refused, match=said), publishing(out, "1", overwrite=overwrite):
        raise AssertionError("refused before anything is done")
    assert (contents(tmp_path), names(tmp_path)) == before


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data" / "out")
    with publishing(tmp_path / "link", "1") as stage:
        fill(stage.folder, "1")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "data" / "out")
    assert names(tmp_path) == {"data", "link"} and names(tmp_path / "data") == {"out"}


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [False, True], ids=["new", "same job"])
def test_a_failure_leaves_everything_as_it_was(tmp_path, failure, old):
    out = made(tmp_path / "a" / "out", "1") if old else tmp_path / "a" / "out"
    before = contents(tmp_path)
    with pytest.raises(failure), publishing(out, "1") as stage:
        fill(stage.folder, "1")
        raise failure
    assert contents(tmp_path) == before and names(tmp_path) == ({"a"} if old else set())


@pytest.mark.parametrize("old", [False, True], ids=["new", "same job"])
def test_a_complete_folder_that_cannot_take_its_place_is_kept(tmp_path, monkeypatch, old):
    out = made(tmp_path / "out", "1") if old else tmp_path / "out"
    before = contents(tmp_path)
    rename = os.rename

    def refused(source, target):
        if Path(source).name == "new" and Path(target) == out:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    raised = pytest.raises(NotPlaced, match="Input/output error")
    with raised as failure, publishing(out, "1") as stage:
        fill(stage.folder, "1")
        monkeypatch.setattr(os, "rename", refused)
    kept = tmp_path / "out-part1"
    assert str(kept) in str(failure.value) and (kept / "sparse.mp4").read_text() == "new"
    shutil.rmtree(kept)
    assert contents(tmp_path) == before and names(tmp_path) == ({"out"} if old else set())


def test_somebody_who_came_in_between_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    for kept in ("out-part1", "out-part2"):
        with pytest.raises(NotPlaced, match=kept), publishing(out, "1") as stage:
            fill(stage.folder, "1", kept)
            made(out, "2", "theirs")
        assert (out / "sparse.mp4").read_text() == "theirs"
        shutil.rmtree(out)
    assert names(tmp_path) == {"out-part1", "out-part2"}
    assert all((tmp_path / n / "sparse.mp4").read_text() == n for n in names(tmp_path))


def test_a_signal_waits_for_a_point_where_it_does_no_harm(tmp_path):
    reached = []
    with pytest.raises(KeyboardInterrupt), publishing(tmp_path / "out", "1") as stage:
        os.kill(os.getpid(), signal.SIGINT)
        fill(stage.folder, "1")
        reached.append("all of it")
    assert reached and names(tmp_path) == set()


def test_a_mounted_folder_is_refused_with_the_cure(tmp_path):
    with small_disk(tmp_path / "small disk") as disk:
        with pytest.raises(Refused, match="name a folder below it"), publishing(disk, "1"):
            raise AssertionError("renaming it would fail at the end")
        assert names(disk) == set()
        with publishing(disk / "out", "1") as stage:
            fill(stage.folder, "1")
        assert names(disk) == {"out"}
