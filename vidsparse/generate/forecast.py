"""What a generation will take, from its loaded pipeline: one line before, beside the time after."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from vidsparse.costs.calibrate import calibrated
from vidsparse.costs.forward import Forward
from vidsparse.costs.machine import Machine, recognised
from vidsparse.costs.run import Plan, Prediction, predict
from vidsparse.generate.job import Job
from vidsparse.generate.model import Model, supported_class
from vidsparse.generate.request import DTYPES
from vidsparse.generate.sizes import config, read_grid
from vidsparse.generate.takes import Takes
from vidsparse.grid import TokenGrid
from vidsparse.pipelines.anatomy import forward_of
from vidsparse.pipelines.recognition import adapter_for

TEXT = 512
"""Rows of text of a pipeline that does not say how many it makes."""


def forecast(pipe: Any, job: Job) -> Prediction | None:
    """Of the denoising loop; None on a device of which nothing is known. On a CPU it measures what
    has not been measured there, in some seconds."""
    adapter = adapter_for(pipe)
    height, width, frames = job.size
    grid = TokenGrid(*read_grid(job.model).tokens(frames, height, width))
    transformer = next(iter(adapter.transformers(pipe).values()))
    forward = forward_of(transformer, adapter, grid, text_rows(job.model), DTYPES[job.dtype])
    steps = min(job.steps, int(job.steps * job.takes.strength))
    plan = Plan(forward, job.config, steps, branches(job.model, job.takes, job.settings))
    found = machine_of(job.device, forward, job)
    return None if found is None else predict(plan, *found)


def machine_of(device: str, forward: Forward, job: Any) -> tuple[Machine, float] | None:
    """The machine of a device, and the density above which it runs calls dense."""
    if device == "cpu":
        return calibrated(forward, job.config)
    found = recognised(torch.cuda.get_device_name(device))
    return None if found is None else (found, 1.0)


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
