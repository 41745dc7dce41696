"""The engines of a batch: the same frames from all, and nothing lost when their processes die."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import batch_stub
import psutil
import pytest
from batch_stub import Stub

from vidsparse import registry
from vidsparse.batch import claims
from vidsparse.batch.engines.torchrun import _what_died
from vidsparse.batch.failures import write_failure
from vidsparse.batch.making import Pipeline
from vidsparse.batch.plan import looked_at
from vidsparse.batch.run import Watcher, run
from vidsparse.batch.task import Resources
from vidsparse.batch.worker import Worker
from vidsparse.generate.model_files import InputError
from vidsparse.jobs.layout import METRICS
from vidsparse.quality.frames import read_clip

ROOT = Path(__file__).resolve().parent.parent
PINNED = (
    "kernel.cpu_route=native",
    "kernel.crossover=1",
    "schedule.min_tokens=0",
    "schedule.dense_layers=[]",
    "kernel.block_q=16",
    "kernel.block_k=16",
)
"""What decides the pixels on every machine, and makes the smallest videos sparse."""
SMALL = ["--height", "32", "--width", "32", "--frames", "5", "--steps", "3", "--threads", "1"]
LAUNCH = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
          "--dynamo_backend", "no"]  # fmt: skip
"""Of accelerate: several processes, which it starts for GPUs alone; --device cpu needs none."""


RAY = pytest.mark.skipif(find_spec("ray") is None, reason="pyproject.toml has ray for Linux alone")


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Other processes find it."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    return Stub(tmp_path / "log")


@pytest.fixture
def home(tmp_path):
    return tmp_path / "out"


def run_by(name, plan, stub, resources, watcher=None, **options):
    return run(plan, stub, registry.batch_engine(name), resources, watcher or Watcher(), **options)


def refused(name, plan, stub, **resources):
    with pytest.raises(InputError) as caught:
        run_by(name, plan, stub, Resources(**resources))
    assert "\n" not in str(caught.value) and not stub.begun()
    return str(caught.value)


# Quick


def test_workers_can_be_sent_and_leave_the_listener_behind(home, stub):
    for make in (stub, Pipeline()):
        worker = Worker(make, home, "run", Resources("cuda"), listener=Watcher())
        sent = pickle.loads(pickle.dumps(worker.on("cuda:1")))
        assert sent.device == "cuda:1" and not isinstance(sent.listener, Watcher)
        assert replace(sent, resources=worker.resources).home == home


@RAY
def test_an_actor_of_ray_makes_the_tasks_of_its_places(home, stub):
    tasks = batch_stub.plan(home, 3).tasks
    claims.prepare_home(home)
    engine = registry.batch_engine("ray")
    actor = engine.Actor(tasks, Worker(stub, home, "run", Resources("cpu")))
    (pickled,) = actor({"place": [2]})["outcome"]
    outcome = pickle.loads(pickled)
    assert (outcome.id, outcome.status) == (tasks[2].id, "made") and stub.begun() == [2]


@RAY
def test_what_engines_refuse_is_one_line_before_anything_is_made(home, stub, monkeypatch):
    plan = batch_stub.plan(home, 1)
    said = refused("torchrun", plan, stub, device="cpu")
    assert "add --workers N" in said and "torchrun --nproc-per-node N -m vidsparse batch" in said
    assert "--device cuda:1" in refused("torchrun", plan, stub, device="cuda:1")
    assert "--device cuda:1" in refused("ray", plan, stub, device="cuda:1")
    assert "--gpus-per-worker 0.5" in refused("ray", plan, stub, device="cpu", gpus=0.5)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        said = refused("ray", plan, stub, device="cpu", address=address)
    assert f"--ray-address {address}: Connection refused" in said and "ray start --head" in said
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    assert registry.batch_engine("torchrun").follows()
    assert "--workers 2: the command runs under a launcher" in refused(
        "torchrun", plan, stub, device="cpu", workers=2
    )


def test_ray_is_named_where_it_is_missing(home, stub, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    said = refused("ray", batch_stub.plan(home, 1), stub, device="cpu")
    assert "pip install 'vidsparse[ray]'" in said


def test_the_disk_says_how_tasks_of_other_processes_ended(home, stub):
    tasks = batch_stub.plan(home, 4).tasks
    claims.prepare_home(home)
    worker = Worker(stub, home, "run", Resources("cpu"))
    worker(tasks[0])
    for task, by in ((tasks[1], "run"), (tasks[2], "an earlier one")):
        write_failure(home, task, "no number", "Traceback", by, 2, "host:1")
    left = {task.id: task for task in tasks}
    found = list(registry.batch_engine("torchrun")._ended(left, worker))
    assert [(o.id, o.status, o.error) for o in found] == [
        (tasks[0].id, "made", ""),
        (tasks[1].id, "failed", "no number"),
    ]
    assert list(left) == [tasks[2].id, tasks[3].id]


def test_a_dead_process_is_one_line():
    text = "x\nRuntimeError: bad\n  exitcode  : -9 (pid: 7)\ntorch...ChildFailedError: y\n"
    said = _what_died(text, 1)
    assert "exit code -9 (pid: 7)" in said and "RuntimeError: bad" in said and "\n" not in said
    assert "torchrun ended with 3" in _what_died("", 3)


# Slow: processes of engines


@RAY
@pytest.mark.slow
def test_ray_takes_little_time_for_a_job_and_shares_them_evenly(home, stub, capsys):
    """200 jobs of a stub, 4 workers. The bound is for the 50 in a row that other programs on the
    machine disturbed least; what it took all in all is printed beside it."""
    import ray

    ends = []

    class Clock(Watcher):
        def outcome(self, task, outcome):
            ends.append(time.perf_counter())

    report = run_by("ray", batch_stub.plan(home, 200), stub, Resources("cpu", workers=4), Clock())
    assert report.complete and sorted(stub.begun()) == list(range(200))
    least = min(late - early for early, late in zip(ends, ends[50:], strict=False)) / 50
    mean = (ends[-1] - ends[0]) / (len(ends) - 1)
    shares = sorted(stub.workers().values())
    with capsys.disabled():
        print(
            f"\nRay, 200 empty jobs, 4 workers: {least * 1e3:.1f} ms a job in the best 50, "
            f"{mean * 1e3:.1f} ms in all, jobs of each worker {shares}"
        )
    assert least <= 0.05
    assert len(shares) == 4 and shares[0] >= 25
    assert not ray.is_initialized()


@RAY
@pytest.mark.slow
def test_ray_goes_on_when_workers_die_and_gives_up_a_job_that_always_kills(home, stub):
    stub.kills, stub.seconds = (1,), 0.1
    report = run_by("ray", batch_stub.plan(home, 6), stub, Resources("cpu", workers=2))
    assert report.complete and sorted(stub.begun()) == [0, 1, 1, 2, 3, 4, 5]
    more, stub.kills, stub.always = looked_at(batch_stub.plan(home, 9)), (7,), True
    report = run_by("ray", more, stub, Resources("cpu", workers=2), retries=1)
    assert (report.count("made"), report.count("there"), report.count("failed")) == (2, 6, 1)
    assert stub.begun().count(7) == 2 and "died" in report.rows[7]["error"]


@pytest.mark.slow
def test_torchrun_says_that_a_process_died_and_the_next_run_completes(home, stub):
    stub.kills, stub.seconds = (4,), 0.3
    report = run_by("torchrun", batch_stub.plan(home, 6), stub, Resources("cpu", workers=2))
    assert not report.complete and "(SIGKILL)" in report.broken and "\n" not in report.broken
    report = run_by("torchrun", looked_at(report.plan), stub, Resources("cpu", workers=2))
    assert report.complete and report.count("there") >= 2
    assert not list(home.rglob(".unfinished-*"))


# Slow: the command with the demo model


def command(prompts, out, *more, launcher=("-m",), **changes):
    """`vidsparse batch` as a process; changes: of the environment."""
    sets = [word for change in PINNED for word in ("--set", change)]
    words = [*launcher, "vidsparse", "batch", str(prompts), "--preset", "balanced,fast", "--out",
             str(out), *SMALL, *sets, "--device", "cpu", *more]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}
    return subprocess.Popen(
        [sys.executable, *words], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, cwd=ROOT,
    )  # fmt: skip


def ended(process, code=0):
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err
    return out + err


def made(out):
    """Folder of a job -> its frames; each of them whole."""
    found = {}
    for sidecar in out.glob(f"*/*/{METRICS}"):
        content = json.loads(sidecar.read_text())
        folder = sidecar.parent
        assert {p.name for p in folder.iterdir()} == set(content["files"])
        found[f"{folder.parent.name}/{folder.name}"] = read_clip(folder / "sparse.mkv").tobytes()
    return found


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a large red circle moves left\na small blue ring moves up\n")
    return file


@RAY
@pytest.mark.slow
def test_all_engines_make_the_same_frames(prompts, tmp_path):
    launched = ("-m", "accelerate.commands.launch", *LAUNCH, "--module")
    runs = {
        "local": command(prompts, tmp_path / "local"),
        "ray": ("--engine", "ray", "--workers", "2"),
        "torchrun": ("--engine", "torchrun", "--workers", "2"),
        "launched": ("--engine", "torchrun"),
    }
    ended(runs["local"])
    expected = made(tmp_path / "local")
    assert len(expected) == 4 and len(set(expected.values())) == 4  # sparse, each in its way
    for name in ("ray", "torchrun"):
        said = ended(command(prompts, tmp_path / name, *runs[name]))
        assert "4 jobs: 4 made" in said
        assert made(tmp_path / name) == expected
    said = ended(command(prompts, tmp_path / "x", *runs["launched"], launcher=launched))
    assert said.count("4 jobs: 4 made") == 1  # one process speaks
    assert made(tmp_path / "x") == expected


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=RAY), "torchrun"])
def test_a_killed_process_loses_nothing(prompts, tmp_path, engine):
    workers = () if engine == "local" else ("--engine", engine, "--workers", "2")
    arguments = (prompts, tmp_path / "out", *workers, "--seeds", "0-1", "--steps", "12")
    first = command(*arguments)
    until = time.monotonic() + 300
    while not made(tmp_path / "out") or not (victims := working(first.pid, engine)):
        assert first.poll() is None and time.monotonic() < until, first.communicate()
        time.sleep(0.05)
    os.kill(victims[0], signal.SIGKILL)
    said = first.communicate(timeout=600)
    before = made(tmp_path / "out")
    assert 1 <= len(before) <= 8, said
    said = ended(command(*arguments))
    after = made(tmp_path / "out")
    assert len(after) == 8 and f"{len(before)} were there" in said
    assert {name: after[name] for name in before} == before
    left = [path.name for path in (tmp_path / "out").rglob("*") if path.name.startswith(".unf")]
    assert not left and not list((tmp_path / "out").rglob("*-part*"))


def working(pid, engine):
    """Processes below one that make jobs: those that hold a claim."""
    process = psutil.Process(pid)
    found = []
    for one in [process, *process.children(recursive=True)]:
        try:
            if any("/.batch/" in file.path for file in one.open_files()):
                found.append(one.pid)
        except psutil.Error:
            continue
    return found
