"""cuDNN's block-sparse attention: CuTe kernels of the wheel nvidia-cudnn-frontend.

A kernel is compiled in the process at its first call: once for all lengths, on compute capability
12.x once for each. The public function returns new tensors, so that out and lse are one copy more:
2 x 2 bytes an element of out.

Source: `cudnn.BSA.block_sparse_attention_forward`, docs.nvidia.com/cudnn, release 1.32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vidsparse.kernels.gpu import support
from vidsparse.kernels.gpu.exact import ExactEngine, ExactLists, Question
from vidsparse.kernels.gpu.operands import QueryRows
from vidsparse.kernels.gpu.operator import Operator

PACKAGE, LEAST = "nvidia-cudnn-frontend", "1.32.0"
MODULE = "cudnn"

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Kernel:
    """What a kernel of the library takes; name: its generation in words."""

    name: str
    head_dims: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = HALVES


KERNELS = {
    (9, 64): Kernel("9.x", (64, 96, 128)),
    (9, 128): Kernel("9.x", (64, 96, 128)),
    (10, 64): Kernel("10.x", (128,), (torch.bfloat16,)),
    (10, 128): Kernel("10.x", (64, 96, 128)),
    (11, 64): Kernel("11.x", (128,), (torch.bfloat16,)),
    (11, 128): Kernel("11.x", (64, 96, 128)),
    (12, 64): Kernel("12.x", (128,)),
    (12, 128): Kernel("12.x", (128,)),
}
"""Major compute capability and tokens of a block, of queries as of keys."""

ALIGNMENT = 128
"""Bytes that some kernels want the first element of an operand to be aligned to."""

ROW_ALIGNMENT = 16
"""Bytes that TMA wants every row to be aligned to."""


class Engine(ExactEngine):
    """Kernels of cuDNN."""

    name = "cudnn"
    about = f"block-sparse kernels of {PACKAGE}, for compute capability 9.x to 12.x"
    addresses: ClassVar = "tile"

    def available(self, device: torch.device) -> str | None:
        if why := support.refusal(device):
            return why
        capability = support.capability(device)
        if (capability[0], 64) not in KERNELS:
            return f"{support.named(capability)}: cuDNN has kernels for 9.x to 12.x"
        return support.lacks(PACKAGE, LEAST, "hopper", MODULE)

    def refuses(self, asked: Question) -> str | None:
        if asked.form != "auto":
            return f"form {asked.form!r}: forms are of engine 'triton'; use form 'auto'"
        sizes = asked.block_q, asked.block_k
        if not {*sizes} <= {64, 128}:
            return f"blocks of {sizes[0]} x {sizes[1]} tokens: cuDNN takes 64 and 128"
        block = self.tile(asked)
        kernel = KERNELS.get((support.capability(asked.device)[0], block))
        if kernel is None:
            return f"{support.named(support.capability(asked.device))}: no kernel of cuDNN"
        what = f"cuDNN's kernel for blocks of {block} tokens on {kernel.name} takes"
        if asked.dtype not in kernel.dtypes:
            return f"{asked.dtype}: {what} {' and '.join(map(_short, kernel.dtypes))}"
        if asked.head_dim not in kernel.head_dims:
            return f"head dim {asked.head_dim}: {what} {', '.join(map(str, kernel.head_dims))}"
        return None

    def tile(self, asked: Question) -> int:
        """The smaller of the blocks: the library has one size for queries and keys."""
        return min(asked.block_q, asked.block_k)

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
        attend_operator(
            *(q, k, v, lists.entry, lists.count, asked.block_q, self.tile(asked), out, lse)
        )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    entry: Tensor,
    count: Tensor,
    block_q: int,
    block: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Run the library with blocks of `block` tokens; the rest as for `ExactEngine.run`.

    Lists of larger query blocks are repeated. No wait for the device.
    """
    from cudnn import BSA

    tokens, depth, major = q.shape[2], q.shape[3], support.capability(q.device)[0]
    if block_q > block:
        entry, count = (x.repeat_interleave(block_q // block, 2) for x in (entry, count))
        used = -(-tokens // block)
        entry, count = (x.narrow(2, 0, used) for x in (entry, count))
    k, v = (x.narrow(3, 0, depth) for x in (k, v))
    compact = major in (10, 11) and block == 128
    if not compact:  # keys past the last whole block, in no list, would cost a mask
        k, v = (x.narrow(2, 0, k.shape[2] // block * block) for x in (k, v))
    if major == 9 and block == 64:
        q = pad(q, (0, 0, 0, -tokens % block))  # it takes whole blocks of queries
    by_token = out.transpose(1, 2).is_contiguous()
    operands = [_fitting(x, compact) for x in (q, k, v)]
    found = BSA.block_sparse_attention_forward(
        *(x.transpose(1, 2) if by_token else x for x in operands),
        entry,
        q2k_block_nums=count,
        sparse_block_size=block,
        allow_empty_block_nums=True,
        layout="bshd" if by_token else "bhsd",
    )
    rows = found["o_tensor"]
    out.copy_((rows.transpose(1, 2) if by_token else rows).narrow(2, 0, tokens))
    lse.copy_(found["lse_tensor"].narrow(2, 0, tokens))


attend_operator = Operator("cudnn_tiles", attend, ("out", "lse"))


def _fitting(x: Tensor, compact: bool) -> Tensor:
    """x, or a copy if it does not stand in memory as the kernels read it.

    compact: without gaps, in the order of [B, H, S, D] or of [B, S, H, D].
    """
    outer = zip(x.shape[:3], x.stride()[:3], strict=True)
    rows = all(step * x.element_size() % ROW_ALIGNMENT == 0 for size, step in outer if size > 1)
    gaps = compact and not (x.is_contiguous() or x.transpose(1, 2).is_contiguous())
    if rows and not gaps and x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


ENGINE = Engine()
