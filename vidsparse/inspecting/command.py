"""`vidsparse inspect`: its options, and nothing that takes long to import."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from vidsparse.generate.session import session
from vidsparse.options import (
    Device,
    Dtype,
    FlowShift,
    Frames,
    Guidance,
    Image,
    Json,
    LastImage,
    Model,
    Overrides,
    Pipeline,
    Pixels,
    Preset,
    Prompt,
    Seed,
    Steps,
    Video,
)


def inspect(
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write to.")],
    model: Model = None,
    prompt: Prompt = None,
    image: Image = None,
    last_image: LastImage = None,
    video: Video = None,
    pipeline: Pipeline = None,
    preset: Preset = None,
    overrides: Overrides = None,
    step: Annotated[
        list[int] | None,
        typer.Option(
            help="Step to measure, from 0; again for more.",
            show_default="the first, middle and last sparse one",
        ),
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(
            help="Layer to draw, from 0; again for more.", show_default="first, middle, last"
        ),
    ] = None,
    head: Annotated[
        list[int] | None,
        typer.Option(help="Head to draw, from 0; again for more.", show_default="4 at most"),
    ] = None,
    query: Annotated[
        str | None,
        typer.Option(
            metavar="FRAME,ROW,COLUMN",
            help="Token whose tile is followed.",
            show_default="the centre",
        ),
    ] = None,
    height: Pixels = None,
    width: Pixels = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    flow_shift: FlowShift = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace other files in --out.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run once and draw what attention does: where its mass is, what is read, recall and error.

    Figures cover all layers and heads of the chosen steps, maps the chosen layers and heads.
    """
    asked = dict(locals())
    del asked["as_json"]
    chosen = {f"{name}s": tuple(asked.pop(name) or ()) for name in ("step", "layer", "head")}
    chosen["query"] = asked.pop("query")
    asked["overrides"] = tuple(overrides or ())
    with redirect_stdout(sys.stderr):  # whatever libraries print
        content = _inspect(asked, chosen)
    if as_json:
        print(json.dumps(content, allow_nan=False))


def _inspect(asked: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """Run with a display on stderr; returns the figures. Exits on a mistake."""
    with session("nothing was written") as running:
        from vidsparse.generate.request import Request
        from vidsparse.inspecting.run import Inspection
        from vidsparse.inspecting.run import inspect as run

        content = run(Inspection(Request(**asked), **chosen), running.display)
        running.left = f"the files are in {content['out']}"
        for line in _lines(content):
            running.display.say(line)
        return content


def _lines(content: dict[str, Any]) -> list[str]:
    """What a person sees at the end."""
    heads = content["heads"]
    recall = sum(row["recall"] for row in heads) / len(heads)
    worst = max(heads, key=lambda row: row["error"])
    return [
        f"recall of true mass {recall:.3f}, mean over {len(heads)} heads of the chosen steps; "
        f"largest output error {worst['error']:.3g} in step {worst['step']}, layer "
        f"{worst['layer']}, head {worst['head']}",
        f"{len(content['files'])} files; open {Path(content['out']) / content['files'][0]}",
    ]
