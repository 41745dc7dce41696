"""Draft scores against float64, in Triton's CPU interpreter.

    TRITON_INTERPRET=1 pytest tests/test_triton_draft.py

in a process of its own: what is interpreted there cannot be compiled later.
"""

import os

import pytest
import torch

from vidsparse.blocks import Blocks
from vidsparse.kernels.gpu import oracles

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

import far
from cuts import GRIDS, assert_close, pieces, tokens
from torch import Tensor

from vidsparse.kernels.gpu import draft as triton_draft
from vidsparse.kernels.gpu import means as sums

pytestmark = [
    pytest.mark.interp,
    pytest.mark.filterwarnings("ignore:divide by zero", "ignore:All-NaN slice"),
]


def draft(q: Tensor, k: Tensor, q_blocks: Blocks, k_blocks: Blocks, sub: int) -> Tensor:
    """Scores from the tokens; the means of missing pieces are spoilt."""
    means, counts = [], []
    for x, blocks in ((q, q_blocks), (k, k_blocks)):
        start, count, size = pieces(blocks, sub)
        means.append(sums.block_means(x, start, count, size))
        means[-1][:, :, count == 0] = float("nan")
        counts.append(count)
    return triton_draft.draft_scores(*means, *counts, sub, q.shape[3] ** -0.5)


@pytest.mark.parametrize("sub", [1, 2, 4, 8])
@pytest.mark.parametrize("sizes", [(64, 32), (8, 16), (128, 128)], ids=str)
@pytest.mark.parametrize("grids", [("text-first", "337"), ("337", "text-last")], ids=str)
def test_draft_scores(grids: tuple[str, str], sizes: tuple[int, int], sub: int) -> None:
    cuts = [Blocks.cut(GRIDS[grid], size) for grid, size in zip(grids, sizes, strict=True)]
    q, k = (3 * tokens(blocks, 64) for blocks in cuts)
    wanted = oracles.draft_scores(q, k, *cuts, sub)
    found = draft(q, k, *cuts, sub)
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert_close(found, wanted, 1e-6, 1e-5)


@pytest.mark.parametrize("depth", [128, 80, 40])
@pytest.mark.parametrize("sub", [1, 4])
def test_draft_head_dims(sub: int, depth: int) -> None:
    cuts = [Blocks.cut(GRIDS["text-last"], size) for size in (16, 32)]
    q, k = (tokens(blocks, depth, torch.bfloat16) for blocks in cuts)
    wanted = oracles.draft_scores(q, k, *cuts, sub)
    assert_close(draft(q, k, *cuts, sub), wanted, 1e-6, 1e-5)


@pytest.mark.parametrize("sub", [1, 4])
def test_draft_of_extreme_means(sub: int) -> None:
    """Logits far past the range of exp stay finite; a NaN spoils its own row, visibly."""
    blocks = Blocks.cut(GRIDS["text-first"], 32)
    q, k = (40 * tokens(blocks, 64) for _ in range(2))
    wanted = oracles.draft_scores(q, k, blocks, blocks, sub)
    found = draft(q, k, blocks, blocks, sub)
    assert wanted.abs().max() > 1000
    assert_close(found, wanted, 2e-6, 1e-5)
    q[0, 1, 100, 3] = float("nan")
    spoilt = draft(q, k, blocks, blocks, sub)
    row = int(blocks.owner[100])
    assert spoilt[0, 1, row].isnan().all()
    spoilt[0, 1, row] = found[0, 1, row]
    assert torch.equal(spoilt, found)


def test_offsets_past_2_31_elements() -> None:
    far.assert_passes("""
from vidsparse.kernels.gpu.draft import draft_scores_kernel
D = 64
one = torch.ones(1, dtype=torch.int32)
for rows, wide in ((2**23, 64), (64, 2**23)):  # query blocks of a head, key blocks
    q, k = (virtual((4 * n + 64) * D, torch.float32) for n in (rows, wide))
    a, b = q[4 * rows * D :].view(64, D), k[4 * wide * D :].view(64, D)
    for x in (a, b):
        x.copy_(torch.randn(64, D))
    out = virtual((4 * rows + 64) * wide, torch.float32)
    draft_scores_kernel[(1, 1, 5)](
        q, k, one, one, out, 1.0, rows, wide, D=D, BM=64, BN=64, BK=32, SUB=1, STAGES=2,
        WHOLE=False,
    )
    assert close(out[4 * rows * wide :].view(64, wide)[:, :64], a.double() @ b.double().T)
""")
