"""What a generation will take, from its loaded pipeline: one line before, beside the time after."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vidsparse.costs import stages
from vidsparse.costs.calibrate import calibrated
from vidsparse.costs.clock import ERRORS
from vidsparse.costs.gpus import recognised
from vidsparse.costs.machine import in_words
from vidsparse.costs.run import Plan, Prediction, predict
from vidsparse.decision import requested
from vidsparse.generate.job import Job
from vidsparse.generate.model import Model, supported_class
from vidsparse.generate.request import DTYPES
from vidsparse.generate.sizes import config, read_grid
from vidsparse.generate.takes import Takes
from vidsparse.grid import TokenGrid
from vidsparse.pipelines.anatomy import forward_of
from vidsparse.pipelines.recognition import adapter_for


@dataclass(frozen=True)
class Foretold:
    """Seconds of a denoising loop, their relative standard error, and what they follow from."""

    seconds: float
    error: float
    sources: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.seconds:,.0f} s +- {ERRORS * self.error:.0%}"


TEXT = 512
"""Rows of text of a pipeline that does not say how many it makes."""


LONG = 60.0
"""Predicted seconds of a run from which on a user is told."""

ROUGH = 40e9
"""FLOP/s of a CPU thread, about: a loop that is short even so is not worth a calibration."""


def announce(pipe: Any, job: Job, say: Callable[[str], None]) -> dict[str, Foretold]:
    """What the arms of a job are predicted to take, said if that is long; empty if it is short, or
    nothing is known of the device. On a CPU it measures what has not been measured there."""
    plan = plan_of(pipe, job)
    if job.device == "cpu" and _rough(plan, job) < LONG / 2:
        return {}
    found = forecast(plan, job.device)
    if found is None:
        return {}
    errors = found.errors
    runs = {"dense": found.dense_run, "sparse": found.sparse_run}
    arms = runs if job.compare_dense else {"sparse": runs["sparse"]}
    told = {
        name: Foretold(run.seconds, errors[name], tuple(found.machine.sources()))
        for name, run in arms.items()
    }
    if sum(one.seconds for one in told.values()) >= LONG:
        each = " and ".join(f"{name} {one}" for name, one in told.items())
        sources = in_words(found.machine.sources())
        say(f"predicted for the denoising loop: {each}, from {sources} figures")
    return told


def plan_of(pipe: Any, job: Job) -> Plan:
    """What the denoising loop of a job does, from its loaded pipeline."""
    adapter = adapter_for(pipe)
    height, width, frames = job.size
    grid = TokenGrid(*read_grid(job.model).tokens(frames, height, width))
    transformer = next(iter(adapter.transformers(pipe).values()))
    forward = forward_of(transformer, adapter, grid, text_rows(job.model), DTYPES[job.dtype])
    steps = max(1, min(job.steps, int(job.steps * job.takes.strength)))
    return Plan(forward, job.config, steps, branches(job.model, job.takes, job.settings))


def forecast(plan: Plan, device: str) -> Prediction | None:
    """On a device here; None if nothing is known of it, or of what executes the calls."""
    if device != "cpu":
        found = recognised(torch.cuda.get_device_name(device))
        return None if found is None else predict(plan, found)
    if requested(plan.config, "auto") not in ("auto", "cpu"):
        return None
    return predict(plan, *calibrated(plan.forward, plan.config))


def _rough(plan: Plan, job: Job) -> float:
    """Seconds of the dense loops of a job on a CPU, about."""
    forward = plan.forward
    work = stages.around_attention(forward) + stages.dense_layer(forward) * forward.layers
    flops = sum(stage.flops for stage in work) * plan.branches * plan.steps
    return flops * (1 + job.compare_dense) / (ROUGH * torch.get_num_threads())


def text_rows(model: Model) -> int:
    """Rows of text that the model's pipeline makes of a prompt, padding included."""
    parameters = inspect.signature(supported_class(model).__call__).parameters
    known = parameters.get("max_sequence_length")
    return known.default if known is not None and isinstance(known.default, int) else TEXT


def branches(model: Model, takes: Takes, settings: Mapping[str, Any]) -> int:
    """Forwards of one sample that guidance makes of a step."""
    told = config(model, model.transformers[0])
    name = takes.names.get("guidance")
    embedded = told.get("guidance_embeds") and name == "guidance_scale"
    return 2 if name and not embedded and settings.get("guidance", 1.0) > 1 else 1
