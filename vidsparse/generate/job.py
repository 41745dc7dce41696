"""A generation job: what the user asked for, completed and checked before the weights are loaded.

What is left open comes from the card of the checkpoint, `configs/models`, and for models that no
card fits from the pipeline's own defaults.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from vidsparse.config import SparseConfig
from vidsparse.generate.memory import check_memory
from vidsparse.generate.model import Model, check_size, find_model, pipeline_class
from vidsparse.generate.model_files import InputError
from vidsparse.generate.weights import count_weights
from vidsparse.jobs.identity import fingerprint, job_id, snapshot
from vidsparse.jobs.layout import folder_name
from vidsparse.plain_values import override_list

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Our name of a dtype -> torch's."""

FPS = 16.0
"""Frames per second for models that we know nothing about."""

MOST_GUIDANCE = 100.0
"""Published models use 1 to 20; a scale of 1e30 is a slip that ends in a video of nothing."""

ARGUMENTS = {
    "height": "height",
    "width": "width",
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "guidance_2": "guidance_scale_2",
    "negative_prompt": "negative_prompt",
}
"""Our name of a setting -> the pipelines' name."""


@dataclass(frozen=True)
class Request:
    """What a user asks for; None leaves the choice to the model's defaults.

    model: folder of a pipeline, or id on the Hugging Face hub; None: the shipped demo model.
    preset, overrides: as for `accelerate_pipeline`; one string is one override.
    height, width: pixels. frames: of the video. steps: of the denoising.
    seed: of the noise; it also picks the prompt from the model's list. 0 .. 2^63 - 1.
    dtype: fp32 | bf16 | fp16; None: fp32 on a CPU, bf16 on a GPU.
    device: cpu | cuda | cuda:N; None: cuda if there is one.
    compare_dense: run the dense pipeline too, and measure against it.
    out: folder for the files, ~ is the home folder; None: one of its own in outputs/, see
        `vidsparse.jobs.layout`.
    overwrite: replace the files of another job in `out`.
    """

    model: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    preset: str = "balanced"
    overrides: str | Iterable[str] | None = ()
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    compare_dense: bool = False
    out: Path | str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Job:
    """A request in which nothing is open.

    fingerprint: of the model's files. call: arguments of the pipeline. tokens: of the video.
    notes: what the user should know of it.
    """

    model: Model
    fingerprint: str
    config: SparseConfig
    preset: str
    overrides: tuple[str, ...]
    prompt: str
    call: dict[str, Any]
    fps: float
    tokens: int
    seed: int
    dtype: str
    device: str
    compare_dense: bool
    out: Path
    overwrite: bool
    notes: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The same exactly for the same job: see `vidsparse.jobs.identity`."""
        method = self.config.to_dict()
        del method["about"]
        facts = ("fingerprint", "call", "seed", "dtype", "compare_dense")
        found = {name: getattr(self, name) for name in facts}
        return job_id({**found, "method": method, "device": _device_kind(self.device)})


def prepare(request: Request, say: Callable[[str], None] = lambda text: None) -> Job:
    """Complete and check a request. say: is told what takes a while. Raises InputError."""
    _check_texts(request)
    _check_numbers(request)
    try:
        overrides = tuple(override_list(request.overrides))
        config = SparseConfig.load(request.preset, overrides)
    except (ValueError, TypeError, OSError) as error:
        raise InputError(str(error)) from error
    device = _device(request.device)
    dtype = request.dtype
    if dtype is None:
        dtype = "fp32" if device == "cpu" else "bf16"
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    _check_method(config, device, dtype)  # what needs no model, before one is looked for
    model = find_model(None if request.model is None else str(request.model), say)
    pipeline = pipeline_class(model)
    for name in model.transformers:
        _check_method(config, device, dtype, model.head_dim(name))
    prompt = _prompt(request, model)
    call = {"prompt": prompt, **_arguments(request, model, pipeline)}
    size = call["height"], call["width"], call["num_frames"]
    job = Job(
        model=model,
        fingerprint=_fingerprint(model),
        config=config,
        preset=str(request.preset),
        overrides=overrides,
        prompt=prompt,
        call=call,
        fps=float(model.defaults.get("fps", FPS)),
        tokens=check_size(model, *size),
        seed=int(request.seed),
        dtype=dtype,
        device=device,
        compare_dense=request.compare_dense,
        out=Path(),
        overwrite=request.overwrite,
        notes=_notes(request, model, pipeline),
    )
    _check_steps(model, call["num_inference_steps"])
    _check_memory(job)
    name = folder_name(prompt, str(request.preset), size, job.seed, job.id)
    out = Path("outputs") / name if request.out is None else os.path.expanduser(request.out)
    return replace(job, out=Path(out))


def _check_texts(request: Request) -> None:
    """What a shell variable that is not set leaves behind, or bytes that are no text."""
    filled = ("model", "prompt", "preset", "out")
    for name in (*filled, "negative_prompt", "dtype", "device"):
        value = getattr(request, name)
        if value is None:
            continue
        if not isinstance(value, str | Path if name in ("model", "out", "preset") else str):
            raise InputError(f"--{name.replace('_', '-')} {value!r}: expected text")
        text = str(value)
        if name in filled and not text.strip():
            raise InputError(f"--{name} {text!r}: expected text; leave it out for its default")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"--{name.replace('_', '-')} {text!r}: expected UTF-8") from None


def _check_numbers(request: Request) -> None:
    for name in ("height", "width", "frames", "steps", "seed"):
        value = getattr(request, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise InputError(f"--{name} {value!r}: expected a whole number")
    steps, guidance = request.steps, request.guidance
    if steps is not None and steps < 1:
        raise InputError(f"--steps {steps}: expected 1 or more")
    number = isinstance(guidance, Real) and not isinstance(guidance, bool)
    if guidance is not None and not (number and 0 <= guidance <= MOST_GUIDANCE):
        raise InputError(
            f"--guidance {guidance}: expected a number 0 .. {MOST_GUIDANCE:g}; 1 switches it off"
        )
    if request.seed is None or not 0 <= request.seed < 2**63:
        raise InputError(f"--seed {request.seed}: expected 0 .. 2^63 - 1")


def _check_steps(model: Model, steps: int) -> None:
    """A scheduler takes its steps out of the time steps of the training."""
    most = model.number("scheduler/scheduler_config.json", "num_train_timesteps", 1000)
    if steps > most:
        raise InputError(f"--steps {steps}: expected 1 .. {most}, the time steps of this model")


def _check_memory(job: Job) -> None:
    """Before anything is loaded; the weights count where they are on this machine already."""
    import torch

    folder, call = Path(job.model.source), job.call
    counts = count_weights(job.model, folder) if folder.is_dir() else {}
    size = call["num_frames"], call["height"], call["width"]
    dtype = getattr(torch, DTYPES[job.dtype])
    check_memory(job.model, counts, size, job.tokens, dtype, job.device)


def _notes(request: Request, model: Model, pipeline: Any) -> tuple[str, ...]:
    """Where the settings come from that the user has not chosen, if that is no matter of course."""
    if model.card is None:
        names = ("height", "width", "frames", "steps", "guidance")
        left = ["fps", *(name for name in names if getattr(request, name) is None)]
        return (
            f"note: {model.name} has the config of no checkpoint that vidsparse knows; generic "
            f"defaults for {', '.join(left)}: {FPS:g} frames per second, and those of diffusers' "
            f"{pipeline.__name__}",
        )
    known = {model.card.name, *(name.partition("/")[2] for name in model.card.checkpoints)}
    if model.name in known:
        return ()
    return (f"note: {model.name} has the config of {model.card.name}, and gets its defaults",)


def _device(name: str | None) -> str:
    import torch  # seconds: not before the cheaper checks

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]{0,3}))?", name):
        raise InputError(f"--device {name}: expected cpu, cuda or cuda:N")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name != "cpu" and int(name.partition(":")[2] or 0) >= found:
        raise InputError(
            f"--device {name}: torch {torch.__version__} sees {found or 'no'} GPU here; leave "
            "--device out, or ask `vidsparse doctor`"
        )
    return name


def _device_kind(device: str) -> str:
    import torch

    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)


def _fingerprint(model: Model) -> str:
    """Which weights and settings these are: of the files, or the hub's commit."""
    folder = Path(model.source)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        index = try_to_load_from_cache(model.source, "model_index.json")
        folder = Path(index).parent if isinstance(index, str) else folder
    return snapshot(folder) or fingerprint(folder, model.index)


def _check_method(
    config: SparseConfig, device: str, dtype: str, head_dim: int | None = None
) -> None:
    """Raise InputError for settings that the device cannot execute; head_dim None: any."""
    import torch

    from vidsparse.decision import check_config

    try:
        check_config(config, torch.device(device), getattr(torch, DTYPES[dtype]), head_dim)
    except ValueError as error:
        raise InputError(str(error)) from error


def _prompt(request: Request, model: Model) -> str:
    if request.prompt is not None:
        return request.prompt
    if not model.prompts:
        raise InputError(f"--prompt is missing: {model.name} comes without a list of prompts")
    return model.prompts[request.seed % len(model.prompts)]


def _arguments(request: Request, model: Model, pipeline: Any) -> dict[str, Any]:
    """Arguments of the pipeline call: asked for, else the model's default, else the pipeline's."""
    parameters = inspect.signature(pipeline.__call__).parameters
    call = {}
    for ours, theirs in ARGUMENTS.items():
        value = getattr(request, ours, None)
        second_of_two = ours == "guidance_2" and request.guidance is not None
        if value is None and not second_of_two:  # one guidance asked for is meant for both
            value = model.defaults.get(ours)
        if value is None and theirs in parameters:
            value = parameters[theirs].default
        if value is not None:
            call[theirs] = value
    return call
