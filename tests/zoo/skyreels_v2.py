"""SkyReels-V2: one timestep, one for each frame, and blocks of frames that see no later ones."""

from functools import partial
from typing import Any

import diffusers
import tiny
import torch

import zoo
from zoo import wan


def model(heads: int = 2, head_dim: int = 16, **options: Any) -> Any:
    kind = diffusers.SkyReelsV2Transformer3DModel
    return tiny.transformer(heads=heads, head_dim=head_dim, kind=kind, **options)


def causal(heads: int, head_dim: int) -> Any:
    return model(heads, head_dim, num_frame_per_block=2)


def forcing(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    return {
        **wan.arguments(model, grid, batch),
        "timestep": torch.linspace(0, 900, batch * grid[0]).view(batch, -1),
        "enable_diffusion_forcing": True,
    }


def text() -> Any:
    pipe = diffusers.SkyReelsV2Pipeline(transformer=zoo.lively(model()), **tiny.parts(tiny.unipc()))
    return pipe, tiny.arguments()


def image() -> Any:
    pipe = diffusers.SkyReelsV2ImageToVideoPipeline(
        transformer=zoo.lively(model(in_channels=36, image_dim=8, added_kv_proj_dim=32)),
        **tiny.vision(),
        **tiny.parts(tiny.unipc()),
    )
    return pipe, tiny.arguments(image=tiny.still(64, 96), max_sequence_length=512)


def forced(kind: str, **more: Any) -> Any:
    """A diffusion forcing pipeline, and the arguments of its call."""
    pipe = getattr(diffusers, f"SkyReelsV2DiffusionForcing{kind}Pipeline")(
        transformer=zoo.lively(model()), **tiny.parts(tiny.unipc())
    )
    return pipe, tiny.arguments(**more)


CASES = [
    zoo.Case("skyreels_v2", model, wan.arguments),
    zoo.Case("skyreels_v2 forcing", model, forcing, cuts=True),
    zoo.Case(
        "skyreels_v2 causal",
        causal,
        wan.arguments,
        cuts=True,
        grids=((4, 5, 7),),
        sparse=False,
        dense={"masked": 2},
        takes=lambda grid: grid[0] % 2 == 0,  # frames are masked in pairs
    ),
]
PIPELINES: zoo.Pipelines = {
    "skyreels_v2": text,
    "skyreels_v2 image": image,
    "skyreels_v2 forcing": partial(forced, ""),
    "skyreels_v2 forcing, image": partial(forced, "ImageToVideo", image=tiny.still(64, 96)),
    "skyreels_v2 forcing, video": partial(
        forced,
        "VideoToVideo",
        video=[tiny.still(64, 96)] * 9,
        num_frames=17,
        base_num_frames=13,
        overlap_history=5,
    ),
}
