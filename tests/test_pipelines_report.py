"""The run report: every call of the last run, totals that follow from the calls."""

from __future__ import annotations

import copy
import json
from statistics import fmean
from typing import Any

import pytest
import tiny

import vidsparse
from vidsparse.pipelines.report import RunReport
from vidsparse.pipelines.share import Share

CALL_KEYS = [
    "step",
    "layer",
    "branch",
    "transformer",
    "density",
    "reason",
    "context_name",
    "seconds",
    "executor",
    "ordered",
]
TOTALS = [
    "density",
    "attention_density",
    "ordered",
    "sparse_calls",
    "dense_calls",
    "dense_reasons",
    "dense_steps",
    "seconds",
]


@pytest.fixture(scope="module")
def pipeline() -> tuple[Any, dict[str, Any]]:
    pipe, call = tiny.build("wan22")
    overrides = ["schedule.dense_layers=[1]"]
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE, overrides)
    tiny.run(pipe, call)
    return pipe, call


def test_layout_of_the_report(pipeline: tuple[Any, dict[str, Any]]) -> None:
    report = json.loads(json.dumps(vidsparse.run_report(pipeline[0]).to_dict()))
    assert list(report) == [
        "calls",
        "totals",
        "non_finite",
        "preset",
        "config",
        "steps",
        "versions",
        "share",
        "choices",
    ]
    assert report["non_finite"] == []
    assert list(report["totals"]) == TOTALS
    assert len(report["calls"]) == 4 * 2 * 2
    for call in report["calls"]:
        assert list(call) == CALL_KEYS
        assert len(call["density"]) == 2, "one number per head"
        assert all(0 < d <= 1 for d in call["density"])
        assert call["executor"] == ("" if call["reason"] else "reference")
    (choice,) = report["choices"]
    assert (choice["executor"], choice["passed"], choice["calls"]) == ("reference", [], 6)
    assert report["preset"] == "custom schedule.dense_layers=[1]"
    assert {"vidsparse", "torch", "diffusers"} <= set(report["versions"])


def test_totals_follow_from_the_calls(pipeline: tuple[Any, dict[str, Any]]) -> None:
    report = vidsparse.run_report(pipeline[0]).to_dict()
    totals, calls = report["totals"], report["calls"]
    sparse = [fmean(c["density"]) for c in calls if c["reason"] is None]
    assert totals["sparse_calls"] == len(sparse) == 3 * 2
    assert totals["dense_calls"] == 10
    assert totals["dense_reasons"] == {"dense-layer": 6, "warmup-step": 4}
    assert totals["dense_steps"] == [0]
    assert "schedule: 1 of 4 steps dense" in str(vidsparse.run_report(pipeline[0]))
    assert totals["density"] == pytest.approx(fmean(sparse))
    assert totals["attention_density"] == pytest.approx((sum(sparse) + 10) / 16)
    assert {c["density"][0] for c in calls if c["reason"]} == {1.0}
    assert {"dense", "estimate", "select", "kernel"} <= set(totals["seconds"])
    assert all(spent > 0 for spent in totals["seconds"].values())


def test_text(pipeline: tuple[Any, dict[str, Any]]) -> None:
    text = str(vidsparse.run_report(pipeline[0]))
    assert "4 of 4 steps, 16 self-attention calls, 10 dense" in text
    assert "\nengine reference\n" in text
    assert "4 warmup-step" in text and "2 dense-layer" in text and "kernel" in text


def test_empty_before_the_first_run() -> None:
    pipe, _ = tiny.build("wan")
    with pytest.raises(ValueError, match="WanPipeline is not accelerated"):
        vidsparse.run_report(pipe)
    vidsparse.accelerate_pipeline(pipe, "tiles")
    report = vidsparse.run_report(pipe)
    assert (report.calls, report.steps, report.last) == ([], 0, None)
    totals = report.to_dict()["totals"]
    assert (totals["density"], totals["sparse_calls"], totals["dense_calls"]) == (1.0, 0, 0)
    assert report.to_dict()["preset"] == "tiles"
    assert "0 self-attention calls" in str(report)


def test_a_run_replaces_the_report_and_leaves_the_old_one() -> None:
    pipe, call = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    tiny.run(pipe, call)
    first = vidsparse.run_report(pipe)
    assert vidsparse.run_report(pipe) is first
    tiny.run(pipe, call, num_inference_steps=2)
    assert len(first.calls) == 16 and len(vidsparse.run_report(pipe).calls) == 8


def test_progress_during_a_run() -> None:
    pipe, call = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    seen = []

    def at_end(pipe: Any, i: int, t: Any, kwargs: Any) -> Any:
        report = vidsparse.run_report(pipe)
        assert report.last is not None
        seen.append((report.last.step, report.steps, report.last.mean_density < 1))
        return kwargs

    tiny.run(pipe, call, callback_on_step_end=at_end)
    assert seen == [(0, 4, False), (1, 4, True), (2, 4, True), (3, 4, True)]


def test_too_short_for_the_shipped_preset() -> None:
    pipe, call = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, "tiles", ["schedule.dense_layers=[]"])
    tiny.run(pipe, call)
    assert "too-short" in vidsparse.run_report(pipe).dense_reasons


def test_the_share_of_a_process_is_saved(pipeline, tmp_path) -> None:
    report = copy.copy(vidsparse.run_report(pipeline[0]))
    report.share = Share(1, 2, 1.25)
    loaded = RunReport.load(report.save(tmp_path / "report.json"))
    assert loaded.share == report.share and "1.25 times the mean" in str(loaded)


def test_saved_and_loaded(pipeline, tmp_path) -> None:
    report = vidsparse.run_report(pipeline[0])
    path = report.save(tmp_path / "report.json")
    loaded = RunReport.load(path)
    assert loaded.to_dict() == report.to_dict() and str(loaded) == str(report)
    assert loaded.config == report.config
    assert [call.density for call in loaded.calls] == [call.density for call in report.calls]
    assert loaded.seconds == pytest.approx(report.seconds)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_seconds_are_those_of_the_calls(pipeline) -> None:
    report = vidsparse.run_report(pipeline[0])
    assert set(report.seconds) >= {"dense", "kernel"}
    for stage, seconds in report.seconds.items():
        assert seconds == pytest.approx(sum(c.seconds.get(stage, 0.0) for c in report.calls))
    for call in report.calls:
        assert ("dense" in call.seconds) == (call.reason is not None)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "vidsparse.report/0"}', "\x00"])
def test_other_files_are_no_report(tmp_path, text) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match="is no run report"):
        RunReport.load(tmp_path / "report.json")
