"""What a server's self-attention call becomes, whichever server it is."""

from __future__ import annotations

import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

from torch import Tensor

from vidsparse.attention import sparse_attention
from vidsparse.config import SparseConfig
from vidsparse.grid import TokenGrid
from vidsparse.plan import StepContext
from vidsparse.sections import Keep

PRESET, OVERRIDES = "VIDSPARSE_PRESET", "VIDSPARSE_SET"
"""Variables: a preset by name or file, and changes to it, section.key=value after `;`."""


def asked(environ: Mapping[str, str] = os.environ) -> SparseConfig | None:
    """The settings that the environment asks for; None: none, the server stays as it is.

    Raises ValueError for settings that do not exist, or that need what a server does not tell.
    """
    preset = environ.get(PRESET, "").strip()
    if not preset:
        return None
    changes = [one.strip() for one in environ.get(OVERRIDES, "").split(";") if one.strip()]
    config = SparseConfig.load(preset, changes)
    schedule = config.schedule
    if any(layer < 0 for layer in getattr(schedule, "dense_layers", ())):
        raise ValueError(
            f"{PRESET}={preset}: schedule.dense_layers={schedule.dense_layers} counts from the "
            "last layer, but a server does not tell how many there are; count from the first, 0"
        )
    if getattr(schedule, "layer_density", ()):
        raise ValueError(
            f"{PRESET}={preset}: schedule.layer_density names each layer, but a server does not "
            "tell how many there are; leave it out"
        )
    if schedule.name == "table":
        raise ValueError(
            f"{PRESET}={preset}: schedule.name=table has a density for each layer, but a server "
            "does not tell how many there are; use schedule.name=warmup"
        )
    if config.keep != Keep():
        raise ValueError(
            f"{PRESET}={preset}: keep carries from step to step, but a server does not tell whose "
            "step a call is; leave it out"
        )
    if config.layout.per_head:
        tell_once(
            f"preset {preset}: heads order their tokens anew in every call, as a server does not "
            "tell whose step a call is, so orders cannot be kept; preset tiles spares them"
        )
    return config


class Layer(ABC):
    """What the layers of all servers have in common: settings, and a dense layer of the server's.

    member: of the server's backends, by which it is asked for. The arguments are those of the
    servers' `AttentionImpl`.
    """

    member: ClassVar[str]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        **options: Any,
    ) -> None:
        config = asked()
        if config is None:
            raise ValueError(f"{self.member} is vidsparse here, but {PRESET} is not set")
        self.config: SparseConfig = config
        usual = not causal and num_kv_heads in (None, num_heads)
        self.usual = usual and abs(softmax_scale * head_size**0.5 - 1) < 1e-6
        self.prefix = prefix
        self.dense: Any = self.dense_class()(
            num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix, **options
        )

    @staticmethod
    @abstractmethod
    def dense_class() -> Any:
        """The server's own dense layer."""


def layer_of(prefix: str) -> int:
    """Index of a layer by the name of its module, as in blocks.3.attn1; the first number counts.

    Raises ValueError for a name without one.
    """
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", prefix)
    if found is None:
        raise ValueError(f"attention layer {prefix!r}: its name has no index of a layer")
    return int(found[1])


def where(step: int | None, steps: int | None, layer: int) -> StepContext | None:
    """Position of a call; None if the server does not tell step and number of steps."""
    if step is None or steps is None or not 0 <= step < steps:
        tell_once(
            "a server that does not tell step and number of steps: its calls are dense, as a "
            "schedule may keep the first steps dense"
        )
        return None
    return StepContext(step, steps, layer, layers=layer + 1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, context: StepContext, config: SparseConfig
) -> Tensor:
    """q, k, v [B, rows, H, D] in raster order, after norm and RoPE; rows behind those of the grid
    are padding, that nothing reads and whose output is 0. Returns [B, rows, H, D]."""
    used, rows = grid.tokens, q.shape[1]
    if used == rows:
        whole: Tensor = sparse_attention(q, k, v, grid=grid, config=config, context=context)
        return whole
    out = q.new_zeros(q.shape)
    parts = (x[:, :used] for x in (q, k, v))
    out[:, :used] = sparse_attention(*parts, grid=grid, config=config, context=context)
    return out


@cache
def tell_once(text: str) -> None:
    """A warning, once in a process: servers call thousands of times."""
    warnings.warn(f"vidsparse: {text}", RuntimeWarning, stacklevel=3)
