"""ChronoEdit: with the temporal reasoning that leaves two frames."""

from typing import Any

import diffusers
import tiny

import zoo
from zoo import wan


def model(heads: int = 2, head_dim: int = 16, **options: Any) -> Any:
    kind = diffusers.ChronoEditTransformer3DModel
    return tiny.transformer(heads=heads, head_dim=head_dim, kind=kind, **options)


def pipeline() -> Any:
    transformer = model(in_channels=36, image_dim=8, added_kv_proj_dim=32)
    pipe = diffusers.ChronoEditPipeline(
        transformer=zoo.lively(transformer), **tiny.vision(), **tiny.parts(tiny.unipc())
    )
    return pipe, tiny.arguments(
        image=tiny.still(64, 96),
        max_sequence_length=512,
        enable_temporal_reasoning=True,
        num_temporal_reasoning_steps=2,
    )


CASES = [
    zoo.Case("chronoedit", model, wan.arguments, controls=wan.VIDEO),
    zoo.Case(
        "chronoedit two frames",
        model,
        wan.arguments,
        controls=wan.VIDEO,
        grids=((2, 6, 8), (2, 5, 7)),
    ),
    zoo.Case("chronoedit token times", model, wan.token_times),
]
PIPELINES: zoo.Pipelines = {"chronoedit": pipeline}
