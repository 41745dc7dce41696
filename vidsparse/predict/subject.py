"""What a run would do: the model, its size and schedule, from configs alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vidsparse.costs.calibrate import calibrated
from vidsparse.costs.gpus import named, names, recognised
from vidsparse.costs.machine import Machine
from vidsparse.costs.run import Plan, Prediction, predict
from vidsparse.generate.completing import settings_for
from vidsparse.generate.forecast import branches, text_rows
from vidsparse.generate.job import chosen_method
from vidsparse.generate.model import (
    Model,
    component_class,
    family_of,
    find_model,
    supported_class,
    with_pipeline,
)
from vidsparse.generate.model_files import InputError, first_line
from vidsparse.generate.request import DTYPES, Request, check_numbers, check_texts
from vidsparse.generate.sizes import check_size, config, read_grid
from vidsparse.generate.takes import Takes, read_takes
from vidsparse.grid import TokenGrid
from vidsparse.pipelines.anatomy import forward_of
from vidsparse.predict.known import known


@dataclass(frozen=True)
class Subject:
    """A run that is to be predicted.

    settings: by our names. weights: numbers in all transformers. preset: name and overrides.
    """

    model: Model
    settings: dict[str, Any]
    preset: str
    plan: Plan
    weights: int

    @property
    def size(self) -> tuple[int, int, int]:
        """Height and width in pixels, frames."""
        return self.settings["height"], self.settings["width"], self.settings.get("frames", 1)


def subject(request: Request, dtype: str) -> Subject:
    """Complete a request without its weights. dtype: of ours. Raises InputError."""
    check_texts(request)
    check_numbers(request)
    source = None if request.model is None else str(request.model)
    return subject_of(known(source) or find_model(source), request, dtype)


def subject_of(model: Model, request: Request, dtype: str) -> Subject:
    """As `subject`, of a model that has been found."""
    if request.pipeline is not None:
        model = with_pipeline(model, request.pipeline)
    takes = _takes(model)
    preset, method, overrides = chosen_method(request, model)
    settings = settings_for(request, model, takes)
    if not takes.sized:  # the pipeline takes the size from an image, which is not here
        given = {"height": request.height, "width": request.width}
        settings |= {name: value for name, value in given.items() if value is not None}
    lacks = [n for n in ("height", "width", "steps") if n not in settings]
    if lacks:
        options = " and ".join(f"--{name}" for name in lacks)
        are = "is" if len(lacks) == 1 else "are"
        raise InputError(f"{options} {are} missing: nobody says what {model.name} is good at")
    size = settings["height"], settings["width"], settings.get("frames")
    check_size(model, *size)
    tokens = read_grid(model).tokens(size[2] or 1, size[0], size[1])
    adapter = family_of(model)
    transformers = [_on_meta(model, name) for name in model.transformers]
    forward = forward_of(
        transformers[0], adapter, TokenGrid(*tokens), text_rows(model), DTYPES[dtype]
    )
    forwards = branches(model, takes, settings)
    plan = Plan(forward, method, settings["steps"], forwards, request.ulysses)
    weights = sum(w.numel() for one in transformers for w in one.parameters())
    return Subject(model, settings, " ".join([preset, *overrides]), plan, weights)


def dtype_of(request: Request, gpu: bool) -> str:
    """Our name of the dtype. Raises InputError for one that is none, or not one of a GPU's."""
    if request.dtype not in (None, *DTYPES):
        raise InputError(f"--dtype {request.dtype}: expected one of {', '.join(DTYPES)}")
    if gpu and request.dtype == "fp32":
        raise InputError(
            "--dtype fp32: the figures of GPUs are of bf16 and fp16; take --dtype bf16"
        )
    return request.dtype or ("bf16" if gpu else "fp32")


def _takes(model: Model) -> Takes:
    try:
        return read_takes(supported_class(model))
    except ValueError as error:
        raise InputError(f"--model {model.source}: {error}") from error


def _on_meta(model: Model, name: str) -> torch.nn.Module:
    """A transformer of the model without memory for its weights."""
    with torch.device("meta"):
        try:
            made: torch.nn.Module = component_class(model, name).from_config(config(model, name))
        except Exception as error:
            raise model.refuse(f"{name} cannot be built: {first_line(error)}") from error
    return made


def predicted(request: Request, gpu: str | None) -> tuple[Subject, Prediction]:
    """gpu: a name of `configs/machines.yaml`; "this"; None: the GPU here, else this CPU.

    Raises InputError.
    """
    machine = _gpu(gpu)
    found = subject(request, dtype_of(request, machine is not None))
    if request.ulysses > 1 and machine is None:
        raise InputError(
            f"--ulysses {request.ulysses}: what this CPU sends to another one is not known; name "
            "GPUs, as --gpu H100"
        )
    _check_shares(found)
    if machine is not None:
        return found, predict(found.plan, machine)
    try:
        return found, predict(found.plan, *calibrated(found.plan.forward, found.plan.config))
    except ValueError as error:  # what this CPU cannot execute
        raise InputError(str(error)) from error


def _check_shares(found: Subject) -> None:
    """Raise InputError for what `pipelines.parallel` refuses."""
    devices, forward = found.plan.devices, found.plan.forward
    sizes = {"attention heads": forward.heads, "video tokens": forward.grid.other_tokens}
    for what, size in sizes.items():
        if not devices >= 1 or size % devices:
            raise InputError(
                f"--ulysses {devices}: {size:,} {what} of {found.model.name} do not divide into it"
            )


def _gpu(name: str | None) -> Machine | None:
    """The machine that is meant; None is this CPU."""
    if name not in (None, "this"):
        try:
            return named(str(name))
        except ValueError as error:
            raise InputError(str(error)) from error
    if not torch.cuda.is_available():
        if name is None:
            return None
        raise InputError("--gpu this: torch sees no GPU here; leave --gpu out for this CPU")
    device = torch.cuda.get_device_name()
    machine = recognised(device)
    if machine is None:
        raise InputError(f"--gpu this: nothing is known of a {device}; give one of {names()}")
    return machine
