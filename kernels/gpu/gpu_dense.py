"""What sparse attention is measured against: dense attention, FlexAttention with the same mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import needs
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidsparse.blocks import Blocks
from vidsparse.plan import BlockPlan

Act = Callable[[], Tensor]
DENSE: dict[str, SDPBackend | None] = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "fa3": None,
    "fa4-dense": None,
}
"""What sparse attention has to beat on a GPU; backends of torch, FlashAttention 3 and 4."""

MODULES = {"fa3": "flash_attn_interface", "fa4-dense": "flash_attn.cute"}
"""Where the function `flash_attn_func` of those is that torch has not."""

FLEX_TILE = (128, 64)
"""Most rows and columns of a tile of FlexAttention; its blocks must be multiples."""


def dense_names(device: torch.device) -> list[str]:
    """Backends to try: those beside torch's only where they are installed; on a CPU torch as it is.

    A unit of its own is what calls them: whether they run on this device shows there.
    """
    if device.type == "cpu":
        return ["sdpa"]
    return [name for name in DENSE if name not in MODULES or needs.found(MODULES[name])]


def dense_act(name: str, q: Tensor, k: Tensor, v: Tensor) -> Act:
    """Dense attention by one of DENSE, on a CPU "sdpa": whatever torch takes; [B, H, S, D].

    Raises ImportError if it is not installed, RuntimeError when called if it takes no such tensors.
    """
    if name == "sdpa":
        return partial(F.scaled_dot_product_attention, q, k, v)
    if name in MODULES:
        return partial(_flash, import_module(MODULES[name]).flash_attn_func, q, k, v)
    return partial(_sdpa, DENSE[name], q, k, v)


def _sdpa(backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    assert backend is not None
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(q, k, v)


def _flash(function: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = function(*(x.transpose(1, 2) for x in (q, k, v)))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


class Flex:
    """FlexAttention over the exact blocks of plans of one shape; it is compiled once.

    Its blocks are all of one size, so video and text are padded to whole blocks beforehand, which
    is not timed; short blocks go through its mask, full ones do not.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, q_blocks: Blocks, k_blocks: Blocks) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        self.q_blocks, self.k_blocks = q_blocks, k_blocks
        self.q = _padded(q, q_blocks)
        self.k, self.v = (_padded(x, k_blocks) for x in (k, v))
        self.short = (k_blocks.count < k_blocks.size).to(q.device)
        real = _slots(k_blocks, q.device)[1]
        tile = (min(n, b.size) for n, b in zip(FLEX_TILE, (q_blocks, k_blocks), strict=True))
        options: Any = dict(zip(("BLOCK_M", "BLOCK_N"), tile, strict=True))

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return real[j]

        def run(q: Tensor, k: Tensor, v: Tensor, blocks: Any) -> Any:
            return flex_attention(q, k, v, block_mask=blocks, kernel_options=options)

        self.mask = mask
        self.run = torch.compile(run, dynamic=False)

    def act(self, plan: BlockPlan) -> Act:
        """A call with the mask of a plan; the mask is built here, outside the timing."""
        from torch.nn.attention.flex_attention import BlockMask

        listed = plan.levels == 0
        partly, full = _counted(listed & self.short), _counted(listed & ~self.short)
        built = BlockMask.from_kv_blocks(
            *partly,
            *full,
            BLOCK_SIZE=(self.q_blocks.size, self.k_blocks.size),
            mask_mod=self.mask,
            seq_lengths=(self.q.shape[2], self.k.shape[2]),
        )
        return lambda: self.run(self.q, self.k, self.v, built)

    def tokens(self, out: Tensor) -> Tensor:
        """The rows of an output that stand for tokens, [B, H, S, D]."""
        return out[:, :, _slots(self.q_blocks, out.device)[0]]


def _counted(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, H, nq, nk] -> numbers int32 [B, H, nq], ids in front int32 [B, H, nq, nk]."""
    ids = torch.argsort((~wanted).to(torch.int8), dim=-1, stable=True)
    return wanted.sum(-1, dtype=torch.int32), ids.int()


def _slots(blocks: Blocks, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row of each token among padded blocks, int64 [S], and which rows hold a token, bool."""
    owner = blocks.owner
    slot = owner * blocks.size + torch.arange(blocks.tokens) - blocks.start[owner]
    real = torch.zeros(len(blocks) * blocks.size, dtype=torch.bool)
    real[slot] = True
    return slot.to(device), real.to(device)


def _padded(x: Tensor, blocks: Blocks) -> Tensor:
    """x [B, H, S, D] with every block padded by zeros to its nominal size."""
    slot, real = _slots(blocks, x.device)
    out = x.new_zeros(*x.shape[:2], len(real), x.shape[3])
    return out.index_copy_(2, slot, x)
