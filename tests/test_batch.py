"""A batch on one machine: nothing is made twice, nothing is lost, what fails is written down."""

import csv
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time

import batch_stub
import pytest
from batch_stub import Stub
from disks import small_disk

from vidsparse import registry
from vidsparse.batch import claims
from vidsparse.batch.display import compare_command
from vidsparse.batch.plan import looked_at
from vidsparse.batch.run import Watcher, run
from vidsparse.batch.task import Resources, Unfit
from vidsparse.batch.worker import Worker
from vidsparse.generate.model_files import InputError

FORK = multiprocessing.get_context("fork")
LOCAL = registry.batch_engine("local")


def run_local(plan, stub, display=None, **options):
    return run(plan, stub, LOCAL, Resources("cpu"), display or Watcher(), **options)


def rows(home):
    with (home / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def stub(tmp_path):
    return Stub(tmp_path / "log")


@pytest.fixture
def home(tmp_path):
    return tmp_path / "out"


def test_all_are_made_once_and_the_second_time_nothing_is(home, stub):
    plan = batch_stub.plan(home, 4)
    report = run_local(plan, stub)
    assert report.complete and stub.begun() == [0, 1, 2, 3]
    assert [row["status"] for row in rows(home)] == ["done"] * 4
    assert rows(home)[2]["density"] == "0.25" and rows(home)[2]["seed"] == "2"
    report = run_local(looked_at(plan), stub)
    assert report.complete and len(stub.begun()) == 4
    more = looked_at(batch_stub.plan(home, 6))
    assert run_local(more, stub).complete and stub.begun()[4:] == [4, 5]
    assert os.listdir(home / ".batch") == ["trial.lock"]


def test_a_folder_that_lost_a_file_is_made_again(home, stub):
    plan = batch_stub.plan(home, 2)
    run_local(plan, stub)
    (plan.tasks[1].folder / "metrics.json").unlink()
    assert run_local(looked_at(plan), stub).complete and stub.begun() == [0, 1, 1]


def test_a_failure_is_tried_again_written_down_and_stops_nobody(home, stub):
    stub.fails = {1: ValueError("no number:\nNaN"), 2: 1}
    plan = batch_stub.plan(home, 4)
    report = run_local(plan, stub)
    assert not report.complete and stub.begun() == [0, 1, 1, 2, 2, 3]
    assert (report.count("made"), report.count("failed")) == (3, 1)
    (file,) = (home / "failures").iterdir()
    kept = json.loads(file.read_text())
    assert file.stem == plan.tasks[1].folder.name and kept["tries"] == 2
    assert kept["error"] == "ValueError: no number:" and "Traceback" in kept["traceback"]
    assert [row["status"] for row in rows(home)] == ["done", "failed", "done", "done"]
    assert rows(home)[1]["error"] == "ValueError: no number:"

    plan = looked_at(plan)
    assert (plan.failed, len(plan.missing)) == (1, 1)
    stub.fails = {}
    assert run_local(plan, stub).complete and not (home / "failures").exists()


@pytest.mark.parametrize("retries", [0, 3])
def test_so_many_retries_as_asked_for(home, stub, retries):
    stub.fails = {0: RuntimeError("out of memory")}
    run_local(batch_stub.plan(home, 1), stub, retries=retries)
    assert len(stub.begun()) == retries + 1


def test_a_disk_error_is_not_tried_again(home, stub):
    stub.fails = {0: OSError(28, "No space left on device")}
    report = run_local(batch_stub.plan(home, 2), stub, retries=5)
    assert stub.begun() == [0, 1] and report.count("failed") == 1


def test_a_task_that_kills_its_process_ends(home, stub):
    """As Ray begins a task again whose process is gone, for ever if nobody counts."""
    plan = batch_stub.plan(home, 1)
    claims.prepare_home(home)
    worker = Worker(stub, home, "this-run", Resources("cpu"), retries=1)
    for _ in range(2):
        claims.begin(home, plan.tasks[0].id, "this-run")
    outcome = worker(plan.tasks[0])
    assert outcome.status == "failed" and outcome.tries == 2 and "died" in outcome.error
    assert not stub.begun()
    for _ in range(9):  # of other runs
        claims.begin(home, plan.tasks[0].id, "a-run-before")
    assert worker(plan.tasks[0]).status == "made"


def test_a_model_that_cannot_be_loaded_ends_the_run(home, stub):
    stub.fails = {0: Unfit("--model x: cannot be loaded")}
    with pytest.raises(InputError, match="cannot be loaded"):
        run_local(batch_stub.plan(home, 3), stub)
    assert stub.begun() == [0]


def test_two_runs_at_once_share_the_work(home, stub):
    stub.seconds = 0.05
    plan = batch_stub.plan(home, 16)
    others = [FORK.Process(target=run_local, args=(plan, stub)) for _ in range(2)]
    for other in others:
        other.start()
    report = run_local(plan, stub)
    for other in others:
        other.join(60)
        assert other.exitcode == 0
    assert report.complete and sorted(stub.begun()) == list(range(16))
    assert len(stub.workers()) == 3 and min(stub.workers().values()) >= 2
    assert len(rows(home)) == 16


class Waits(Watcher):
    said = 0

    def waiting(self, tasks):
        self.said += tasks


def test_a_run_waits_for_what_another_one_makes_and_takes_it_over_when_that_dies(home, stub):
    plan = batch_stub.plan(home, 3)
    stub.kills = (0,)
    stub.seconds = 1.0
    other = FORK.Process(target=run_local, args=(plan, stub))
    other.start()
    while not stub.begun():
        time.sleep(0.01)
    stub.seconds = 0.0
    watcher = Waits()
    report = run_local(plan, stub, watcher)
    other.join(60)
    assert other.exitcode == -signal.SIGKILL and watcher.said == 1
    assert report.complete and sorted(stub.begun()) == [0, 0, 1, 2]


def test_kill_9_in_the_middle_loses_nothing(home, stub):
    plan = batch_stub.plan(home, 4)
    stub.kills = (2,)
    other = FORK.Process(target=run_local, args=(plan, stub))
    other.start()
    other.join(60)
    assert other.exitcode == -signal.SIGKILL
    plan = looked_at(plan)
    assert len(plan.missing) == 2 and run_local(plan, stub).complete
    assert stub.begun() == [0, 1, 2, 2, 3]
    assert not list(home.rglob(".unfinished-*"))


def test_a_full_disk_fails_tasks_and_the_next_run_makes_them(tmp_path, stub):
    with small_disk(tmp_path / "disk", "200k") as disk:
        home, plan = disk / "out", batch_stub.plan(disk / "out", 3)
        run_local(batch_stub.plan(home, 1), stub)
        handle = os.open(disk / "filler", os.O_CREAT | os.O_WRONLY)
        with pytest.raises(OSError):
            while os.write(handle, b"\0" * 4096):
                pass
        os.close(handle)
        report = run_local(looked_at(plan), stub)
        assert report.count("failed") == 2 and "No space left" in report.rows[1]["error"]
        assert report.unwritten
        (disk / "filler").unlink()
        assert run_local(looked_at(plan), stub).complete
        assert len(rows(home)) == 3


def test_a_folder_that_cannot_be_is_one_line(tmp_path, stub):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--out .*file/out: cannot write there"):
        run_local(batch_stub.plan(tmp_path / "file" / "out", 1), stub)


def test_a_disk_without_locks_is_refused(home, stub, monkeypatch):
    """Lock files in their place would stay behind when a process is killed, and stop all others."""

    def no_flock(handle, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    with pytest.raises(InputError, match=r"cannot write there, or lock files: Function not impl"):
        run_local(batch_stub.plan(home, 1), stub)
    assert not stub.begun()


def test_local_is_one_worker(home, stub):
    with pytest.raises(InputError, match="--workers 2: --engine local is this process alone"):
        run(batch_stub.plan(home, 1), stub, LOCAL, Resources("cpu", workers=2), Watcher())


def test_dense_seconds_are_those_of_the_scene(home, stub):
    tasks = [
        batch_stub.task(home, number, preset, preset == "quality")
        for number in range(2)
        for preset in ("quality", "fast")
    ]
    report = run_local(batch_stub.Plan(home, tasks), stub)
    assert {row["preset"]: row["speedup"] for row in rows(home)} == {
        "quality": "1.5",
        "fast": "1.5",
    }
    assert compare_command(report) == (
        f"vidsparse compare --ref {home}/quality --test {home}/quality --test {home}/fast "
        f"--out {home}/compare"
    )


def test_engines_are_files():
    assert "local" in registry.batch_engines()
    with pytest.raises(ValueError, match=r"--engine slurm: no such engine; there are .*local"):
        registry.batch_engine("slurm")
