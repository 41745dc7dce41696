"""A generation job: what the user asked for, completed and checked before the weights are loaded.

What is left open comes from the card of the checkpoint, `configs/models`, and for models that no
card fits from the pipeline's own defaults.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vidsparse.config import SparseConfig
from vidsparse.generate import ranks
from vidsparse.generate.completing import FPS, fit, read_inputs, settings_for, what_it_takes
from vidsparse.generate.inputs import Picture
from vidsparse.generate.memory import check_memory
from vidsparse.generate.model import Model, find_model, pipeline_class, with_pipeline
from vidsparse.generate.model_files import InputError
from vidsparse.generate.request import DTYPES, Request, check_numbers, check_texts
from vidsparse.generate.sizes import check_size
from vidsparse.generate.takes import Takes
from vidsparse.generate.weights import count_weights
from vidsparse.jobs.identity import fingerprint, job_id, snapshot
from vidsparse.jobs.layout import folder_name
from vidsparse.plain_values import override_list

PRESET = "balanced"
"""For models whose card names none."""


@dataclass(frozen=True)
class Job:
    """A request in which nothing is open.

    fingerprint: of the model's files. takes: what its pipeline is called with. settings: by our
    names, those that are None left out. inputs: in the size of the video.
    tokens: of the video. threads: of torch on a CPU, None: its own number. ulysses: processes that
    share it, which changes no more than the last bits.
    notes: what the user should know of it.
    """

    model: Model
    takes: Takes
    fingerprint: str
    config: SparseConfig
    preset: str
    overrides: tuple[str, ...]
    prompt: str
    settings: dict[str, Any]
    inputs: tuple[Picture, ...]
    tokens: int
    seed: int
    dtype: str
    device: str
    compare_dense: bool
    out: Path
    overwrite: bool
    threads: int | None = None
    ulysses: int = 1
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Of the denoising."""
        return int(self.settings["steps"])

    @property
    def size(self) -> tuple[int, int, int]:
        """Height and width in pixels, frames."""
        return self.settings["height"], self.settings["width"], self.settings.get("frames", 1)

    @property
    def fps(self) -> float:
        """Frames per second of the video."""
        return float(self.settings["fps"])

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline, without the inputs."""
        names, settings = self.takes.names, self.settings
        call = {"prompt": self.prompt}
        call |= {theirs: settings[ours] for ours, theirs in names.items() if ours in settings}
        if self.takes.area:
            call["max_area"] = settings["height"] * settings["width"]
        return call

    @property
    def id(self) -> str:
        """The same exactly for the same job: see `vidsparse.jobs.identity`."""
        method = self.config.method
        facts = {name: getattr(self, name) for name in ("fingerprint", "call", "seed", "dtype")}
        facts |= {"compare_dense": self.compare_dense, "method": method}
        facts["device"] = _device_kind(self.device)
        if self.inputs:
            facts["inputs"] = {one.option: one.sha256 for one in self.inputs}
        if "flow_shift" in self.settings:
            facts["flow_shift"] = self.settings["flow_shift"]
        if self.threads is not None:
            facts["threads"] = self.threads
        return job_id({**facts, "pipeline": self.takes.pipeline})


def prepare(request: Request, say: Callable[[str], None] = lambda text: None) -> Job:
    """Complete and check a request. say: is told what takes a while. Raises InputError."""
    check_texts(request)
    check_numbers(request)
    ranks.check(request.ulysses, "generate")
    device = ranks.place(request.ulysses, device_of(request.device))
    if request.dtype not in (None, *DTYPES):
        raise InputError(f"--dtype {request.dtype}: expected one of {', '.join(DTYPES)}")
    if request.preset is not None:  # what needs no model, before one is looked for
        config, _ = _method(request.preset, request.overrides)
        _check_method(config, device, request.dtype or _dtype(device, None))
    model = find_model(None if request.model is None else str(request.model), say)
    if request.pipeline is not None:
        model = with_pipeline(model, request.pipeline)
    takes = what_it_takes(request, model, pipeline_class(model))
    preset, config, overrides = chosen_method(request, model)
    if device == "cpu":
        config, overrides = _pinned(config, overrides)
    dtype = request.dtype or _dtype(device, model)
    for name in model.transformers:
        _check_method(config, device, dtype, model.head_dim(name))
    prompt = _prompt(request, model)
    settings = settings_for(request, model, takes)
    _check_steps(model, takes, settings["steps"])
    pictures = read_inputs(request, settings)
    settings, notes = fit(settings, request, model, takes, pictures)
    size = settings["height"], settings["width"], settings.get("frames")
    tokens = check_size(model, *size)
    job = Job(
        model=model,
        takes=takes,
        fingerprint=_fingerprint(model),
        config=config,
        preset=preset,
        overrides=overrides,
        prompt=prompt,
        settings=settings,
        inputs=tuple(one.at(size[0], size[1], size[2] or 1) for one in pictures),
        tokens=tokens,
        seed=int(request.seed),
        dtype=dtype,
        device=device,
        compare_dense=request.compare_dense,
        out=Path(),
        overwrite=request.overwrite,
        threads=request.threads if device == "cpu" else None,
        ulysses=request.ulysses,
        notes=(*_notes(request, model, takes), *notes),
    )
    _check_memory(job)
    return placed(job, request.out)


def placed(job: Job, out: Path | str | None) -> Job:
    """The job in a folder; None: one of its own in outputs/."""
    if out is not None:
        return replace(job, out=Path(os.path.expanduser(out)))
    name = folder_name(job.prompt, job.preset, job.size, job.seed, job.id)
    return replace(job, out=Path("outputs") / name)


def _method(
    preset: str | Path, overrides: str | Iterable[str] | None
) -> tuple[SparseConfig, tuple[str, ...]]:
    """A preset with its overrides. Raises InputError."""
    try:
        changes = tuple(override_list(overrides))
        return SparseConfig.load(preset, changes), changes
    except (ValueError, TypeError, OSError) as error:
        raise InputError(str(error)) from error


def chosen_method(request: Request, model: Model) -> tuple[str, SparseConfig, tuple[str, ...]]:
    """Name, settings and overrides; what the user did not choose is the card's. Raises
    InputError."""
    if request.preset is not None:
        return (str(request.preset), *_method(request.preset, request.overrides))
    _, asked = _method(PRESET, request.overrides)
    card = model.card.preset if model.card else None
    if card is None:
        return (PRESET, *_method(PRESET, asked))
    return (card.name, *_method(card.name, (*card.overrides, *asked)))


def _pinned(
    config: SparseConfig, overrides: tuple[str, ...]
) -> tuple[SparseConfig, tuple[str, ...]]:
    """With the route that the environment asks for: it decides the pixels, wherever that is."""
    from vidsparse.kernels.cpu import contest

    try:
        route = contest.pinned(config.kernel.cpu_route)
    except ValueError as error:
        raise InputError(str(error)) from error
    if route == config.kernel.cpu_route:
        return config, overrides
    change = f"kernel.cpu_route={route}"
    return config.override(change), (*overrides, change)


def _dtype(device: str, model: Model | None) -> str:
    """What is usual on the device, for the model if its card says so."""
    if device == "cpu":
        return "fp32"
    return str(model.defaults.get("dtype", "bf16")) if model else "bf16"


def _check_steps(model: Model, takes: Takes, steps: int) -> None:
    """A scheduler takes its steps out of the time steps of the training; one is done at least."""
    if steps < takes.fewest:
        raise InputError(f"--steps {steps}: a {takes.pipeline} takes {takes.fewest} at least")
    most = model.number("scheduler/scheduler_config.json", "num_train_timesteps", 1000)
    if steps > most:
        raise InputError(f"--steps {steps}: expected 1 .. {most}, the time steps of this model")


def _check_memory(job: Job) -> None:
    """Before anything is loaded; the weights count where they are on this machine already."""
    import torch

    folder = Path(job.model.source)
    counts = count_weights(job.model, folder) if folder.is_dir() else {}
    height, width, frames = job.size
    dtype = getattr(torch, DTYPES[job.dtype])
    own = job.tokens if job.device == "cpu" else -(-job.tokens // job.ulysses)
    check_memory(job.model, counts, (frames, height, width), own, dtype, job.device)


def _notes(request: Request, model: Model, takes: Takes) -> tuple[str, ...]:
    """Where the settings come from that the user has not chosen, if that is no matter of course."""
    if model.card is None:
        names = ("height", "width", "frames", "steps", "guidance")
        left = ["fps", *(name for name in names if getattr(request, name) is None)]
        return (
            f"note: {model.name} has the config of no checkpoint that vidsparse knows; generic "
            f"defaults for {', '.join(left)}: {FPS:g} frames per second, and those of diffusers' "
            f"{takes.pipeline}",
        )
    known = {model.card.name, *(name.partition("/")[2] for name in model.card.checkpoints)}
    if model.name in known:
        return ()
    return (f"note: {model.name} has the config of {model.card.name}, and gets its defaults",)


def device_of(name: str | None) -> str:
    """What is asked for, if it is here; None: cuda if there is one. Raises InputError."""
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
