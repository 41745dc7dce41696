"""Drafts with the spread inside blocks against float64, in Triton's CPU interpreter.

    TRITON_INTERPRET=1 pytest tests/test_triton_spread.py

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
from cuts import GRIDS, assert_close, table, tokens
from torch import Tensor

from vidsparse.kernels.gpu.moments import second_moments
from vidsparse.kernels.gpu.spread import RULES, draft_spread
from vidsparse.kernels.gpu.waste import lost_mass

pytestmark = pytest.mark.interp

TINY = 1e-37


def scores(
    q: Tensor, k: Tensor, v: Tensor, cuts: tuple[Blocks, Blocks], rule: str, bound: float
) -> Tensor:
    """From the tokens, as a call makes them."""
    q_place, k_place = ((*table(blocks), None) for blocks in cuts)
    means = *second_moments(q, *q_place, False), *second_moments(k, *k_place, False)
    values = [cuts[1].count.int(), *second_moments(v, *k_place, True)] * (rule == "moments")
    return draft_spread(*means, rule, q.shape[3] ** -0.5, bound, TINY, values)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("depth", [64, 128, 40])
@pytest.mark.parametrize("grids", [("text-first", "337"), ("337", "text-last")], ids=str)
def test_draft_spread(grids: tuple[str, str], depth: int, rule: str) -> None:
    """The bound cuts some of the spreads."""
    cuts = Blocks.cut(GRIDS[grids[0]], 32), Blocks.cut(GRIDS[grids[1]], 16)
    q, k, v = (tokens(blocks, depth, batch=2) for blocks in (*cuts, cuts[1]))
    wanted = oracles.draft_spread(q, k, v, *cuts, rule, 0.6)
    found = scores(q, k, v, cuts, rule, 0.6)
    assert found.dtype == torch.float32 and found.is_contiguous()
    if rule == "spread":
        assert 0.05 < (wanted == 0.6).double().mean() < 0.95
    assert_close(found, wanted, 1e-5, 2e-5)


def test_what_is_not_finite_stays_in_its_row_and_is_no_bias() -> None:
    blocks = Blocks.cut(GRIDS["text-first"], 32)
    q, k, v = (tokens(blocks, 64) for _ in range(3))
    clean = {rule: scores(q, k, v, (blocks, blocks), rule, 1.0) for rule in RULES}
    q[0, 1, 100, 3] = float("nan")
    row = int(blocks.owner[100])
    for rule in RULES:
        found = scores(q, k, v, (blocks, blocks), rule, 1.0)
        own = found[0, 1, row]
        assert bool((own == 0).all() if rule == "spread" else own.isnan().all())
        found[0, 1, row] = clean[rule][0, 1, row]
        assert torch.equal(found, clean[rule])
    v[0, 0, 5, 1] = float("nan")
    assert scores(q, k, v, (blocks, blocks), "moments", 1.0)[0, 0, :, 0].isnan().all()


def test_values_that_are_all_the_same_have_the_least_score() -> None:
    blocks = Blocks.cut(GRIDS["337"], 16)
    q, k = (tokens(blocks, 64) for _ in range(2))
    k = k.new_ones(k.shape)
    found = scores(q, k, torch.zeros_like(k), (blocks, blocks), "moments", 1.0)
    want = oracles.draft_spread(q, k, k, blocks, blocks, "variance", 1.0)
    counts = blocks.count.log()
    assert_close(found, 2 * want + counts + torch.tensor(TINY).double().log(), 1e-5, 1e-4)


@pytest.mark.parametrize("blocks", [1, 5, 130, 300])
def test_lost_mass(blocks: int) -> None:
    """Some blocks are text; some masses tie with the last of the largest."""
    logits = (3 * torch.randn(2, 2, 3, blocks)).round(decimals=1)
    spread, count = torch.rand(logits.shape), torch.randint(1, 5, (blocks,)).clamp(max=2)
    text = torch.arange(blocks) >= max(1, blocks - 3)
    near = max(1, int(0.2 * int((~text).sum())))
    wanted = oracles.lost_mass(logits, spread, count, text, near)
    assert_close(lost_mass(logits, spread, count, text, near), wanted, 1e-4, 1e-6)
    logits[1, 0, 2, 0] = float("nan")
    found = lost_mass(logits, spread, count, text, near)
    assert found.isnan().nonzero().tolist() == [[1, 0, 2]]


def test_offsets_past_2_31_elements() -> None:
    far.assert_passes("""
from vidsparse.kernels.gpu.spread import draft_spread_kernel
from vidsparse.kernels.gpu.waste import lost_mass_kernel
D = 64
for rows, wide in ((2**23, 64), (64, 2**23)):  # query blocks of a head, key blocks
    q, k = (virtual((4 * n + 64) * D, torch.float32) for n in (rows, wide))
    a, b = q[4 * rows * D :].view(64, D), k[4 * wide * D :].view(64, D)
    for x in (a, b):
        x.copy_(torch.rand(64, D))
    out = virtual((4 * rows + 64) * wide, torch.float32)
    draft_spread_kernel[(1, 1, 5)](
        q, q, k, k, k, k, k, out, 1.0, 1.0, 1e9, 0.0, rows, wide, D=D, BM=64, BN=64, BK=32,
        RULE="variance", STAGES=2, WHOLE=False,
    )
    want = a.double() @ (b + b - b * b).double().T
    assert close(out[4 * rows * wide :].view(64, wide)[:, :64], want)
rows, wide = 8, 2**29  # a program reads the first blocks of its row
logits = virtual(rows * wide, torch.float32)
own = logits[7 * wide :][:64].copy_(torch.randn(64))
out, text, count = torch.empty(rows), torch.zeros(64) > 0, torch.ones(64, dtype=torch.int32)
lost_mass_kernel[(rows,)](logits, logits, count, text, out, wide, 9, NK=64)
want = oracles.lost_mass(own.view(1, 1, 1, 64), own.view(1, 1, 1, 64), count, text, 9)
assert close(out[7:], want.flatten())
""")
