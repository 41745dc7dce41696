"""Model families: a file each, that exports `ADAPTER`, or `ADAPTERS`: all facts about the family.

Only that file imports the diffusers classes of the family; files may share functions of a
relative's. What an adapter states is described in `vidsparse.pipelines.adapter`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from vidsparse.pipelines.adapter import Adapter

UNET = "it is a UNet, which attends within frames and along time apart, not over all of the video"
LINEAR = "its attention is linear, or most of it: there is no softmax over keys to make sparse"

REFUSED = {
    "AnyFlowFARTransformer3DModel": "it attends over chunks of the video, with a cache of keys",
    "Cosmos3OmniTransformer": "its queries attend to a packed sequence of which they are a part",
    "I2VGenXLUNet": UNET,
    "Kandinsky6SRTransformer3DModel": "it attends under a sparse mask of its own",
    "LatteTransformer3DModel": "it attends within frames and along time apart: short sequences",
    "SanaTransformer2DModel": LINEAR,
    "SanaVideoTransformer3DModel": LINEAR,
    "SanaWMTransformer3DModel": LINEAR,
    "UNet3DConditionModel": UNET,
    "UNetMotionModel": UNET,
    "UNetSpatioTemporalConditionModel": UNET,
    "WanAnimate2Transformer3DModel": "it attends under a mask of blocks, with a cache of keys",
}
"""Class name of a denoiser without an adapter -> why it has none."""

MISSING: dict[str, str] = {}
"""Family whose classes the installed diffusers does not have -> what it lacks."""


@cache
def by_family() -> Mapping[str, tuple[Adapter, ...]]:
    """Name of each family file -> its adapters.

    A family that the installed diffusers does not have, or no longer as it was, is left out, and
    stands in `MISSING`.
    """
    found: dict[str, tuple[Adapter, ...]] = {}
    for file in pkgutil.iter_modules(__path__):
        try:
            module = importlib.import_module(f"{__name__}.{file.name}")
        except (ImportError, AttributeError, TypeError) as error:
            if file.name == "wan":  # so old or new that nothing would work
                raise
            MISSING[file.name] = str(error)
            continue
        found[file.name] = tuple(getattr(module, "ADAPTERS", None) or [module.ADAPTER])
    return found


def adapters() -> tuple[Adapter, ...]:
    """All adapters, in the order of the file names."""
    return tuple(adapter for family in by_family().values() for adapter in family)
