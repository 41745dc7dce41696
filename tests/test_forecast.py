"""`generate` predicts long loops before they run, and shows the measured time beside it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from rich.console import Console

from vidsparse.costs import machine, run
from vidsparse.costs.clock import Timed
from vidsparse.costs.machine import Constant, Machine
from vidsparse.generate import forecast
from vidsparse.generate.clock import Listener
from vidsparse.generate.display import summary
from vidsparse.generate.forecast import Foretold
from vidsparse.generate.job import prepare
from vidsparse.generate.request import Request
from vidsparse.generate.run import execute, load
from vidsparse.kernels.cpu import store

SMALL = {"height": 64, "width": 48, "frames": 5, "steps": 2, "prompt": "a monkey", "device": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-wan"
    tiny.build("wan")[0].save_pretrained(path)
    return path


@pytest.fixture
def job(model, tmp_path):
    return prepare(Request(model=str(model), out=tmp_path / "out", **SMALL))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unmeasured(monkeypatch):
    def fail(*args):
        raise AssertionError("measured")

    monkeypatch.setattr(store, "recall", fail)


def slow(forward, config):
    """A CPU on which a tiny video takes minutes."""
    rates = {name: Constant(1e5, 0.1, "measured") for name in machine.UNITS}
    return Machine("slow", "slow", {**rates, "launch": Constant(1e-3, 0.1, "measured")}, {}, 1), 1.0


def test_a_short_loop_is_not_worth_a_measurement(job, unmeasured):
    lines = []
    assert forecast.announce(load(job, Listener()), job, lines.append) == {}
    assert lines == []


def test_a_long_loop_is_announced_and_the_measured_time_stands_beside(job, monkeypatch):
    monkeypatch.setattr(forecast, "ROUGH", 1.0)
    monkeypatch.setattr(forecast, "calibrated", slow)
    said = []
    listener = Listener()
    listener.say = said.append
    content = execute(replace(job, compare_dense=True), listener)
    lines = [line for line in said if line.startswith("predicted for the denoising loop")]
    assert len(lines) == 1 and "dense " in lines[0] and "from measured figures" in lines[0]
    for arm in ("dense", "sparse"):
        told = content["arms"][arm]["predicted"]
        assert told["seconds"] > forecast.LONG / 2 and 0 < told["error"] < 1
        assert told["sources"] == ["measured"]
    console = Console(width=80, no_color=True)
    with console.capture() as shown:
        console.print(summary(content))
    row = next(line for line in shown.get().splitlines() if line.startswith("predicted"))
    assert "% off, from measured figures" in row
    kept = json.loads((job.out / "metrics.json").read_text())
    assert kept["arms"]["sparse"]["predicted"] == content["arms"]["sparse"]["predicted"]


def test_a_reference_run_is_not_predicted(job, unmeasured, monkeypatch):
    monkeypatch.setattr(forecast, "ROUGH", 1.0)
    config = job.config.override("kernel.impl=reference")
    assert forecast.announce(load(job, Listener()), replace(job, config=config), print) == {}


def test_a_gpu_follows_the_table(job, unmeasured, monkeypatch):
    """The same plan on an H100, and None on a GPU that is not in the table."""
    plan = forecast.plan_of(load(job, Listener()), job)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    found = forecast.forecast(plan, "cuda")
    assert isinstance(found, run.Prediction) and found.machine.name == "H100"
    assert isinstance(found.sparse_run, Timed) and found.sparse_run.seconds > 0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert forecast.forecast(plan, "cuda") is None


def test_guidance_makes_two_forwards():
    takes = SimpleNamespace(names={"guidance": "guidance_scale"})
    wan = prepare(Request(device="cpu")).model
    assert forecast.branches(wan, takes, {"guidance": 4.0}) == 2
    assert forecast.branches(wan, takes, {"guidance": 1.0}) == 1
    assert forecast.branches(wan, SimpleNamespace(names={}), {"guidance": 4.0}) == 1


def test_it_is_said_with_its_error():
    assert str(Foretold(1234.5, 0.1, ("measured",))) == "1,234 s +- 20%"
