"""A job's folder is published whole or not at all, and repaired after a kill."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from disks import small_disk

from vidsparse.jobs import workplace
from vidsparse.jobs.layout import METRICS, SCHEMA
from vidsparse.jobs.publish import NotPlaced, Refused, publishing

ROOT = Path(__file__).resolve().parent.parent


def names(folder):
    return {path.name for path in folder.iterdir()}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fill(folder, id, text="new", files=("sparse.mp4",)):
    """What a job writes."""
    for name in files:
        (folder / name).write_text(text)
    sidecar = {"schema": SCHEMA, "id": id, "files": [*files, METRICS], "prompt": f"of {id}"}
    (folder / METRICS).write_text(json.dumps(sidecar))


def made(folder, id, text="old", files=("sparse.mp4",)):
    folder.mkdir(parents=True)
    fill(folder, id, text, files)
    return folder


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
    with pytest.raises(NotPlaced, match="out-part1"), publishing(out, "1") as stage:
        fill(stage.folder, "1")
        made(out, "2", "theirs")
    assert (out / "sparse.mp4").read_text() == "theirs"
    assert (tmp_path / "out-part1" / "sparse.mp4").read_text() == "new"
    assert names(tmp_path) == {"out", "out-part1"}


CHILD = """
import json, os, sys, time
from pathlib import Path
from vidsparse.jobs import publish
out, stop = Path(sys.argv[1]), sys.argv[2]
rename = os.rename
def stopping(source, target):
    rename(source, target)
    if stop == Path(target).name:
        print("there", flush=True)
        time.sleep(60)
os.rename = stopping
with publish.publishing(out, "1") as stage:
    if stop == "filling":
        (stage.folder / "sparse.mp4").write_text("half")
        print("there", flush=True)
        time.sleep(60)
    (stage.folder / "sparse.mp4").write_text("new")
    sidecar = {"schema": "vidsparse.generate/1", "id": "1", "files": ["sparse.mp4"]}
    (stage.folder / "metrics.json").write_text(json.dumps(sidecar))
"""


def child(out, stop):
    """A process that publishes to `out` and stands still at a point of it."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out), stop], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "there\n"
    return process


KILLED = {"filling": "old", "old": "new", "out": "new"}
"""Where a process is killed: while filling, after the first rename, after the second -> outcome."""


@pytest.mark.parametrize("stop", KILLED)
@pytest.mark.parametrize("next_one", ["same target", "another target"])
def test_the_next_run_repairs_what_a_killed_one_left(tmp_path, stop, next_one):
    out = made(tmp_path / "out", "1")
    (out / "notes.txt").write_text("mine")
    process = child(out, stop)
    with pytest.raises(Refused, match="another run is writing"), publishing(out, "1"):
        raise AssertionError("it has the lock")
    workplace.sweep(tmp_path)
    assert any(name.startswith(".unfinished-") for name in names(tmp_path)), "it is in use"
    process.kill()
    process.wait()
    target = out if next_one == "same target" else tmp_path / "other"
    with pytest.raises(ZeroDivisionError), publishing(target, "1"):
        raise ZeroDivisionError
    assert names(tmp_path) == {"out"}
    assert (out / "sparse.mp4").read_text() == KILLED[stop]
    assert (out / "notes.txt").read_text() == "mine"


def test_a_video_that_was_complete_when_its_process_was_killed_is_not_lost(tmp_path):
    place = workplace.Workplace(tmp_path / "out")
    place.enter()
    fill(place.new, "1")
    os.close(place._lock)  # as the end of the process does
    workplace.sweep(tmp_path)
    assert names(tmp_path) == {"out"} and (tmp_path / "out" / "sparse.mp4").read_text() == "new"


def test_what_only_looks_like_a_workplace_is_left_alone(tmp_path):
    for name in (".unfinished-symphony", ".unfinished-0123456789ab", ".unfinished-abcdefabcdef"):
        (tmp_path / name / "new").mkdir(parents=True)
        (tmp_path / name / "new" / "notes.txt").write_text("mine")
    (tmp_path / ".unfinished-abcdefabcdef" / "lock").write_text("not its hash")
    before = contents(tmp_path)
    with publishing(tmp_path / "out", "1") as stage:
        fill(stage.folder, "1")
    shutil.rmtree(tmp_path / "out")
    assert contents(tmp_path) == before


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
