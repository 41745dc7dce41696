"""The exact engines that are libraries, in whole calls against the reference in float64.

    TRITON_INTERPRET=1 pytest -m interp

What stands for a library computes what it documents, so this proves what is ours: operands, lists,
addresses, padding, merge. `kernels/aot/engines_gate.py` runs the libraries themselves up to the
launch.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

import libraries
from cuts import GRIDS
from plans import biased, ordered

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.kernels import reference
from vidsparse.kernels.gpu import engine, support
from vidsparse.plan import SKIP, BlockPlan

pytestmark = pytest.mark.interp

TOLERANCES = {torch.float16: 8e-4, torch.bfloat16: 6e-3}
"""Relative L2 of the output; out of an engine is rounded once more by the merge."""

LSE_TOLERANCE = 2e-3
"""Absolute; the reference does not round the means of keys."""

CELLS = [
    *(("cudnn", blocks) for blocks in ((64, 64), (128, 128), (128, 64), (64, 128))),
    *(("fa4", blocks) for blocks in ((128, 64), (64, 64), (64, 16), (128, 128))),
]
WHOLE = TokenGrid(1, 4, 64)
"""Every block is full."""


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries.install(monkeypatch)


def plan_of(
    grid: TokenGrid, block_q: int, block_k: int, rest: bool = True, batch: int = 1
) -> BlockPlan:
    """A third of the blocks listed; in the first head an empty and a full row."""
    q_blocks, k_blocks = Blocks.cut(grid, block_q), Blocks.cut(grid, block_k)
    shape = batch, 2, len(q_blocks), len(k_blocks)
    levels = torch.where(torch.rand(shape) < 0.3, 0, SKIP).to(torch.int8)
    levels[:, 0, -1], levels[:, 0, 0] = 0, SKIP
    plan = BlockPlan.from_levels(levels, q_blocks, k_blocks, (0,))
    return plan.with_rest(k_blocks.levels, "global") if rest else plan


def tensors(
    plan: BlockPlan, depth: int = 64, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, S, D] as views of [B, S, H, D] memory."""
    batch, heads = plan.levels.shape[:2]
    tokens = plan.q_blocks.tokens, plan.k_blocks.tokens, plan.k_blocks.tokens
    q, k, v = (torch.randn(batch, n, heads, depth).to(dtype).transpose(1, 2) for n in tokens)
    return q, k, v


def assert_matches(
    name: str, qkv: tuple[Tensor, Tensor, Tensor], plan: BlockPlan, order: Tensor | None = None
) -> None:
    """Output and LSE of an engine equal the reference; out is laid out like q."""
    q, k, v = qkv
    straight = [x.double() if order is None else x.double()[:, :, order] for x in qkv]
    want, want_lse = reference.execute(straight[0], straight[1], straight[2], plan)
    out, lse = engine.execute(q, k, v, plan, order=order, return_lse=True, engine=name)
    assert lse is not None and want_lse is not None
    assert out.dtype == q.dtype and out.stride() == q.stride()
    if order is not None:
        out, lse = out[:, :, order], lse[:, :, order]
    assert (out.double() - want).norm() <= TOLERANCES[q.dtype] * want.norm()
    empty = want_lse.isinf()
    assert torch.equal(lse == float("-inf"), empty) and not out[empty].any()
    assert ((lse.double() - want_lse)[~empty].abs() <= LSE_TOLERANCE).all()


@pytest.mark.parametrize("rest", [False, True], ids=["skip", "rest"])
@pytest.mark.parametrize("grid", ["337", "text-first", "text-last"])
@pytest.mark.parametrize(("name", "blocks"), CELLS, ids=str)
def test_raggedness(name: str, blocks: tuple[int, int], grid: str, rest: bool) -> None:
    """Last blocks that are short, and a text before or after the video, off every grid."""
    plan = plan_of(GRIDS[grid], *blocks, rest)
    assert_matches(name, tensors(plan), plan)


@pytest.mark.parametrize(("name", "blocks"), CELLS, ids=str)
def test_two_batches_on_the_grid(name: str, blocks: tuple[int, int]) -> None:
    """Nothing is short or moved, so everything is read where it stands."""
    plan = plan_of(WHOLE, *blocks, batch=2)
    assert_matches(name, tensors(plan), plan)


@pytest.mark.parametrize("depth", [64, 96, 128])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ["cudnn", "fa4"])
def test_dtypes_and_head_dims(name: str, dtype: torch.dtype, depth: int) -> None:
    plan = plan_of(GRIDS["text-first"], 64, 64)
    assert_matches(name, tensors(plan, depth, dtype), plan)


def test_a_head_dim_between() -> None:
    plan = plan_of(GRIDS["text-first"], 128, 64)
    assert_matches("fa4", tensors(plan, 40), plan)


@pytest.mark.parametrize(("name", "blocks"), CELLS, ids=str)
def test_orders_of_heads(name: str, blocks: tuple[int, int]) -> None:
    plan = ordered(biased(plan_of(GRIDS["text-first"], *blocks, batch=2)))
    assert_matches(name, tensors(plan), plan)


@pytest.mark.parametrize(("name", "blocks"), CELLS, ids=str)
def test_one_order_of_all_heads(name: str, blocks: tuple[int, int]) -> None:
    """As in a transformer whose tokens stand in raster order."""
    plan = plan_of(GRIDS["text-last"], *blocks)
    assert_matches(name, tensors(plan), plan, torch.randperm(plan.q_blocks.tokens))


@pytest.mark.parametrize("name", ["cudnn", "fa4"])
def test_queries_and_keys_of_other_numbers(name: str) -> None:
    q_blocks, k_blocks = (
        Blocks.cut(g, 64) for g in (TokenGrid(1, 3, 50), TokenGrid(1, 1, 241, 30))
    )
    levels = torch.where(torch.rand(1, 2, len(q_blocks), len(k_blocks)) < 0.5, 0, SKIP)
    plan = BlockPlan.from_levels(levels.to(torch.int8), q_blocks, k_blocks, (0,)).with_rest(6)
    assert_matches(name, tensors(plan), plan)


@pytest.mark.parametrize("name", ["cudnn", "fa4"])
def test_without_a_full_block_no_library_is_asked(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(TokenGrid(1, 1, 5), 64, 64)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(type(engine.chosen(name, asked(plan))), "run", never)
    assert_matches(name, tensors(plan), plan)


def asked(plan: BlockPlan, depth: int = 64, dtype: torch.dtype = torch.bfloat16) -> Any:
    sizes = plan.q_blocks.size, plan.k_blocks.size
    return engine.Question(torch.device("cpu"), dtype, depth, *sizes)


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def gaps(x: Tensor) -> Tensor:
    """Every other token of a longer tensor."""
    return torch.stack([x, x], 3).transpose(1, 2).flatten(2, 2)[:, :, :, 1].transpose(1, 2)


def off_alignment(x: Tensor) -> Tensor:
    """The first element 8 bytes past a multiple of 128, rows on no multiple of 16."""
    wide = torch.cat([torch.zeros_like(x[..., :4]), x], 3)
    return wide[..., 4:]


@pytest.mark.parametrize("laid", [contiguous, gaps, off_alignment])
@pytest.mark.parametrize(("name", "blocks"), CELLS, ids=str)
def test_memory_layouts(
    name: str, blocks: tuple[int, int], laid: Callable[[Tensor], Tensor]
) -> None:
    """FlashAttention-4 copies what it cannot read itself."""
    plan = plan_of(WHOLE, *blocks)
    q, k, v = tensors(plan)
    want = engine.execute(q, k, v, plan, engine=name, return_lse=True)
    found = engine.execute(*map(laid, (q, k, v)), plan, engine=name, return_lse=True)
    for each, other in zip(found, want, strict=True):
        assert each is not None and other is not None and torch.equal(each, other)


@pytest.mark.parametrize("capability", [(10, 0), (11, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("grid", ["337", "text-first"])
@pytest.mark.parametrize("blocks", [(64, 64), (128, 128), (128, 64)], ids=str)
def test_generations_of_cudnn(
    blocks: tuple[int, int],
    grid: str,
    capability: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each wants its operands in another form."""
    monkeypatch.setattr(support, "capability", lambda device: capability)
    plan = plan_of(GRIDS[grid], *blocks)
    q, k, v = tensors(plan, 128)
    assert_matches("cudnn", (q, gaps(k), gaps(v)), plan)
