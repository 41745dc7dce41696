"""int8 queries and keys: what is rounded, and `levels_forward` on them against float64.

TRITON_INTERPRET=1 pytest -m interp
"""

import os

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

from tiles import BLOCK_N, Problem, assert_right, problem

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.kernels import reference
from vidsparse.kernels.gpu import engine, oracles
from vidsparse.kernels.gpu.levels_forward import levels_forward
from vidsparse.kernels.gpu.quant import int8_operands, key_mean, quantise_keys, quantise_queries
from vidsparse.plan import SKIP, BlockPlan

pytestmark = pytest.mark.interp

TOLERANCE = 2e-2
"""Relative L2 of the output; 1.3e-2 is what rounding of normal data to int8 costs."""

LSE_TOLERANCE = 5e-2
"""Absolute: rows of few keys see single logits, off by 1.3e-2 (rms)."""

HALF_STEP = 0.5001
SCALE_TOLERANCE = 2e-7
"""Relative."""


def run(given: Problem, subtract_mean: bool = True) -> tuple[Tensor, Tensor]:
    outputs = given.outputs()
    q, keys, scales = int8_operands(given.q, given.keys, given.rows, given.shape, subtract_mean)
    assert q.dtype == keys.k.dtype == torch.int8 and keys.v is given.keys.v
    levels_forward(q, keys, given.lists, given.rows, given.shape, *outputs, scales)
    return outputs


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("depth", [64, 96, 128])
def test_forward(depth: int, masked: bool) -> None:
    """Pooled rows, ragged tiles and an offset common to all keys, which must cost nothing."""
    given = problem(depth, masked=masked, key_offset=3.0)
    assert_right(given, run(given), TOLERANCE, LSE_TOLERANCE)


def test_float16() -> None:
    given = problem(64, torch.float16, masked=True, counts=(43, 128))
    assert_right(given, run(given), TOLERANCE, LSE_TOLERANCE)


def test_the_mean_is_what_saves_it() -> None:
    """Without its removal the offset takes the bits that tell keys apart."""
    given = problem(key_offset=8.0)
    want = given.expected()[0]
    kept, removed = (
        (run(given, mean)[0].double() - want).norm() / want.norm() for mean in (False, True)
    )
    assert removed < TOLERANCE and removed < kept / 2


def test_several_tiles_of_queries() -> None:
    given = problem(masked=True, batch=2, counts=(128, 64, 65, 3), block_m=64)
    assert_right(given, run(given), TOLERANCE, LSE_TOLERANCE)


def assert_rounded(made: Tensor, scale: Tensor, values: Tensor, wanted: Tensor) -> None:
    """Every value is the nearest integer, but for the float32 arithmetic before it was rounded."""
    assert made.dtype == torch.int8 and scale.dtype == torch.float32
    assert (made - values).abs().max() <= HALF_STEP
    assert (scale / wanted - 1).abs().max() <= SCALE_TOLERANCE


@pytest.mark.parametrize("subtract_mean", [False, True], ids=["as is", "mean removed"])
def test_keys(subtract_mean: bool) -> None:
    """Half a step off at most; peaks reach 127; padding has no part in mean or scale."""
    keys = problem(batch=2, key_offset=5.0).keys
    x, bias = keys.k, keys.bias
    removed = key_mean(x, bias) if subtract_mean else None
    if removed is not None:
        assert removed.dtype == torch.float32
        assert (removed.double() - oracles.key_mean(x, bias)).abs().max() < 1e-5
    values, scale = quantise_keys(x, BLOCK_N, bias, removed)
    assert_rounded(values, scale, *oracles.quantise_keys(x, BLOCK_N, bias, removed))
    real = bias > float("-inf")
    assert not values[:, :, ~real].any()
    peaks = values.abs().unflatten(2, (-1, BLOCK_N)).amax((3, 4))
    holds = real.view(-1, BLOCK_N).any(1)
    assert (peaks[:, :, holds] == 127).all()
    assert (scale[:, :, ~holds] == 1).all()


def test_mean_of_many_slabs() -> None:
    x = torch.randn(1, 2, 2112, 64).half() + 1
    bias = torch.randint(0, 4, (2112,)).float()
    assert (key_mean(x, bias).double() - oracles.key_mean(x, bias)).abs().max() < 1e-5


def test_queries() -> None:
    """Every token once, one scale per tile of a block, the shift of the LSE."""
    given = problem(96, counts=(128, 43, 128, 1), block_m=64)
    mean = torch.randn(1, 2, 128)
    mean[..., 96:] = 0.0
    place = given.rows.start, given.rows.count, 128, 64
    values, scale, shift = quantise_queries(given.q, *place, mean)
    assert values.shape == given.q.shape and scale.shape == (1, 2, 8)
    *wanted, want = oracles.quantise_queries(given.q, given.blocks, 64, mean)
    assert_rounded(values, scale, *wanted)
    assert (shift.double() - want).abs().max() < 1e-5
    *_, none = quantise_queries(given.q, *place)
    assert not none.any()


def test_plans() -> None:
    """A plan with every level through the engine."""
    grid = TokenGrid(2, 9, 13, 41)
    q_blocks, k_blocks = Blocks.cut(grid, 128), Blocks.cut(grid, 64)
    levels = torch.randint(SKIP, 7, (1, 2, len(q_blocks), len(k_blocks)), dtype=torch.int8)
    plan = BlockPlan.from_levels(levels, q_blocks, k_blocks).with_rest(6)
    q, k, v = (torch.randn(1, grid.tokens, 2, 64).half().transpose(1, 2) for _ in range(3))
    out, lse = engine.execute(q, k + 2, v, plan, return_lse=True, qk="int8")
    want, want_lse = reference.execute(q.double(), (k + 2).double(), v.double(), plan)
    assert lse is not None and want_lse is not None
    assert (out.double() - want).norm() <= TOLERANCE * want.norm()
    assert (lse - want_lse).abs().max() <= LSE_TOLERANCE
