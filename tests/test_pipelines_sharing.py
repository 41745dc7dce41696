"""One accelerated transformer in many pipelines: each runs as if it were alone.

What a run gives, pixels and (step, branch, reason) of every call, is compared with the same run on
a fresh pipeline that nothing else touches.
"""

from __future__ import annotations

import copy
import functools
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import tiny
import torch

import vidsparse

FAMILIES = ("wan", "wan_v2v", "wan22")


def trace(pipe: Any) -> list[tuple[int, int, str, str | None]]:
    report = vidsparse.run_report(pipe)
    return [(call.step, report.steps, call.branch, call.reason) for call in report.calls]


@functools.cache
def alone(name: str) -> tuple[torch.Tensor, list[Any]]:
    """Pixels and calls of a run in a fresh pipeline."""
    pipe, call = accelerated(name)
    out = tiny.run(pipe, call)
    assert {reason for *_, reason in trace(pipe)} == {"warmup-step", None}
    return out, trace(pipe)


def accelerated(name: str) -> tuple[Any, dict[str, Any]]:
    pipe, call = tiny.build(name)
    return vidsparse.accelerate_pipeline(pipe, tiny.SPARSE), call


def check(name: str, pipe: Any, call: dict[str, Any], **override: Any) -> None:
    """A run of `pipe` is that of `name` alone."""
    out = tiny.run(pipe, call, **override)
    expected, calls = alone(name)
    assert trace(pipe) == calls
    assert torch.equal(out, expected)


def request(pipe: Any, scheduler: Any) -> Any:
    new = copy.copy(pipe)
    new.scheduler = scheduler
    return new


COPIES: dict[str, Callable[[Any], Any]] = {
    "deep": lambda p: request(p, copy.deepcopy(p.scheduler)),
    "shallow": lambda p: request(p, copy.copy(p.scheduler)),
    "pickled": lambda p: request(p, pickle.loads(pickle.dumps(p.scheduler))),
    "from_config": lambda p: request(p, type(p.scheduler).from_config(p.scheduler.config)),
    "same_scheduler": copy.copy,
    "from_pipe": lambda p: type(p).from_pipe(p),
    "components": lambda p: type(p)(**p.components, **extras(p)),
}


def extras(pipe: Any) -> dict[str, Any]:
    """Settings of the constructor that are no components."""
    names = ("boundary_ratio", "expand_timesteps")
    return {name: pipe.config[name] for name in names if name in pipe.config}


@pytest.mark.parametrize("made", ["before", "within"])
@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_pipeline(how: str, made: str) -> None:
    """made: before accelerating, or within a run."""
    copies: list[Any] = []

    def within(pipe: Any, i: int, t: Any, kwargs: Any) -> Any:
        if i == 1:
            copies.append(COPIES[how](pipe))
        return kwargs

    pipe, call = tiny.build("wan_v2v")
    if made == "before":
        copies.append(COPIES[how](pipe))
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    check("wan_v2v", pipe, call, callback_on_step_end=within if made == "within" else None)
    twin = copies[0]
    twin.set_progress_bar_config(disable=True)
    assert "has not run yet" in str(vidsparse.run_report(twin))
    for each in (twin, pipe):
        check("wan_v2v", each, call)
    assert vidsparse.run_report(twin) is not vidsparse.run_report(pipe)
    for each in (twin, pipe):
        assert not {"step", "__reduce_ex__"} & set(vars(each.scheduler))


@pytest.mark.parametrize("name", [*FAMILIES, "wan_i2v"])
def test_a_request_copy_of_every_pipeline(name: str) -> None:
    pipe, call = accelerated(name)
    for _ in range(2):
        check(name, request(pipe, copy.deepcopy(pipe.scheduler)), call)
    assert not vidsparse.run_report(pipe).calls, "the original has not run"


def test_another_class_on_the_same_transformer() -> None:
    pipe, call = accelerated("wan")
    video = diffusers.WanVideoToVideoPipeline.from_pipe(pipe, scheduler=tiny.unipc())
    video.set_progress_bar_config(disable=True)
    arguments = tiny.build("wan_v2v")[1]
    for _ in range(2):
        check("wan_v2v", video, arguments)
        check("wan", pipe, call)


def test_a_copy_when_the_original_is_gone() -> None:
    pipe, call = accelerated("wan_v2v")
    twin = request(pipe, copy.deepcopy(pipe.scheduler))
    holder = [pipe]
    del pipe

    def drop(pipe: Any, i: int, t: Any, kwargs: Any) -> Any:
        holder.clear()
        gc.collect()
        return kwargs

    for _ in range(2):
        check("wan_v2v", twin, call, callback_on_step_end=drop)
    with pytest.raises(RuntimeError, match=r"is gone.*vidsparse\.step"):
        tiny.forward(twin.transformer)


def test_two_pipelines_that_share_a_scheduler_restored_in_any_order() -> None:
    for order in (0, 1):
        pipes = [accelerated("wan_v2v"), accelerated("wan_v2v")]
        pipes[1][0].scheduler = pipes[0][0].scheduler

        def nested(pipe: Any, i: int, t: Any, kwargs: Any, out: Any = pipes[order][0]) -> Any:
            vidsparse.restore_pipeline(out)
            return kwargs

        for pipe, call in [*pipes, *pipes]:
            check("wan_v2v", pipe, call)
        pipe, call = pipes[1 - order]
        check("wan_v2v", pipe, call, callback_on_step_end=nested)
        check("wan_v2v", pipe, call)
        vidsparse.restore_pipeline(pipe)
        assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_of_a_copy_inside_a_callback(name: str) -> None:
    pipe, call = accelerated(name)
    twin = request(pipe, copy.deepcopy(pipe.scheduler))

    def preview(pipe: Any, i: int, t: Any, kwargs: Any) -> Any:
        check(name, twin, call)
        return kwargs

    check(name, pipe, call, callback_on_step_end=preview)


@pytest.mark.parametrize("name", [*FAMILIES, "wan_i2v"])
def test_a_scheduler_exchanged_during_a_run(name: str) -> None:
    def exchange(pipe: Any, i: int, t: Any, kwargs: Any) -> Any:
        old = pipe.scheduler
        pipe.scheduler = type(old).from_config(old.config)
        pipe.scheduler.set_timesteps(tiny.STEPS)
        return kwargs

    pipe, call = accelerated(name)
    for _ in range(2):
        out = tiny.run(pipe, call, callback_on_step_end=exchange)
        assert trace(pipe) == alone(name)[1]
        if name in ("wan", "wan_i2v"):  # Euler keeps nothing between steps
            assert torch.equal(out, alone(name)[0])
    check(name, pipe, call)


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("at", ["forward", "callback"])
@pytest.mark.parametrize("name", FAMILIES)
def test_runs_after_an_interrupted_one(name: str, at: str) -> None:
    pipe, call = accelerated(name)
    twin = request(pipe, copy.deepcopy(pipe.scheduler))

    def stop(pipe: Any, i: int, t: Any, kwargs: Any) -> Any:
        if i == 1:
            raise Stopped
        return kwargs

    def hook(*_: Any) -> None:
        if len(vidsparse.run_report(pipe).calls) == 3:
            raise Stopped

    block = pipe.transformer.blocks[1]
    handle = block.register_forward_pre_hook(hook) if at == "forward" else None
    with pytest.raises(Stopped):
        tiny.run(pipe, call, callback_on_step_end=stop)
    if handle:
        handle.remove()
    request_copy = request(pipe, copy.copy(pipe.scheduler))
    for each in (twin, pipe, request_copy, pipe):
        check(name, each, call)


def test_a_loop_in_a_generator_that_is_closed() -> None:
    class Streaming(diffusers.WanVideoToVideoPipeline):
        def stream(self, count: int) -> Iterator[None]:
            self.scheduler.set_timesteps(count)
            x = torch.zeros(1, 16, 3, 8, 12)
            for t in self.scheduler.timesteps:
                noise = tiny.forward(self.transformer)
                x = self.scheduler.step(noise, t, x).prev_sample
                yield

    pipe, _ = accelerated("wan")
    stream = Streaming(**{k: v for k, v in pipe.components.items() if k in ARGUMENTS})
    for taken in (1, 3, 2):
        steps = stream.stream(3)
        for _ in range(taken):
            next(steps)
        steps.close()
        found = [step for step, *_ in trace(stream)][::2]
        assert found == list(range(taken)) and vidsparse.run_report(stream).steps == 3


ARGUMENTS = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")


class Plain:
    """A pipeline of somebody's own: no base class, and a scheduler copied for each call."""

    def __init__(self, pipe: Any, hidden: bool) -> None:
        self.transformer = pipe.transformer
        self.scheduler = copy.deepcopy(pipe.scheduler)
        self.hidden = hidden

    def __call__(self, count: int) -> None:
        scheduler = self.scheduler
        scheduler.set_timesteps(count)
        scheduler = copy.deepcopy(scheduler) if self.hidden else scheduler
        x = torch.zeros(1, 16, 3, 8, 12)
        for t in scheduler.timesteps:
            for branch in ("cond", "uncond"):
                with self.transformer.cache_context(branch):
                    noise = tiny.forward(self.transformer)
            x = scheduler.step(noise, t, x).prev_sample
        self.transformer._reset_stateful_cache()


def test_a_pipeline_of_another_make() -> None:
    pipe, _ = accelerated("wan")
    own = Plain(pipe, hidden=False)
    own(3)
    runs = vidsparse.pipelines.installation.installation_of(pipe.transformer)
    assert runs is not None
    calls = [(c.step, c.branch, c.reason) for c in runs.report(own).calls][::2]
    reason = {0: "warmup-step", 1: None, 2: None}
    assert calls == [(i, b, reason[i]) for i in range(3) for b in ("cond", "uncond")]


def test_a_run_of_which_no_step_was_seen_says_so() -> None:
    pipe, call = accelerated("wan")
    with pytest.warns(RuntimeWarning, match=r"no step in this run of Plain.*step 0 of 3"):
        Plain(pipe, hidden=True)(3)
    with pytest.raises(RuntimeError, match=r"cannot follow this loop: 0 of 5 steps"):
        Plain(pipe, hidden=True)(5)
    check("wan", pipe, call)


@pytest.mark.parametrize("wrap", [functools.partial, lambda step: lambda *a, **k: step(*a, **k)])
def test_a_wrapped_step(wrap: Callable[[Any], Any]) -> None:
    pipe, call = accelerated("wan_v2v")
    pipe.scheduler.step = theirs = wrap(pipe.scheduler.step)
    for _ in range(2):
        check("wan_v2v", pipe, call)
        assert pipe.scheduler.step is theirs
    vidsparse.restore_pipeline(pipe)
    assert pipe.scheduler.step is theirs


@pytest.mark.parametrize("kind", [list, torch.Tensor.numpy, "made anew"])
def test_timesteps_that_are_no_tensor(kind: Any) -> None:
    class Anew(diffusers.FlowMatchEulerDiscreteScheduler):
        kept: Any = None

        @property
        def timesteps(self) -> Any:
            return None if self.kept is None else self.kept.clone()

        @timesteps.setter
        def timesteps(self, values: Any) -> None:
            self.kept = values

    pipe, _ = accelerated("wan")
    if kind == "made anew":
        pipe.scheduler = Anew(shift=5.0)
    scheduler, x = pipe.scheduler, torch.zeros(1, 16, 3, 8, 12)
    for _ in range(2):
        scheduler.set_timesteps(3)
        steps = scheduler.timesteps
        if kind != "made anew":
            scheduler.timesteps = kind(steps)
        for i, t in enumerate(steps):
            tiny.forward(pipe.transformer)
            scheduler._step_index = i
            scheduler.step(x, t, x)
        assert [step for step, *_ in trace(pipe)][::2] == [0, 1, 2]
        assert vidsparse.run_report(pipe).steps == 3
        pipe.transformer._reset_stateful_cache()


def test_a_scheduler_without_timesteps() -> None:
    pipe, _ = accelerated("wan")
    for scheduler in (None, pipe.scheduler):
        pipe.scheduler = scheduler
        if scheduler is not None:
            scheduler.timesteps = None
        with pytest.raises(RuntimeError, match=r"no timesteps.*set_timesteps.*vidsparse\.step"):
            tiny.forward(pipe.transformer)
        with vidsparse.step(1, 3):
            tiny.forward(pipe.transformer)
        context = pipe.transformer.cache_context("uncond", step_index=2, num_inference_steps=5)
        with context:
            tiny.forward(pipe.transformer)
        assert {c[:3] for c in trace(pipe)} == {(2, 5, "uncond")}


def test_a_loop_of_ones_own_after_a_shorter_run() -> None:
    pipe, call = accelerated("wan")
    tiny.run(pipe, call, num_inference_steps=2)
    pipe.scheduler.set_timesteps(5)
    x = torch.zeros(1, 16, 3, 8, 12)
    for t in pipe.scheduler.timesteps:
        tiny.forward(pipe.transformer)
        pipe.scheduler.step(x, t, x)
    assert {c[1] for c in trace(pipe)} == {5} and len(trace(pipe)) == 10


def test_many_forwards_in_one_step_of_a_pipeline() -> None:
    """Tiles of a large video, for example."""

    class Tiled(diffusers.WanPipeline):
        def __call__(self) -> None:  # type: ignore[override]
            self.scheduler.set_timesteps(3)
            x = torch.zeros(1, 16, 3, 8, 12)
            for t in self.scheduler.timesteps:
                self._current_timestep = t
                for _ in range(12):
                    tiny.forward(self.transformer)
                x = self.scheduler.step(x, t, x).prev_sample
            self.maybe_free_model_hooks()

    pipe, _ = accelerated("wan")
    tiled = Tiled.from_pipe(pipe)
    tiled()
    assert [step for step, *_ in trace(tiled)][::24] == [0, 1, 2]
