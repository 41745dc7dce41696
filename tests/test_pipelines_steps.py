"""Steps, branches and runs are told right, whatever the pipeline and its user do."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import tiny
import torch
import zoo.skyreels_v2

import vidsparse
from vidsparse.pipelines.position import told_by


def accelerated(name: str = "wan", scheduler: Any = None) -> tuple[Any, dict[str, Any]]:
    pipe, call = tiny.build(name)
    pipe.scheduler = scheduler or pipe.scheduler
    return vidsparse.accelerate_pipeline(pipe, tiny.SPARSE), call


def forwards(pipe: Any) -> list[tuple[int, str, str]]:
    """(step, branch, transformer) of the forwards of the last run."""
    calls = vidsparse.run_report(pipe).calls
    return [(c.step, c.branch, c.transformer) for c in calls if c.layer == 0]


def followed_run(pipe: Any, call: dict[str, Any], **override: Any) -> torch.Tensor:
    """A run in which the pipeline's own callback confirms every counted step."""
    counted = []

    def at_end(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        counted.append((i, vidsparse.run_report(pipe).calls[-1].step))
        return kwargs

    out = tiny.run(pipe, call, callback_on_step_end=at_end, **override)
    assert counted and all(i == step for i, step in counted)
    assert vidsparse.run_report(pipe).steps == len(counted)
    return out


@pytest.mark.parametrize("name", tiny.WAN)
def test_two_runs_of_every_pipeline(name: str) -> None:
    pipe, call = accelerated(name)
    runs = [followed_run(pipe, call) for _ in range(2)]
    assert torch.equal(*runs)
    steps = vidsparse.run_report(pipe).steps
    assert steps == (2 if name == "wan_v2v" else 4)
    branches = [(i, branch) for i in range(steps) for branch in ("cond", "uncond")]
    assert [(step, branch) for step, branch, _ in forwards(pipe)] == branches
    reasons = {c.step: c.reason for c in vidsparse.run_report(pipe).calls}
    assert reasons == {0: "warmup-step", **dict.fromkeys(range(1, steps))}


def test_two_transformers_share_one_count() -> None:
    pipe, call = accelerated("wan22")
    followed_run(pipe, call, num_inference_steps=6)
    found = forwards(pipe)
    assert [step for step, _, _ in found] == [i for i in range(6) for _ in range(2)]
    names = [name for _, _, name in found]
    assert names == sorted(names) and set(names) == {"transformer", "transformer_2"}


@pytest.mark.parametrize("name", ["wan", "wan_v2v"])
def test_without_guidance(name: str) -> None:
    pipe, call = accelerated(name)
    followed_run(pipe, call, guidance_scale=1.0)
    branch = "cond" if name == "wan" else "single"
    steps = vidsparse.run_report(pipe).steps
    assert forwards(pipe) == [(i, branch, "transformer") for i in range(steps)]
    followed_run(pipe, call)
    assert {b for _, b, _ in forwards(pipe)} == {"cond", "uncond"}


def test_heun_evaluates_twice_per_step() -> None:
    pipe, call = accelerated(scheduler=diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0))
    followed_run(pipe, call, num_inference_steps=3)
    assert vidsparse.run_report(pipe).steps == 5


FORCED = {
    "each frame later": ({"ar_step": 2}, [8]),
    "windows": ({"num_frames": 17, "base_num_frames": 9, "overlap_history": 5}, [4, 4, 4]),
    "both": (
        {"num_frames": 17, "base_num_frames": 9, "overlap_history": 5, "ar_step": 2},
        [8, 4, 4],
    ),
}


@pytest.mark.parametrize("case", FORCED)
def test_diffusion_forcing_walks_through_a_list_of_its_own(case: str) -> None:
    """One copy of the scheduler for each frame makes the steps; a window is a run.

    Later windows start with frames that are there already.
    """
    more, expected = FORCED[case]
    pipe, call = zoo.skyreels_v2.forced("", **more)
    pipe.set_progress_bar_config(disable=True)
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    counted: list[list[int]] = []

    def at_end(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        counted.extend([[]] if not i else [])
        assert forwards(pipe)[-2:] == [(i, branch, "transformer") for branch in ("cond", "uncond")]
        counted[-1].append(vidsparse.run_report(pipe).steps)
        return kwargs

    for _ in range(2):
        tiny.run(pipe, call, callback_on_step_end=at_end)
    assert counted == 2 * [[steps] * steps for steps in expected]


def test_exchanged_scheduler() -> None:
    pipe, call = accelerated()
    followed_run(pipe, call)
    first, pipe.scheduler = pipe.scheduler, tiny.unipc()
    followed_run(pipe, call)
    assert "step" not in first.__dict__
    vidsparse.restore_pipeline(pipe)
    assert "step" not in pipe.scheduler.__dict__


def test_run_after_an_exception_starts_at_the_first_step() -> None:
    pipe, call = accelerated()
    expected = followed_run(pipe, call)

    def fail(pipe: Any, i: int, t: Any, kwargs: Any) -> Any:
        if i == 1:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        tiny.run(pipe, call, callback_on_step_end=fail)
    assert len(forwards(pipe)) == 4, "the report of an interrupted run can be read"
    assert torch.equal(expected, followed_run(pipe, call))
    assert len(forwards(pipe)) == 8


def test_run_after_an_exception_inside_attention() -> None:
    pipe, call = accelerated()
    expected = followed_run(pipe, call)
    ffn = pipe.transformer.blocks[1].ffn
    handle = ffn.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny.run(pipe, call)
    handle.remove()
    assert torch.equal(expected, followed_run(pipe, call))


def test_a_forward_after_the_end_of_a_run_starts_another() -> None:
    pipe, call = accelerated()
    tiny.run(pipe, call)
    tiny.forward(pipe.transformer)
    assert forwards(pipe) == [(0, "single", "transformer")]


def test_run_after_an_interrupt() -> None:
    pipe, call = accelerated()

    def interrupt(pipe: Any, i: int, t: Any, kwargs: Any) -> Any:
        pipe._interrupt = i == 1
        return kwargs

    tiny.run(pipe, call, callback_on_step_end=interrupt)
    assert [step for step, _, _ in forwards(pipe)] == [0, 0, 1, 1]
    followed_run(pipe, call)


def test_the_wrapped_step_keeps_name_and_signature() -> None:
    pipe, call = accelerated()
    expected = inspect.signature(pipe.scheduler.step)

    def look(pipe: Any, i: int, t: Any, kwargs: Any) -> Any:
        assert "step" in pipe.scheduler.__dict__
        assert inspect.signature(pipe.scheduler.step) == expected
        assert pipe.scheduler.step.__name__ == "step"
        return kwargs

    tiny.run(pipe, call, callback_on_step_end=look)
    assert "step" not in pipe.scheduler.__dict__, "between runs the scheduler is untouched"


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_a_copied_scheduler_steps_itself_uncounted(duplicate: Callable[[Any], Any]) -> None:
    pipe, _ = accelerated()
    pipe.scheduler.set_timesteps(3)
    tiny.forward(pipe.transformer)
    twin, original, x = duplicate(pipe.scheduler), pipe.scheduler, torch.zeros(1, 4)
    twin.step(x, twin.timesteps[0], x)
    assert (twin.step_index, original.step_index) == (1, None)
    tiny.forward(pipe.transformer)
    assert [step for step, _, _ in forwards(pipe)] == [0, 0]


def test_two_scheduler_steps_per_evaluation_count_once() -> None:
    pipe, _ = accelerated()
    pipe.scheduler.set_timesteps(3)
    x = torch.zeros(1, 4)
    for t in pipe.scheduler.timesteps:
        tiny.forward(pipe.transformer)
        pipe.scheduler.step(x, t, x)
        pipe.scheduler._step_index -= 1
        pipe.scheduler.step(x, t, x)
    assert [step for step, _, _ in forwards(pipe)] == [0, 1, 2]


@pytest.mark.parametrize("bound", ["each time", "once"])
@pytest.mark.parametrize("scheduler", [tiny.euler, tiny.unipc])
def test_a_step_that_was_looked_up_before_the_forward(scheduler: Any, bound: str) -> None:
    """As in `scheduler.step(model(x), t, x)`: the forward wraps `step` too late for that call."""
    pipe, _ = accelerated(scheduler=scheduler())
    x = torch.zeros(1, 16, 3, 8, 12)
    for _ in range(2):
        pipe.scheduler.set_timesteps(4)
        step = pipe.scheduler.step
        for t in pipe.scheduler.timesteps:
            if bound == "each time":
                pipe.scheduler.step(tiny.forward(pipe.transformer), t, x)
            else:
                step(tiny.forward(pipe.transformer), t, x)
        assert [step for step, *_ in forwards(pipe)] == [0, 1, 2, 3]


def test_a_loop_that_is_never_counted_raises() -> None:
    pipe, _ = accelerated()
    pipe.scheduler.set_timesteps(20)
    foreign = copy.deepcopy(pipe.scheduler)
    x = torch.zeros(1, 4)
    with pytest.raises(RuntimeError, match=r"with vidsparse\.step\(index, total"):
        for t in foreign.timesteps:
            tiny.forward(pipe.transformer)
            foreign.step(x, t, x)
    assert len(forwards(pipe)) == 8


def test_manual_steps_outrank_counting() -> None:
    pipe, call = accelerated()
    expected = tiny.run(pipe, call)
    order = [(i, branch) for i in range(10) for branch in ("cond", "uncond")]
    for _ in range(2):
        for i, branch in order:
            with vidsparse.step(i, 10, branch):
                tiny.forward(pipe.transformer)
        assert [(i, b) for i, b, _ in forwards(pipe)] == order, "each run has its own report"
    assert vidsparse.run_report(pipe).steps == 10
    assert torch.equal(expected, followed_run(pipe, call))


def test_manual_step_arguments() -> None:
    for index, total in ((3, 3), (-1, 3), (0, 0)):
        with pytest.raises(ValueError, match="0 <= index < total"), vidsparse.step(index, total):
            pass
    for index, total in ((0.5, 3), (0, 3.0), (False, 3), (0, True)):
        with pytest.raises(TypeError, match="two integers"), vidsparse.step(index, total):  # type: ignore[arg-type]
            pass
    with pytest.raises(ValueError, match="cond, uncond"), vidsparse.step(0, 3, "left"):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize(
    ("name", "branch"),
    [
        ("left", "cond"),
        ("pred_cond_skip", "cond"),
        ("pred_uncond", "uncond"),
        ("uncond_modality", "uncond"),
        ("pred_cond_uncond", "both"),
    ],
)
def test_names_of_contexts_that_pipelines_invent(name: str, branch: str) -> None:
    pipe, _ = accelerated()
    pipe.scheduler.set_timesteps(2)
    with pipe.transformer.cache_context(name):
        tiny.forward(pipe.transformer)
    assert forwards(pipe) == [(0, branch, "transformer")]
    assert {c.context_name for c in vidsparse.run_report(pipe).calls} == {name}
    with pipe.transformer.cache_context(name), vidsparse.step(0, 3, "both"):
        tiny.forward(pipe.transformer)
    assert forwards(pipe) == [(0, "both", "transformer")]


@pytest.mark.parametrize(("index", "total"), [(0, 1), (0, 3), (2, 3)])
def test_a_context_that_tells_its_step(index: int, total: int) -> None:
    told = SimpleNamespace(step_index=index, num_inference_steps=total)
    assert told_by(told) == (index, total)


@pytest.mark.parametrize(
    ("index", "total"),
    [(3, 3), (-1, 3), (0, 0), (None, 3), (0, None), (True, 3), (0, True), (1.0, 3), (1, 3.0)],
)
def test_a_context_that_tells_no_step(index: Any, total: Any) -> None:
    """Its forwards are counted instead."""
    assert told_by(SimpleNamespace(step_index=index, num_inference_steps=total)) is None
    assert told_by(SimpleNamespace(step_index=index)) is None and told_by(None) is None


def test_both_branches_in_one_batch() -> None:
    pipe, _ = accelerated()
    pipe.scheduler.set_timesteps(2)
    with pipe.transformer.cache_context("cond_uncond"):
        tiny.forward(pipe.transformer)
    assert forwards(pipe) == [(0, "both", "transformer")]
