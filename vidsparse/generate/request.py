"""What a user asks for, and the bounds of each value, whatever the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

from vidsparse.generate.model_files import InputError

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Our name of a dtype -> torch's."""

MOST_GUIDANCE = 100.0
"""Published models use 1 to 20; a scale of 1e30 is a slip that ends in a video of nothing."""

MOST_THREADS = 1024
"""More than a machine has."""

SHIFTS = (0.01, 100.0, "; 1 is none")
"""Least and largest shift of time steps, and what to know of them: published are 1 to 17."""


@dataclass(frozen=True)
class Request:
    """What a user asks for; None leaves the choice to the model's defaults.

    model: folder of a pipeline, or id on the Hugging Face hub; None: the shipped demo model.
    pipeline: class that its parts are put into; None: the one that the model names.
    image, last_image, video: files to start from, for pipelines that do.
    preset, overrides: as for `accelerate_pipeline`; one string is one override. preset None: that
        of the model's card, else "balanced".
    height, width: pixels. frames: of the video. steps: of the denoising.
    seed: of the noise; it also picks the prompt from the model's list. 0 .. 2^63 - 1.
    dtype: fp32 | bf16 | fp16; None: fp32 on a CPU, bf16 on a GPU.
    device: cpu | cuda | cuda:N; None: cuda if there is one.
    threads: of torch on a CPU, part of the job as they change the last bits; None: its own number,
        a condition that is noted.
    ulysses: processes that share the video, each running this; see `vidsparse.generate.ranks`.
    compare_dense: run the dense pipeline too, and measure against it.
    out: folder for the files, ~ is the home folder; None: one of its own in outputs/, see
        `vidsparse.jobs.layout`.
    overwrite: replace the files of another job in `out`.
    """

    model: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    pipeline: str | None = None
    image: Path | str | None = None
    last_image: Path | str | None = None
    video: Path | str | None = None
    preset: str | None = None
    overrides: str | Iterable[str] | None = ()
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    flow_shift: float | None = None
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None
    ulysses: int = 1
    compare_dense: bool = False
    out: Path | str | None = None
    overwrite: bool = False


def check_texts(request: Request) -> None:
    """Raise InputError for what a shell variable that is not set leaves behind, or for bytes that
    are no text."""
    paths = ("model", "preset", "out", "image", "last_image", "video")
    filled = (*paths, "prompt", "pipeline")
    for name in (*filled, "negative_prompt", "dtype", "device"):
        value = getattr(request, name)
        if value is None:
            continue
        if not isinstance(value, str | Path if name in paths else str):
            raise InputError(f"--{name.replace('_', '-')} {value!r}: expected text")
        text = str(value)
        if name in filled and not text.strip():
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {text!r}: expected text; leave it out for its default")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"--{name.replace('_', '-')} {text!r}: expected UTF-8") from None


def check_numbers(request: Request) -> None:
    """Raise InputError for numbers that no model takes."""
    for name in ("height", "width", "frames", "steps", "seed", "threads"):
        value = getattr(request, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise InputError(f"--{name} {value!r}: expected a whole number")
    steps = request.steps
    if steps is not None and steps < 1:
        raise InputError(f"--steps {steps}: expected 1 or more")
    threads = request.threads
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise InputError(f"--threads {threads}: expected 1 .. {MOST_THREADS}")
    bounds = {"guidance": (0.0, MOST_GUIDANCE, "; 1 switches it off"), "flow_shift": SHIFTS}
    for name, (least, most, hint) in bounds.items():
        value = getattr(request, name)
        number = isinstance(value, Real) and not isinstance(value, bool)
        if value is not None and not (number and least <= value <= most):
            raise InputError(
                f"--{name.replace('_', '-')} {value}: expected a number {least:g} .. {most:g}{hint}"
            )
    if request.seed is None or not 0 <= request.seed < 2**63:
        raise InputError(f"--seed {request.seed}: expected 0 .. 2^63 - 1")
