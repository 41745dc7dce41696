"""What a run that was killed has left is repaired; what another one works at is left alone."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from published import contents, fill, made, names

from vidsparse.jobs import workplace
from vidsparse.jobs.publish import Refused, publishing

ROOT = Path(__file__).resolve().parent.parent


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


def test_without_locks_nothing_is_taken_for_left_over(tmp_path, monkeypatch):
    """A run works; what looks like a killed one may be one at work, and its user is told."""

    def flock(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(workplace.fcntl, "flock", flock)
    out = tmp_path / "out"
    with publishing(out, "1") as stage:
        fill(stage.folder, "1")
        place = stage.folder.parent
        with pytest.raises(Refused, match=f"remove {place}"), publishing(out, "1"):
            raise AssertionError("somebody may be at work")
        workplace.sweep(tmp_path)
        assert names(stage.folder) == {"sparse.mp4", "metrics.json"}
    assert names(tmp_path) == {"out"}
