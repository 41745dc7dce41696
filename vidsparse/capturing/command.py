"""`vidsparse capture`: its options, and nothing that takes long to import."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer

from vidsparse.generate.model_files import named
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
    Pipeline,
    Pixels,
    Prompt,
    Seed,
    Steps,
    Video,
)


def capture(
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write to.")],
    model: Model = None,
    prompt: Prompt = None,
    image: Image = None,
    last_image: LastImage = None,
    video: Video = None,
    pipeline: Pipeline = None,
    step: Annotated[
        list[int] | None,
        typer.Option(help="Step to keep, from 0; again for more.", show_default="3, spread"),
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(help="Layer to keep, from 0; again for more.", show_default="4, spread"),
    ] = None,
    head: Annotated[
        list[int] | None,
        typer.Option(help="Head to keep, from 0; again for more.", show_default="4, spread"),
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
    as_json: Json = False,
) -> None:
    """Keep q, k and v of some heads of a dense run, for `vidsparse bench`.

    About 25 MB for a head of 128 numbers and 32,000 tokens. The same command again makes what is
    missing, also after an interruption.
    """
    asked = dict(locals())
    del asked["as_json"], asked["out"]
    wanted = {f"{name}s": tuple(asked.pop(name) or ()) for name in ("step", "layer", "head")}
    with redirect_stdout(sys.stderr):  # whatever libraries print
        content = _capture(out, asked, wanted)
    if as_json:
        print(json.dumps(content))


def _capture(out: str, asked: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Run with a display on stderr; returns the figures. Exits on a mistake."""
    with session(
        "files that are there are whole, and the same command goes on from them"
    ) as running:
        from vidsparse.capturing.run import Wanted
        from vidsparse.capturing.run import capture as run
        from vidsparse.generate.request import Request

        content = run(Request(**asked), Wanted(**wanted), named("--out", out), running.display)
        running.display.say(
            f"{len(content['files'])} files, {content['made']} of them new, "
            f"{content['bytes'] / 2**20:.0f} MiB in {content['out']}"
        )
        return content
