"""Results in blocks brought back to their tokens, in Triton's CPU interpreter.

    TRITON_INTERPRET=1 pytest tests/test_triton_unblock.py

in a process of its own: what is interpreted there cannot be compiled later.
"""

import os

import pytest
import torch

from vidsparse.blocks import Blocks

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

import far
from cuts import GRIDS, layouts

from vidsparse.kernels.gpu import engine
from vidsparse.kernels.gpu.unblock import unblock

pytestmark = pytest.mark.interp


@pytest.mark.parametrize("per_head", [False, True, None])
@pytest.mark.parametrize(("grid", "size", "depth"), [("337", 64, 40), ("text-first", 16, 128)])
def test_every_token_gets_its_row(grid: str, size: int, depth: int, per_head: bool | None) -> None:
    """Ragged blocks, views and rows wider than they are read; nothing else is touched."""
    blocks = Blocks.cut(GRIDS[grid], size)
    x = torch.randn(2, 3, len(blocks) * size, depth + 24)[..., :depth].bfloat16()
    x = torch.nn.functional.pad(x, (0, 24), value=torch.nan)[..., :depth]
    lse = torch.randn(x.shape[:3])
    order = None
    if per_head is not None:
        shape = (2, 3) if per_head else ()
        order = torch.rand(*shape, blocks.tokens).argsort(-1)
    rows = engine.query_rows(blocks, x.device, order)
    for out in layouts(torch.full((2, 3, blocks.tokens, depth), torch.nan).bfloat16())[:-1]:
        found = torch.full(out.shape[:3], torch.nan)
        unblock(x, lse, rows, out, found)
        every = torch.arange(blocks.tokens) if order is None else order
        for head in range(6):
            b, h = divmod(head, 3)
            own = every if every.ndim == 1 else every[b, h]
            for i, (first, count) in enumerate(zip(blocks.start, blocks.count, strict=True)):
                tokens = own[int(first) : int(first + count)]
                part = slice(i * size, i * size + int(count))
                assert torch.equal(out[b, h, tokens], x[b, h, part])
                assert torch.equal(found[b, h, tokens], lse[b, h, part])


def test_offsets_past_2_31_elements() -> None:
    far.assert_passes("""
from vidsparse.kernels.gpu.operands import QueryRows
from vidsparse.kernels.gpu.unblock import unblock
HEADS, N, D, SIZE = 3, 130, 64, 128
start, count = torch.tensor([0, 128]), torch.tensor([128, 2], dtype=torch.int32)
rows = QueryRows(start, count, SIZE, torch.randperm(N))
for head, token in ((D, 2**24), (2**30 + 1024, D)):  # the last tokens, the last head are far away
    memory = [virtual((HEADS - 1) * head + (n - 1) * token + D, torch.float16) for n in (N, 256)]
    out = memory[0].as_strided((1, HEADS, N, D), (0, head, token, 1))
    x = memory[1].as_strided((1, HEADS, 256, D), (0, head, token, 1))
    x.copy_(torch.randn(x.shape))
    lse, found = torch.randn(1, HEADS, 256), torch.zeros(1, HEADS, N)
    unblock(x, lse, rows, out, found)
    assert torch.equal(out[:, :, rows.order], x[:, :, :N])
    assert torch.equal(found[:, :, rows.order], lse[:, :, :N])
""")
