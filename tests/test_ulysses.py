"""`--ulysses`: the commands by processes that share each video; one speaks, all end together."""

import json
import os
import subprocess
import sys
from pathlib import Path
from time import monotonic

import pytest
import torch

from vidsparse.generate import ranks
from vidsparse.generate.model_files import InputError
from vidsparse.jobs.layout import METRICS
from vidsparse.pipelines.share import Share, imbalance_of
from vidsparse.quality.frames import read_clip

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ["kernel.cpu_route=native", "kernel.crossover=1", "schedule.min_tokens=0",
            "schedule.dense_layers=[]", "kernel.block_q=16", "kernel.block_k=16"]  # fmt: skip
SMALL = ["--height", "32", "--width", "32", "--frames", "5", "--steps", "3", "--device", "cpu",
         *(word for one in SETTINGS for word in ("--set", one))]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launched(monkeypatch, rank, size):
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", size)):
        monkeypatch.setenv(name, str(value))


def refused(act, *given):
    with pytest.raises(InputError) as caught:
        act(*given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_as_many_processes_as_are_asked_for(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ranks.check(1, "generate")
    said = refused(ranks.check, 2, "generate")
    assert "--ulysses 2: 1 process of this command runs" in said
    assert "torchrun --nproc-per-node 2 -m vidsparse generate ... --ulysses 2" in said
    assert "expected 1 .." in refused(ranks.check, 0, "generate")
    launched(monkeypatch, 1, 4)
    ranks.check(4, "batch")
    assert "4 processes of this command" in refused(ranks.check, 2, "batch")
    assert not ranks.leads(4) and ranks.leads(1)
    launched(monkeypatch, 0, 4)
    assert ranks.leads(4)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    launched(monkeypatch, 1, 2)
    assert ranks.place(2, "cpu") == "cpu" and ranks.place(1, "cuda:3") == "cuda:3"
    assert "take --device cuda" in refused(ranks.place, 2, "cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks.place(2, "cuda") == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "process 1 of this machine has no GPU" in refused(ranks.place, 2, "cuda")


def test_alone_nothing_is_sent():
    with ranks.joined(1, "cpu"):
        assert ranks.tell(1, "what") == "what"
    assert not torch.distributed.is_initialized()


def test_imbalance_is_of_sparse_calls():
    """Two processes, three calls: the second dense, in the others one has twice the work."""
    density = torch.tensor([[0.2, 1.0, 0.4], [0.4, 1.0, 0.2]], dtype=torch.float64)
    assert imbalance_of(density) == pytest.approx(0.8 / 0.6)
    assert imbalance_of(torch.ones(2, 3)) is None
    assert str(Share(0, 2, 4 / 3)) == (
        "share 1 of 2 of the heads; the dearest computes 1.33 times the mean of all"
    )


# Slow: processes


def start(words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=ROOT,
    )  # fmt: skip


def ended(words, code=0):
    process = start(words)
    try:
        out, err = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == code, err
    return out, err


def frames(folder, name="sparse.mkv"):
    return read_clip(folder / name).tobytes()


@pytest.mark.slow
def test_two_processes_make_the_file_of_one(tmp_path):
    command = ["vidsparse", "generate", *SMALL, "--compare-dense", "--json", "--out"]
    ended(["-m", *command, str(tmp_path / "one")])
    out, err = ended([*TORCHRUN, "-m", *command, str(tmp_path / "two"), "--ulysses", "2"])
    content = json.loads(out)  # one process speaks
    assert content["out"] == str(tmp_path / "two") and err.count("loading") == 1
    assert frames(tmp_path / "two") == frames(tmp_path / "one")
    one, two = (json.loads((tmp_path / n / METRICS).read_text()) for n in ("one", "two"))
    assert one["id"] == two["id"] and (one["ulysses"], two["ulysses"]) == (1, 2)
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert (report["share"]["rank"], report["share"]["degree"]) == (0, 2)
    assert report["share"]["imbalance"] >= 1 and len(report["calls"][-1]["density"]) == 1


@pytest.mark.slow
def test_a_batch_of_two_processes_makes_the_files_of_one(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a large red circle moves left\na small blue ring moves up\n")
    command = ["vidsparse", "batch", str(prompts), *SMALL, "--preset", "balanced", "--out"]
    ended(["-m", *command, str(tmp_path / "one")])
    shared = [*TORCHRUN, "-m", *command, str(tmp_path / "two"), "--ulysses", "2"]
    _, err = ended(shared)
    assert err.count("2 jobs: 2 made") == 1
    jobs = sorted(path.parent.relative_to(tmp_path / "one") for path in tmp_path.glob(
        f"one/*/*/{METRICS}"))  # fmt: skip
    assert len(jobs) == 2
    for job in jobs:
        assert frames(tmp_path / "two" / job) == frames(tmp_path / "one" / job)
    _, err = ended(shared)
    assert "2 were there" in err


BROKEN = """
import os, sys
from vidsparse.generate import run
def broken(*given, **more):
    raise MemoryError("no more")
if os.environ["RANK"] == "1":
    run._call = broken
from vidsparse.__main__ import main
main()
"""


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(tmp_path):
    file, begin = tmp_path / "broken.py", monotonic()
    file.write_text(BROKEN)
    words = [*TORCHRUN, str(file), "generate", *SMALL, "--ulysses", "2", "--out"]
    _, err = ended([*words, str(tmp_path / "out")], code=1)
    assert "vidsparse: process 1: cpu has too little memory" in err
    assert "Traceback" not in err.partition("torch/distributed")[0]
    assert monotonic() - begin < 200
    assert [path.name for path in tmp_path.iterdir()] == ["broken.py"]


@pytest.mark.slow
def test_what_does_not_divide_is_a_line(tmp_path):
    three = [*TORCHRUN[:-1], "3", "-m", "vidsparse", "generate", *SMALL, "--ulysses", "3", "--out"]
    _, err = ended([*three, str(tmp_path / "out")], code=1)
    assert "2 attention heads of a WanTransformer3DModel do not divide into ulysses_degree=3" in err
    assert "Traceback" not in err.partition("torch/distributed")[0]
    assert not list(tmp_path.iterdir())
