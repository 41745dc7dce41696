"""LTX-Video: text, image or video to video, with conditions; a timestep for each token.

Self-attention (`attn1` of each block) is over the video alone, and over conditions if there are
some: whole frames before the video, in long videos of many prompts behind it. A forward with
conditions tells its grid only by the coordinates of its rows.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_ltx import (
    LTXVideoAttnProcessor,
    LTXVideoTransformer3DModel,
)
from torch import Tensor

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, Site
from vidsparse.pipelines.kept import Kept
from vidsparse.pipelines.processor import SparseProcessor

_by_coordinates: Kept[TokenGrid] = Kept()


class LTXSparseProcessor(SparseProcessor, LTXVideoAttnProcessor):
    """`LTXVideoAttnProcessor` with block-sparse self-attention."""


def self_attention(transformer: Any) -> list[Any]:
    """`attn1` of every block."""
    return [block.attn1 for block in transformer.transformer_blocks]


def grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    """As the arguments tell it; coordinates, if given, overrule the sizes."""
    coordinates = arguments.get("video_coords")
    if coordinates is not None:
        return _by_coordinates.get((coordinates,), lambda: grid_of(coordinates))
    sizes = [arguments.get(name) for name in ("num_frames", "height", "width")]
    if None in sizes:
        raise ValueError(
            f"num_frames, height, width = {sizes} in a call of {type(transformer).__name__}: give "
            "all three, in latent frames, rows and columns, or video_coords"
        )
    return TokenGrid(*sizes)  # type: ignore[arg-type]


def grid_of(coordinates: Tensor) -> TokenGrid:
    """Of rows with these coordinates [B, 3, rows]: time, y, x. Waits for the device.

    The video is the first run of frames with rising times that begins at 0.
    """
    time, y, x = coordinates[0].cpu()
    height, width = len(y.unique()), len(x.unique())
    plane = height * width
    times = time[::plane].tolist()
    shape = (len(times), height, width)
    axes = (time[::plane], y[:plane:width], x[:width])
    views = ((-1, 1, 1), (1, -1, 1), (1, 1, -1))
    if len(time) % plane or not all(
        (rows.view(shape) == axis.view(view)).all()
        for rows, axis, view in zip((time, y, x), axes, views, strict=True)
    ):
        raise ValueError(
            f"video_coords of shape {tuple(coordinates.shape)} are not those of whole frames of "
            f"{height} x {width} rows in raster order: vidsparse cannot tell the latent video"
        )
    first = times.index(0) if 0 in times else 0
    end = first + 1
    while end < len(times) and times[end] > times[end - 1]:
        end += 1
    before, after = first * plane, (len(times) - end) * plane
    return TokenGrid(end - first, height, width, before=before, after=after)


SPLIT = (
    "its cross-attention fails in stock diffusers, where the mask of the text is for all heads and "
    "the exchanged queries are of some"
)

ADAPTER = Adapter(
    pipelines=(
        "LTXPipeline",
        "LTXImageToVideoPipeline",
        "LTXConditionPipeline",
        "LTXI2VLongMultiPromptPipeline",
    ),
    components=("transformer",),
    transformer=LTXVideoTransformer3DModel,
    sparse=(LTXSparseProcessor,),
    self_attention=self_attention,
    grid=grid,
    entries=(
        Site("argument", "hidden_states", 1),
        Site("argument", "timestep", 1, optional=True),
        Site("output", "rope", 1),
    ),
    exit=Site("input", "proj_out", 1),
    split=SPLIT,
)
