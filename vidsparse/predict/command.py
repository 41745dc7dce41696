"""`vidsparse predict`: its options, and nothing that takes long to import."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer

from vidsparse.ending import fail
from vidsparse.options import (
    Dtype,
    Frames,
    Guidance,
    Json,
    Model,
    Overrides,
    Pipeline,
    Pixels,
    Preset,
    Steps,
    Ulysses,
)
from vidsparse.terminal import quiet_libraries


def predict(
    model: Model = None,
    pipeline: Pipeline = None,
    preset: Preset = None,
    overrides: Overrides = None,
    height: Pixels = None,
    width: Pixels = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    dtype: Dtype = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="H100, H200, A100, 4090, B200, or this.",
            show_default="the GPU here if there is one, else this CPU",
        ),
    ] = None,
    ulysses: Ulysses = 1,
    as_json: Json = False,
) -> None:
    """Say what a run would take, dense and sparse: seconds by stage, memory, an error bar.

    From configs alone, without weights. This CPU is timed for some seconds, once; figures of GPUs
    are measured for an H100 and an H200, published or assumed for others, and say so.
    """
    asked = dict(locals())
    del asked["as_json"], asked["gpu"]
    asked["overrides"] = tuple(overrides or ())
    with redirect_stdout(sys.stderr):  # whatever libraries print
        content, text = _predict(asked, gpu)
    print(json.dumps(content, allow_nan=False) if as_json else text)


def _predict(asked: dict[str, Any], gpu: str | None) -> tuple[dict[str, Any], str]:
    """The figures, and what a person reads. Exits on a mistake."""
    quiet_libraries()
    from vidsparse.generate.model_files import InputError
    from vidsparse.generate.request import Request
    from vidsparse.predict.display import figures, shown
    from vidsparse.predict.subject import predicted

    try:
        subject, prediction = predicted(Request(**asked), gpu)
    except InputError as error:
        fail(str(error))
    content = figures(subject, prediction)
    return content, shown(content)
