"""What a request leaves open: from the files it starts from, the model's card, or its pipeline."""

from __future__ import annotations

from typing import Any

from vidsparse.generate.inputs import Picture, read_image, read_video
from vidsparse.generate.model import Model, family_of
from vidsparse.generate.model_files import InputError
from vidsparse.generate.request import Request
from vidsparse.generate.sizes import longest_video, shape_like
from vidsparse.generate.takes import INPUTS, SETTINGS, Takes, read_takes

FPS = 16.0
"""Frames per second for models that we know nothing about."""

MOST_FRAMES = 257
"""Of a given video, if nobody says how many the model makes: 10 s are usual at most."""
SHIFTS = ("flow_shift", "shift")
"""What schedulers call it."""
CUT = 0.02
"""Share of a picture that may be cut off without a word."""


def what_it_takes(request: Request, model: Model, pipeline: Any) -> Takes:
    """Of the model's pipeline. Raises InputError unless that is what the request gives."""
    try:
        takes = read_takes(pipeline)
    except ValueError as error:
        raise model.refuse(
            f"{error}, which this command cannot give it: call it from Python, after "
            "vidsparse.accelerate_pipeline"
        ) from error
    if not takes.sized and family_of(model).own_size is None:
        raise model.refuse(
            f"a {takes.pipeline} decides on its size itself: call it from Python, after "
            "vidsparse.accelerate_pipeline"
        )
    for name in (*INPUTS, *SETTINGS):
        taken = name in takes.names or (name == "frames" and "video" in takes.names)
        if getattr(request, name, None) is not None and not taken:
            raise InputError(f"--{name.replace('_', '-')}: {_untaken(name, model, takes)}")
    for name in sorted(takes.needs):
        if getattr(request, name) is None:
            raise model.refuse(f"a {takes.pipeline} starts from {_a(name)}: give --{name}")
    if request.flow_shift is not None:
        scheduler = model.files.get("scheduler/scheduler_config.json", {})
        if shift_key(scheduler) is None:
            kind = model.components["scheduler"][1]
            raise InputError(f"--flow-shift: the {kind} of this model has none, or its own")
    return takes


def shift_key(scheduler: Any) -> str | None:
    """What the shift is called in a scheduler's config; None: it has none, or finds its own."""
    if scheduler.get("use_dynamic_shifting"):
        return None
    return next((key for key in SHIFTS if scheduler.get(key) is not None), None)


def read_inputs(request: Request, settings: dict[str, Any]) -> list[Picture]:
    """The files to start from, as they are. Raises InputError."""
    found = []
    for name in ("image", "last_image"):
        path = getattr(request, name)
        if path is not None:
            found.append(read_image(name, path))
    if request.video is not None:
        found.append(read_video(request.video, settings.get("frames", MOST_FRAMES)))
    return found


def settings_for(request: Request, model: Model, takes: Takes) -> dict[str, Any]:
    """By our names: asked for, else the card's, else the pipeline's own; those of None left out."""
    found: dict[str, Any] = {}
    for name in SETTINGS:
        value = getattr(request, name, None)
        second_of_two = name == "guidance_2" and request.guidance is not None
        if value is None and not second_of_two:  # one guidance asked for is meant for both
            value = model.defaults.get(name)
        if value is None:
            value = takes.defaults.get(name)
        if value is not None and (name in takes.names or (name == "frames" and not takes.still)):
            found[name] = value
    fps = model.defaults.get("fps", takes.defaults.get("fps", FPS))
    found["fps"] = int(fps) if float(fps).is_integer() else fps
    shift = model.defaults.get("flow_shift") if request.flow_shift is None else request.flow_shift
    if shift is not None:
        found["flow_shift"] = shift
    return found


def fit(
    settings: dict[str, Any], request: Request, model: Model, takes: Takes, found: list[Picture]
) -> tuple[dict[str, Any], list[str]]:
    """The settings with the size that the inputs lead to, and notes about what they lose.

    Raises InputError if a size is still open, or does not go with the inputs.
    """
    fitted, notes = dict(settings), []
    first = found[0] if found else None
    asked = request.height, request.width
    config = model.files[f"{model.transformers[0]}/config.json"]
    free = not config.get("use_learned_positional_embeddings")  # those are for one size alone
    area = settings.get("height", 0) * settings.get("width", 0)
    own_size = family_of(model).own_size
    if not takes.sized and own_size is not None and first is not None:
        fitted["height"], fitted["width"] = own_size(config, first.size)
    elif first is not None and free and None in asked and (area or any(asked)):
        fitted["height"], fitted["width"] = shape_like(model, first.size, *asked, area)
    video = next((one for one in found if one.option == "video"), None)
    if video is not None:
        notes += _length(fitted, request, model, takes, video)
    lacks = [n for n in ("height", "width", "frames") if n in takes.names and n not in fitted]
    if lacks:
        options = " and ".join(f"--{name}" for name in lacks)
        raise InputError(
            f"{options} {'is' if len(lacks) == 1 else 'are'} missing: nobody "
            f"says what {model.name} is good at"
        )
    for one in found:
        lost = one.cut(fitted["height"], fitted["width"])
        if lost > CUT:
            tall, wide = one.size
            notes.append(
                f"note: {one.file}, {wide}x{tall}, loses {lost:.0%} at its edges in "
                f"{fitted['width']}x{fitted['height']}"
            )
    return fitted, notes


def _length(
    settings: dict[str, Any], request: Request, model: Model, takes: Takes, video: Picture
) -> list[str]:
    """Set frames and frames per second of what is made from a video; notes about it."""
    has = len(video.frames)
    if video.fps is not None and "fps" not in takes.names:
        settings["fps"] = int(video.fps) if float(video.fps).is_integer() else video.fps
    if takes.continues:
        return []
    if request.frames is not None and request.frames > has:
        raise InputError(f"--frames {request.frames}: {video.file} has {has}")
    frames = settings["frames"] = request.frames or longest_video(model, has)
    if not frames:
        raise InputError(f"--video {video.file}: {has} frames are too few for this model")
    if video.more or frames < has:
        return [f"note: the first {frames} frames of {video.file} are taken"]
    return []


def _untaken(name: str, model: Model, takes: Takes) -> str:
    """Why a pipeline does not take a setting or an input, and the cure."""
    import diffusers

    if name == "guidance" and "guider" in model.components:
        return f"a {takes.pipeline} takes none, its component guider holds it"
    others = []
    for other in family_of(model).pipelines:
        try:
            taken = name in read_takes(getattr(diffusers, other)).names
        except ValueError:
            taken = False
        if taken and name in INPUTS:
            others.append(other)
    if not others:
        return f"a {takes.pipeline} takes none"
    return (
        f"a {takes.pipeline} takes none, a {' or a '.join(others)} does: add --pipeline "
        f"{others[0]} if the weights are made for it"
    )


def _a(name: str) -> str:
    return f"{'an' if name == 'image' else 'a'} {name}"
