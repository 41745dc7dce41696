"""The table of machines: every constant has a source, and published runs come out of it."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from vidsparse.costs import gpus, machine
from vidsparse.costs.run import predict
from vidsparse.generate.request import Request
from vidsparse.predict.subject import subject

PUBLISHED = list(csv.DictReader(Path(__file__).with_name("published_runs.csv").open()))
NAMES = ("H100", "H200", "A100", "4090", "B200")


@pytest.mark.parametrize("name", NAMES)
def test_every_constant_has_a_source_and_an_error(name):
    found = gpus.named(name)
    assert set(found.constants) == set(machine.UNITS)
    for key, one in found.constants.items():
        assert one.source in machine.SOURCES and one.origin, key
        assert one.value > 0 and (0 < one.error < 1 or key == "memory"), key


@pytest.mark.parametrize("name", NAMES)
def test_what_has_run_on_no_gpu_is_assumed_and_no_faster_than_dense(name):
    rates = gpus.named(name).constants
    assert rates["sparse"].source == "assumed"
    assert rates["sparse"].value <= rates["dense"].value
    assert rates["dense"].value <= rates["matmul"].value * 1.3


def test_another_name_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=f"--gpu H1000: expected {', '.join(NAMES)} or this"):
        gpus.named("H1000")


@pytest.mark.parametrize(
    "told, name",
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA GeForce RTX 4090", "4090"), ("Tesla T4", None)],
)
def test_a_gpu_is_recognised_by_what_torch_calls_it(told, name):
    found = gpus.recognised(told)
    assert (found and found.name) == name


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row['model'][-20:]} {row['gpu']}")
def test_published_dense_runs_are_predicted(row):
    """Within 20 %, and within two of the standard errors that are shown."""
    sizes = {key: int(row[key]) for key in ("height", "width", "frames", "steps")}
    plan = subject(Request(model=row["model"], **sizes), "bf16").plan
    found = predict(plan, gpus.named(row["gpu"]))
    ratio = found.dense_run.seconds / float(row["seconds"])
    assert ratio == pytest.approx(1, abs=0.2)
    assert abs(ratio - 1) < 2 * found.errors["dense"]


def test_a_wrong_constant_is_noticed():
    """The test above can fail: with half the rate of dense attention it does."""
    row = PUBLISHED[0]
    sizes = {key: int(row[key]) for key in ("height", "width", "frames", "steps")}
    plan = subject(Request(model=row["model"], **sizes), "bf16").plan
    real = gpus.named(row["gpu"])
    slow = replace(real.constants["dense"], value=real.constants["dense"].value / 2)
    wrong = replace(real, constants={**real.constants, "dense": slow})
    assert predict(plan, wrong).dense_run.seconds > 1.5 * float(row["seconds"])
