"""Options that several commands have, declared and read once; nothing that takes long to import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]

Model = Annotated[
    str | None,
    typer.Option(help="Folder or Hugging Face id of a pipeline.", show_default="the demo model"),
]
Prompt = Annotated[
    str | None,
    typer.Option(help="What the video shows.", show_default="from the model's list, by seed"),
]
NegativePrompt = Annotated[
    str | None, typer.Option(help="What it should not show.", show_default="the model's")
]
Pipeline = Annotated[
    str | None,
    typer.Option(help="Class to put its parts into.", show_default="the one that it names"),
]
Image = Annotated[str | None, typer.Option(metavar="FILE", help="Image to start from.")]
LastImage = Annotated[str | None, typer.Option(metavar="FILE", help="Image to end with.")]
Video = Annotated[
    str | None, typer.Option(metavar="FILE", help="Video to start from, or a folder of PNGs.")
]
Preset = Annotated[
    str | None,
    typer.Option(help="Name or .yaml file of a method.", show_default="the model's or balanced"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, as schedule.density=0.2."),
]
Pixels = Annotated[int | None, typer.Option(help="Pixels.")]
Frames = Annotated[int | None, typer.Option(help="Length of the video.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; 1: off.")]
FlowShift = Annotated[float | None, typer.Option(help="Shift of the time steps.")]
Seed = Annotated[int, typer.Option(help="Of the initial noise.")]
Dtype = Annotated[
    str | None, typer.Option(help="fp32, bf16, fp16.", show_default="fp32 on CPU, bf16 on GPU")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:N.", show_default="cuda if there is one")
]

Ulysses = Annotated[
    int,
    typer.Option(metavar="N", help="Processes of torchrun that share a video.", show_default="1"),
]


def made(option: str, folder: Path) -> Path:
    """A folder, made if it is not there. Raises ValueError if it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{option} {folder}: no folder can be made there ({error.strerror}); choose another"
        ) from error
    return folder


def path(option: str, text: str) -> Path:
    """A path that an option names; ~ is the home folder.

    Raises ValueError for what a shell variable that is not set leaves behind.
    """
    if not text:
        raise ValueError(f"{option} is empty: expected a path")
    return Path(text).expanduser()
