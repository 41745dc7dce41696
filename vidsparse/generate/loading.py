"""A pipeline from the files of a model, complete and proven to run, or an InputError."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidsparse.generate.completing import shift_key
from vidsparse.generate.job import Job
from vidsparse.generate.memory import is_out_of_memory
from vidsparse.generate.model import PRECISE, Model, component_class, pipeline_class
from vidsparse.generate.model_files import first_line, hub_error, listed
from vidsparse.generate.sizes import read_grid
from vidsparse.generate.weights import count_weights, weighty

TILED = ("AutoencoderKLAllegro",)
"""Autoencoders that decode in tiles only."""


def load_pipeline(model: Model, dtype: torch.dtype, device: str, say: Callable[[str], None]) -> Any:
    """The pipeline in a dtype, but the autoencoder of Wan in fp32. say: is told what is odd.

    Raises InputError for whatever diffusers or transformers say against the files.
    """
    kind = pipeline_class(model)
    folder = Path(model.source) if Path(model.source).is_dir() else _download(model, kind)
    count_weights(model, folder)
    parts = {}
    for name in weighty(model):
        wanted = torch.float32 if model.components[name][1] in PRECISE else dtype
        parts[name] = _load_part(model, folder, name, wanted, say)
    try:
        pipe = kind.from_pretrained(folder, dtype=dtype, **parts, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        if model.components["vae"][1] in TILED:
            pipe.vae.enable_tiling()
        return pipe.to(device)
    except Exception as error:
        raise _refusal(model, error) from error


def _download(model: Model, kind: Any) -> Path:
    try:
        return Path(kind.download(model.source, use_safetensors=True))
    except Exception as error:
        raise hub_error(model.source, error) from error


def _load_part(
    model: Model, folder: Path, name: str, dtype: torch.dtype, say: Callable[[str], None]
) -> torch.nn.Module:
    """A component with all of its weights. The libraries would make up those that are missing."""
    try:
        part, info = component_class(model, name).from_pretrained(
            folder / name,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
        )
    except Exception as error:
        raise _refusal(model, error, f"{name} ") from error
    empty = [key for key, tensor in part.state_dict().items() if tensor.is_meta]
    missing = sorted({*info["missing_keys"], *empty})
    if missing or info["mismatched_keys"]:
        unlike = missing or sorted(map(str, info["mismatched_keys"]))
        raise model.refuse(
            f"{name} cannot be loaded: {len(unlike)} of its tensors are missing in its files or of "
            f"another shape, as {listed(unlike, 1)}; download it again"
        )
    unused = sorted(info["unexpected_keys"])
    if unused:
        say(f"note: {len(unused)} tensors of {name} have no place in its config: {listed(unused)}")
    module: torch.nn.Module = part
    return module


def _refusal(model: Model, error: Exception, what: str = "") -> Exception:
    """What a library says against a model, as our error; lack of memory stays what it is."""
    if is_out_of_memory(error):
        return error
    return model.refuse(f"{what}cannot be loaded: {first_line(error)}; download it again")


def schedule(pipe: Any, job: Job) -> None:
    """Give the scheduler the flow shift of a job, if it has one."""
    shift, key = job.settings.get("flow_shift"), shift_key(pipe.scheduler.config)
    if shift is not None and key is not None and pipe.scheduler.config[key] != shift:
        changed = {**pipe.scheduler.config, key: shift}
        pipe.scheduler = type(pipe.scheduler).from_config(changed)


def try_out(pipe: Any, job: Job) -> None:
    """One step of the untouched pipeline at its smallest size, in which its parts must fit.

    Raises InputError: what fails here is none of our doing.
    """
    model, names = job.model, job.takes.names
    grid = read_grid(model)
    frames, height, width = grid.offset + grid.steps[0], *grid.steps[1:]
    if job.takes.still:
        frames = 1
    if not job.takes.sized:
        height, width, _ = job.size
    small = {"height": height, "width": width, "frames": frames}
    small["steps"] = job.takes.fewest
    tried = replace(job, settings={**job.settings, **small})
    given = {names[one.option]: one.at(height, width, frames).value for one in job.inputs}
    generator = torch.Generator("cpu").manual_seed(0)
    try:
        made = pipe(**tried.call, **given, generator=generator, output_type="np")[0][0]
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise model.refuse(
            f"its parts do not go together, its own pipeline fails: {first_line(error)}"
        ) from error
    video = made if np.ndim(made) == 4 else made[None]
    found, asked = tuple(np.shape(video)), (frames, height, width, 3)
    if found != asked and not (job.takes.sections and found[1:] == asked[1:]):
        raise model.refuse(
            f"its parts do not go together: a video of {asked} (frames, height, width, colours) "
            f"comes out as {found}; look at the scale factors in vae/config.json"
        )
    wrong = np.size(video) - int(np.isfinite(video).sum())
    if wrong:
        raise model.refuse(
            f"{wrong} of {np.size(video)} colours that its own pipeline makes are no numbers: fp16 "
            "overflows in many models, take --dtype bf16 or fp32; with these its weights are "
            "broken, download it again"
        )
