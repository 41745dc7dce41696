"""Model families: a file each, that exports `ADAPTER`, or `ADAPTERS`: all facts about the family.

Only that file imports the diffusers classes of the family; files may share functions of a
relative's. What an adapter states is described in `vidsparse.pipelines.adapter`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from vidsparse.pipelines.adapter import Adapter

REFUSED = {
    "AnyFlowFARTransformer3DModel": "it attends over chunks of the video, with a cache of keys",
    "WanAnimate2Transformer3DModel": "it attends under a mask of blocks, with a cache of keys",
}
"""Class name of a denoiser without an adapter -> why it has none."""


@cache
def adapters() -> tuple[Adapter, ...]:
    """The adapters of all family files, in the order of the file names."""
    found: list[Adapter] = []
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        found += getattr(module, "ADAPTERS", None) or [module.ADAPTER]
    return tuple(found)
