"""`vidsparse calibrate`: errors are those of attention, and what was done is not done again."""

import itertools
import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import vidsparse
from vidsparse import SparseConfig
from vidsparse.accelerate import observing
from vidsparse.calibrating import meter as meters
from vidsparse.calibrating import run as running
from vidsparse.calibrating.goal import Goal
from vidsparse.calibrating.meter import Meter
from vidsparse.calibrating.run import Asked, calibrate
from vidsparse.calibrating.search import LEVELS
from vidsparse.capturing.run import DENSE
from vidsparse.cli import app
from vidsparse.generate.clock import Listener
from vidsparse.generate.job import prepare
from vidsparse.generate.model_files import InputError
from vidsparse.generate.request import Request
from vidsparse.generate.run import load, run_arm
from vidsparse.pipelines import provenance
from vidsparse.shipped import folder

CHANGES = ("kernel.block_q=16", "kernel.block_k=16", "schedule.min_tokens=0", "kernel.crossover=1")
SMALL: dict[str, Any] = {"height": 32, "width": 32, "frames": 5, "steps": 4}
REQUEST = Request(**SMALL, preset="tiles", overrides=CHANGES)
PROMPTS = ("a red circle moves left", "a blue ring moves up")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder to work in, and calls that cost what their density says, whatever the clock does."""
    monkeypatch.setattr(Meter, "costs", lambda self: [0.01 * level for level in self.levels])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_errors_are_those_of_attention() -> None:
    """Calls are kept in the run, and each head is attended to alone afterwards."""
    job = prepare(REQUEST)
    pipe, seen = load(job, Listener()), {}
    meter = Meter(job.config, (0.1, 0.4, 1.0), (1, 3))

    def watch(call: Any) -> None:
        meter(call)
        if call.context.branch != "uncond":
            parts = (call.q, call.k, call.v)
            seen[call.context.step, call.context.layer] = [x.clone() for x in parts], call.grid

    vidsparse.accelerate_pipeline(pipe, DENSE)
    with observing(pipe, watch):
        run_arm(pipe, job, "sparse", Listener())
    vidsparse.restore_pipeline(pipe)
    assert all(len(seconds) == 2 * 6 for seconds in meter.seconds.values())
    table = meter.table()
    assert table.shape == (2, 6, 2, 3) and meter.forwards == 2
    assert (table[..., -1] == 0).all() and (table[..., 0] > 0).all()
    assert (table[..., 0] > table[..., 1]).mean() > 0.9
    for (group, step), layer in itertools.product(enumerate((1, 3)), (0, 5)):
        qkv, grid = seen[step, layer]
        wide = [x.double().transpose(1, 2) for x in qkv]
        dense = torch.nn.functional.scaled_dot_product_attention(*wide).transpose(1, 2)
        for head in range(2):
            alone = [x[:, :, head : head + 1] for x in qkv]
            config = meters.at(job.config, 0.4)
            out = vidsparse.sparse_attention(*alone, grid=grid, config=config)
            off = (out[:, :, 0] - dense[:, :, head]).square().sum() / dense.square().sum()
            assert float(off) == pytest.approx(table[group, layer, head, 1], rel=1e-3)


def test_a_goal_of_error_is_reached_and_nothing_is_done_twice(free: Path) -> None:
    asked = Asked(REQUEST, Goal("error", 0.2), PROMPTS, ())
    made = calibrate(asked)
    assert made["runs"] == 2 and made["error"] <= 0.2 and 0.05 < made["density"] < 0.9
    file = Path(made["preset"])
    assert file == Path("presets/demo-wan-error0.2.yaml") and file.stat().st_size < 50_000
    config = SparseConfig.load(file)
    schedule = config.schedule
    assert schedule.name == "table" and schedule.levels == LEVELS and schedule.dense_steps == 0.25
    assert len(schedule.groups) == 3 and schedule.sizes == (6, 2)
    made_of = config.calibrated
    assert made_of.model == "demo-wan" and made_of.tokens == (3, 8, 8) and made_of.steps == 4
    assert made_of.prompts == PROMPTS and made_of.goal.startswith("error 0.2")
    before = file.read_bytes()
    assert calibrate(asked)["runs"] == 0 and file.read_bytes() == before
    stricter = calibrate(Asked(REQUEST, Goal("error", 0.1), PROMPTS, ()))
    assert stricter["runs"] == 0 and stricter["density"] > made["density"]
    one_more = (*reversed(PROMPTS), "a small green square moves down")
    assert calibrate(Asked(REQUEST, Goal("error", 0.15), one_more, ()))["runs"] == 1
    other = Asked(REQUEST, Goal("error", 0.3), PROMPTS, (), out=file)
    with pytest.raises(InputError, match="is another preset"):
        calibrate(other)
    assert file.read_bytes() == before


# Quantiles of Student's t at 0.9 with 1, 3, 9 degrees of freedom, from printed tables.
@pytest.mark.parametrize(("preset", "lasts"), [("balanced", 4), ("tiles", 0), ("svg2", 1)])
def test_a_call_costs_what_it_costs_in_a_run(
    preset: str, lasts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orders of heads are paid once for the steps for which they last, by a clock that is known."""
    config, grid = vidsparse.SparseConfig.load(preset), vidsparse.TokenGrid(4, 8, 8)
    assert config.orders_last == lasts
    now, made = [0.0], []

    def attend(q: Tensor, *_: Any, config: Any, recall: Any, **how: Any) -> Any:
        assert how["hoisted"] and config.keep.plans == 1
        sparse = config.schedule.density < 1
        known = recall is not None and recall.find("orders", None, lasts) is not None
        made.append(bool(lasts and sparse and not known))
        if made[-1] and recall is not None:
            recall.put("orders", 0)
        now[0] += 2.0 * config.schedule.density + (0.8 if made[-1] else 0.0)
        return SimpleNamespace(out=q)

    monkeypatch.setattr(meters, "attend", attend)
    monkeypatch.setattr(meters, "perf_counter", lambda: now[0])
    meter = Meter(config, (0.1, 0.4, 1.0), (0,))
    x = torch.randn(1, grid.tokens, 2, 8)
    context = SimpleNamespace(step=0, layer=0, branch="cond")
    result = SimpleNamespace(out=x)
    meter(SimpleNamespace(context=context, q=x, k=x, v=x, result=result, grid=grid))
    one = 0.8 / 2 / lasts if lasts else 0.0  # two heads
    assert meter.costs() == pytest.approx([0.1 + one, 0.4 + one, 1.0])
    assert sum(made) == {4: 1, 0: 0, 1: 2}[lasts]


@pytest.mark.slow
def test_a_goal_of_psnr_is_tried_on_videos(free: Path) -> None:
    """The result can be run again: it gives what is said of the held-out prompt."""
    made = calibrate(Asked(REQUEST, Goal("psnr", 30.0), PROMPTS[:1], PROMPTS[1:]))
    assert abs(made["psnr"] - 30) < 3 and made["margin"] == 0
    assert "which says nothing of others" in made["reached"]
    kept = SparseConfig.load(made["preset"]).calibrated
    assert kept.held_out == PROMPTS[1:] and kept.prompts == PROMPTS[:1]
    with warnings.catch_warnings():  # also in the steps that warm up
        warnings.simplefilter("error", RuntimeWarning)
        again = psnr_of(made["preset"], PROMPTS[1])
    assert made["held_out_psnr"] == [pytest.approx(again, abs=0.05)]
    assert kept.held_out_psnr == (pytest.approx(again, abs=0.06),)


def psnr_of(preset: str, prompt: str) -> float:
    from vidsparse.generate.run import generate

    asked = Request(**SMALL, preset=preset, prompt=prompt, compare_dense=True, out="check")
    quality = generate(asked)["quality"]
    return float(quality["psnr_pool"])


@pytest.mark.slow
def test_a_goal_of_speed_is_a_budget_of_time(free: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = running.Runs.measured

    def timed(self: Any, *given: Any) -> dict[str, Any]:  # attention is half of a step
        return {**real(self, *given), "step_seconds": 2 * 2 * 6 * 2 * 0.01}

    monkeypatch.setattr(running.Runs, "measured", timed)
    made = calibrate(Asked(REQUEST, Goal("speedup", 1.2), PROMPTS[:1], ()))
    assert 1.2 <= made["speedup"] < 1.25
    with pytest.raises(InputError, match=r"--speedup 3: at most 1\.5"):
        calibrate(Asked(REQUEST, Goal("speedup", 3.0), PROMPTS[:1], ()))


@pytest.mark.slow
def test_a_killed_calibration_goes_on(free: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(REQUEST, Goal("error", 0.2), PROMPTS, ())
    real, calls = running.Runs._run, []

    def killed(self: Any, number: int, *given: Any) -> Any:
        calls.append(number)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, number, *given)

    monkeypatch.setattr(running.Runs, "_run", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate(asked)
    assert not list(Path("presets").glob("*.yaml"))
    made = calibrate(asked)
    assert made["runs"] == 1 and calls == [0, 1, 1]
    assert Path(made["preset"]).is_file()


def test_auto_takes_shipped_presets_where_the_user_has_none(free: Path) -> None:
    """The one that ships is of the model that ships; what the user has made goes before it."""
    job = prepare(REQUEST)
    pipe = load(job, Listener())
    file = provenance.calibrated_for(pipe, None)
    assert file == folder("configs/calibrated") / "demo-wan-psnr30.yaml"
    shipped = SparseConfig.load(file)
    made = shipped.calibrated
    assert made.fingerprint == job.fingerprint and shipped.schedule.sizes == (6, 2)
    assert np.mean(made.psnr) - made.margin == pytest.approx(30, abs=0.1)
    assert provenance.calibrated_for(pipe, "psnr30") == file
    Path("presets").mkdir()
    own = Path("presets/mine.yaml")
    own.write_text(file.read_text())
    assert provenance.calibrated_for(pipe, None) == own
    own.write_text(file.read_text().replace("target: psnr30", "target: error0.2"))
    assert provenance.calibrated_for(pipe, None) == own
    assert provenance.calibrated_for(pipe, "psnr30") == file


def test_videos_too_short_to_be_sparse_are_refused(free: Path) -> None:
    """A table for calls that stay dense would be judged by videos that are the dense ones."""
    changes = [one for one in CHANGES if "min_tokens" not in one]
    for least, goal in ((1024, Goal("psnr", 30)), (193, Goal("error", 0.2))):
        request = replace(REQUEST, overrides=(*changes, f"schedule.min_tokens={least}"))
        with pytest.raises(InputError, match=f"calls have 192 tokens, fewer than .*={least}: all"):
            calibrate(Asked(request, goal, PROMPTS[:1], ()))
        assert not list(Path("presets").glob("*.yaml"))


def test_videos_are_sparse_where_that_is_no_faster_and_damaged_files_are_named(free: Path) -> None:
    """With a crossover of nothing every call of the method itself would be dense."""
    request = replace(REQUEST, overrides=(*CHANGES[:-1], "kernel.crossover=0.01"))
    job = prepare(replace(request, prompt=PROMPTS[0]))
    runs = running_of([job], free)
    runs.dense(0)
    made = runs.sparse(0, job.config)
    assert made["mse"] > 0.01 and made["density"] < 0.9
    (kept,), (clip,) = free.glob("sparse-*.json"), free.glob("dense-*.mkv")
    for text in (kept.read_text()[:20], "{}", "[]"):
        kept.write_text(text)
        with pytest.raises(InputError, match=f"{kept} is damaged: delete"):
            running_of([job], free).sparse(0, job.config)
    kept.unlink()
    clip.write_bytes(clip.read_bytes()[:2000])
    with pytest.raises(InputError, match=f"{clip}.*; delete {clip}, and the same"):
        running_of([job], free).sparse(0, job.config)


def running_of(jobs: list[Any], folder: Path) -> Any:
    from vidsparse.calibrating.runs import Runs

    return Runs(jobs, folder, Listener())


def test_presets_of_other_models_and_sizes_warn_and_auto_finds_those_of_this_one(
    free: Path, recwarn: pytest.WarningsRecorder
) -> None:
    job = prepare(REQUEST)
    pipe = load(job, Listener())
    with pytest.raises(ValueError, match="'auto': no preset is calibrated for this WanPipeline"):
        vidsparse.accelerate_pipeline(pipe, "auto", target="error0.2")
    for value in (0.2, 0.1):
        calibrate(Asked(REQUEST, Goal("error", value), PROMPTS[:1], ()))
    recwarn.clear()
    vidsparse.accelerate_pipeline(pipe, "auto", target="error0.2")
    run_arm(pipe, job, "sparse", Listener())
    assert vidsparse.run_report(pipe).calls[-1].reason in (None, "dense-layer")
    assert not [w for w in recwarn if "calibrated" in str(w.message)]
    with pytest.raises(ValueError, match=r"targets error0\.1, error0\.2.*: name one"):
        vidsparse.accelerate_pipeline(pipe, "auto")
    with pytest.raises(ValueError, match="it chooses among"):
        vidsparse.accelerate_pipeline(pipe, "tiles", target="psnr30")
    vidsparse.accelerate_pipeline(pipe, "auto", target="error0.1")
    longer = prepare(Request(**{**SMALL, "frames": 9}, preset="tiles"))
    with pytest.warns(RuntimeWarning, match="calibrated on 3x8x8 tokens, and these are 5x8x8"):
        run_arm(pipe, longer, "sparse", Listener())
    vidsparse.restore_pipeline(pipe)
    pipe.transformer.register_to_config(rope_max_seq_len=512)
    with pytest.warns(RuntimeWarning, match="calibrated on demo-wan, and this pipeline has ano"):
        vidsparse.accelerate_pipeline(pipe, "presets/demo-wan-error0.1.yaml")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "one goal is needed, and none is given"),
        (["--psnr", "30", "--error", "0.1"], "and --psnr, --error is given"),
        (["--psnr", "3"], "--psnr 3: expected 10 .. 60, dB against the dense video"),
        (["--error", "0.1", "--prompt", "a", "--held-out", "a"], "is among the prompts"),
        (["--error", "0.1", *["--prompt", "a"] * 2], "--prompt 'a' is given twice"),
        (["--error", "0.1", *["--held-out", "a"] * 2], "--held-out 'a' is given twice"),
        (["--error", "0.1", "--out", "."], "--out . is a folder: name a .yaml file"),
        (["--error", "0.1", "--out", "/dev/null/a.yaml"], "no folder can be made there"),
        (["--error", "0.1", "--set", "schedule.dense_steps=0.99"], "all 4 steps of preset"),
    ],
)
def test_mistakes_are_one_line(given: list[str], said: str, free: Path) -> None:
    size = [x for key, value in SMALL.items() for x in (f"--{key}", str(value))]
    found = CliRunner().invoke(app, ["calibrate", *size, *given])
    assert found.exit_code == 2
    assert said in found.stderr and found.stderr.strip().count("\n") == 0
    assert not Path("presets").exists() or not list(Path("presets").glob("*.yaml"))


@pytest.mark.slow
def test_the_command_prints_one_document(free: Path) -> None:
    size = [x for key, value in SMALL.items() for x in (f"--{key}", str(value))]
    changes = [x for change in CHANGES for x in ("--set", change)]
    prompts = ["--prompt", PROMPTS[0], "--held-out", PROMPTS[1]]
    found = CliRunner().invoke(
        app, ["calibrate", "--error", "0.3", *size, *changes, *prompts, "--json"]
    )
    assert found.exit_code == 0, found.stderr
    content = json.loads(found.stdout)
    assert content["error"] <= 0.3 and len(content["held_out_psnr"]) == 1
    assert content["preset"] in found.stderr
