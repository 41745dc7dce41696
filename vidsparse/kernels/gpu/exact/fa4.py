"""FlashAttention-4's block-sparse attention: CuTe kernels of the wheel flash-attn-4.

The listed tiles are its full blocks, its list of masked ones is empty. A kernel is compiled in the
process at its first call, once for all lengths; out and lse are written where they stand.

Only for compute capability 9.x: on 8.x the library computes dense attention without a word, 12.x it
refuses, and on 10.x it reads queries in blocks of 256, larger than any of ours. The capability is
given to it, because it would otherwise believe the variable FLASH_ATTENTION_ARCH.

Source: `flash_attn.cute`, release 4.0.0b36.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vidsparse.kernels.gpu import support
from vidsparse.kernels.gpu.exact import ExactEngine, ExactLists, Question
from vidsparse.kernels.gpu.operands import QueryRows
from vidsparse.kernels.gpu.operator import Operator

PACKAGE, LEAST = "flash-attn-4", "4.0.0b36"
MODULE = "flash_attn.cute.interface"

CAPABILITY = 9
"""Major."""

DTYPES = (torch.bfloat16, torch.float16)
BLOCK_Q, BLOCK_K = (64, 128), (16, 32, 64, 128)

STEP = 8
"""Head dims are multiples of it: rows of 16 bytes for TMA."""


class Engine(ExactEngine):
    """Kernels of FlashAttention-4."""

    name = "fa4"
    about = f"block-sparse kernels of {PACKAGE}, for compute capability 9.x"
    addresses: ClassVar = "tile"

    def available(self, device: torch.device) -> str | None:
        if why := support.refusal(device):
            return why
        capability = support.capability(device)
        if capability[0] != CAPABILITY:
            return f"{support.named(capability)}: FlashAttention-4 runs such lists on 9.x alone"
        return support.lacks(PACKAGE, LEAST, "hopper", MODULE)

    def refuses(self, asked: Question) -> str | None:
        if asked.form != "auto":
            return f"form {asked.form!r}: forms are of engine 'triton'; use form 'auto'"
        if asked.dtype not in DTYPES:
            return f"{asked.dtype}: FlashAttention-4 takes bfloat16 and float16"
        if asked.head_dim % STEP:
            return f"head dim {asked.head_dim}: FlashAttention-4 takes multiples of {STEP}"
        for name, size, known in (
            ("queries", asked.block_q, BLOCK_Q),
            ("keys", asked.block_k, BLOCK_K),
        ):
            if size not in known:
                allowed = ", ".join(map(str, known))
                return f"blocks of {size} {name}: FlashAttention-4 takes {allowed}"
        return None

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lists: ExactLists,
        rows: QueryRows,
        out: Tensor,
        lse: Tensor,
        asked: Question,
    ) -> None:
        sizes = asked.block_q, asked.block_k
        attend_operator(q, k, v, lists.entry, lists.count, *sizes, out, lse)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    entry: Tensor,
    count: Tensor,
    block_q: int,
    block_k: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Run the library; arguments as for `ExactEngine.run`. No wait for the device.

    Keys past the last whole tile are in no list, and are left out.
    """
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    tiles, depth = k.shape[2] // block_k, q.shape[3]
    keys = tiles * block_k
    k, v = (x.narrow(2, 0, keys).narrow(3, 0, depth) for x in (k, v))
    none = count.new_zeros(1, 1, count.shape[2])  # for every head
    lists = BlockSparseTensorsTorch(
        mask_block_cnt=none,
        mask_block_idx=none.unsqueeze(3),
        full_block_cnt=count,
        full_block_idx=entry.narrow(3, 0, min(tiles, entry.shape[3])),
        block_size=(block_q, block_k),
    )
    major, minor = support.capability(q.device)
    with torch.cuda.device_of(q):
        _flash_attn_fwd(
            *(x.transpose(1, 2) for x in (q, k, v)),
            block_sparse_tensors=lists,
            out=out.transpose(1, 2),
            lse=lse,
            _arch=10 * major + minor,
        )


attend_operator = Operator("fa4_tiles", attend, ("out", "lse"))

ENGINE = Engine()
