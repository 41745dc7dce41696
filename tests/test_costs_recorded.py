"""The cost model on recorded timings of the demo model: predicted within 20 % of measured.

`pipelines/check_predictions.py` has recorded the constants that a CPU was calibrated to, and what
runs took on it; here the model predicts those from these.
"""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from vidsparse.costs.machine import Constant, Machine
from vidsparse.costs.run import predict
from vidsparse.costs.stage import AROUND
from vidsparse.generate.request import Request
from vidsparse.predict.subject import subject

FOLDER = Path(__file__).resolve().parent.parent / "pipelines/results"
ROWS = [
    row
    for file in sorted(FOLDER.glob("predictions_cpu*.csv"))
    for row in csv.DictReader(file.open())
]
WITHIN = 0.2


def machine(row):
    rates = ("matmul", "bandwidth", "launch", "dense", "sparse")
    constants = {name: Constant(float(row[name]), 0.06, "measured") for name in rates}
    around = Constant(float(row["around"]), 0.06, "measured")
    threads = int(row["threads"])
    return Machine("", "", constants, dict.fromkeys(AROUND, around), threads)


def predicted(row, where):
    sizes = {key: int(row[key]) for key in ("height", "width", "frames", "steps")}
    preset, *overrides = row["preset"].split()
    plan = subject(Request(preset=preset, overrides=overrides, **sizes), row["dtype"]).plan
    found = predict(plan, where, float(row["crossover"]))
    return (found.dense_run if row["arm"] == "dense" else found.sparse_run).seconds


def name(row):
    return f"{row['arm']} {row['preset']} {row['dtype']} {row['height']}x{row['width']}"


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_recorded_runs_are_predicted(row):
    assert predicted(row, machine(row)) / float(row["measured_s"]) == pytest.approx(1, abs=WITHIN)


def test_six_settings_are_recorded_and_differ():
    kinds = {tuple(row[k] for k in ("arm", "preset", "dtype", "height", "frames")) for row in ROWS}
    assert len(kinds) >= 6
    assert {row["arm"] for row in ROWS} == {"dense", "sparse"}
    assert {row["dtype"] for row in ROWS} == {"fp32", "bf16"}
    times = [float(row["measured_s"]) for row in ROWS]
    assert max(times) > 2 * min(times)


@pytest.mark.parametrize("constant", ["dense", "matmul"])
def test_another_machine_is_not_predicted(constant):
    """The bound can be missed: with a constant of a machine twice as fast it is."""
    dtype = "fp32" if constant == "dense" else "bf16"
    row = next(row for row in ROWS if row["dtype"] == dtype)
    right = machine(row)
    wrong = replace(right.constants[constant], value=2 * right.constants[constant].value)
    faster = replace(right, constants={**right.constants, constant: wrong})
    assert predicted(row, faster) / float(row["measured_s"]) < 1 - WITHIN
