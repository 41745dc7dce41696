"""`vidsparse calibrate`: its options, and nothing that takes long to import."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer

from vidsparse.ending import fail
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
    NegativePrompt,
    Overrides,
    Pipeline,
    Pixels,
    Preset,
    Seed,
    Steps,
    Video,
)

KINDS = ("psnr", "error", "speedup")


def calibrate(
    psnr: Annotated[
        float | None,
        typer.Option(
            help="Goal: dB against the dense video, in the mean over all prompts like the measured "
            "ones, with 90 % confidence: their own mean lies above it, by their spread."
        ),
    ] = None,
    error: Annotated[
        float | None, typer.Option(help="Goal: relative error of attention, as 0.05.")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="Goal: denoising so many times as fast as dense.")
    ] = None,
    model: Model = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="To measure on; again for more, which makes the margin smaller.",
            show_default="the first of the model's list: 4 for --psnr, else 2",
        ),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            help="To check the result on; again for more.", show_default="the next of the list"
        ),
    ] = None,
    negative_prompt: NegativePrompt = None,
    image: Image = None,
    last_image: LastImage = None,
    video: Video = None,
    pipeline: Pipeline = None,
    preset: Preset = None,
    overrides: Overrides = None,
    height: Pixels = None,
    width: Pixels = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    flow_shift: FlowShift = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    out: Annotated[
        str | None, typer.Option(help="File to write.", show_default="presets/MODEL-GOAL.yaml")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another preset in --out.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a preset for a model: groups of steps, layers and heads get the density that they need.

    Runs the model densely once for each prompt, and once or twice sparsely; takes the method of
    --preset and fills in densities. The same command again goes on after an interruption.
    """
    asked = dict(locals())
    del asked["as_json"]
    goals = {kind: asked.pop(kind) for kind in KINDS}
    asked["overrides"] = tuple(overrides or ())
    with redirect_stdout(sys.stderr):  # whatever libraries print
        content = _calibrate(asked, {k: v for k, v in goals.items() if v is not None})
    if as_json:
        print(json.dumps(content))


def _calibrate(asked: dict[str, Any], goals: dict[str, float]) -> dict[str, Any]:
    """Run with a display on stderr; returns the figures. Exits on a mistake."""
    if len(goals) != 1:
        given = ", ".join(f"--{kind}" for kind in goals) or "none"
        fail(f"one goal is needed, and {given} is given: --psnr 30, --error 0.05 or --speedup 1.5")
    with session("what was measured is kept, and the same command goes on from it") as running:
        from vidsparse.calibrating.goal import Goal
        from vidsparse.calibrating.run import Asked
        from vidsparse.calibrating.run import calibrate as run
        from vidsparse.generate.model_files import InputError
        from vidsparse.generate.request import Request

        try:
            goal = Goal(*goals.popitem())  # type: ignore[arg-type]
        except ValueError as error:
            raise InputError(str(error)) from error
        out, overwrite = asked.pop("out"), asked.pop("overwrite")
        prompts, held_out = (
            None if texts is None else tuple(texts)
            for texts in (asked.pop("prompt"), asked.pop("held_out"))
        )
        file = None if out is None else named("--out", out)
        wanted = Asked(Request(**asked), goal, prompts, held_out, file, overwrite)
        content = run(wanted, running.display)
        running.display.say(f"{content['reached']}; {content['runs']} runs were made")
        running.display.say(f"{content['preset']}: vidsparse generate --preset {content['preset']}")
        return content
