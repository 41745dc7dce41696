"""Every launcher of Triton kernels is an operator of torch, with a fake that tells the truth.

TRITON_INTERPRET=1 pytest tests/test_triton_operators.py
"""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

from tiles import problem
from torch import Tensor
from torch.library import CustomOpDef, opcheck

import vidsparse.kernels.gpu
from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.kernels.gpu import engine
from vidsparse.plan import SKIP, BlockPlan

pytestmark = pytest.mark.interp

GRID = TokenGrid(2, 5, 7, 9)
BLOCKS = Blocks.cut(GRID, 16)
PLACE = BLOCKS.start, BLOCKS.count.int(), 16
ORDER = torch.randperm(GRID.tokens)


def operators() -> dict[str, CustomOpDef]:
    """Of all modules of Triton kernels, by their names in torch."""
    folder = Path(vidsparse.kernels.gpu.__file__).parent
    found = {}
    for path in sorted(folder.glob("[a-z]*.py")):
        for value in vars(import_module(f"vidsparse.kernels.gpu.{path.stem}")).values():
            if isinstance(value, CustomOpDef):
                found[value._qualname] = value
    return found


def tokens(depth: int = 40) -> Tensor:
    return torch.randn(2, GRID.tokens, 2, depth).transpose(1, 2)


def block_means() -> list[tuple[Any, ...]]:
    return [(tokens(), *PLACE), (tokens().half(), *PLACE, ORDER)]


def fill_keys() -> list[tuple[Any, ...]]:
    return [(tokens().half(), *PLACE, [0, -1, 192], 240, 64, order) for order in (None, ORDER)]


def draft_scores() -> list[tuple[Any, ...]]:
    count = BLOCKS.count.int()
    one = torch.randn(2, 2, len(BLOCKS), 40), torch.randn(2, 2, len(BLOCKS), 40)
    four = torch.randn(2, 2, 8, 40), torch.randn(2, 2, 12, 40)
    pieces = torch.ones(8, dtype=torch.int32), torch.ones(12, dtype=torch.int32)
    return [(*one, count, count, 1, 0.1), (*four, *pieces, 4, 0.1)]


def select() -> list[tuple[Any, ...]]:
    scores, forced = torch.randn(2, 2, 3, 33), torch.rand(3, 33) < 0.1
    sizes = torch.full((33,), 16)
    return [
        (scores, forced, "rank", None, [0], [7.0], 0, 33.0),
        (scores, forced, "logit", sizes, [0, 2], [0.3, 0.8], 1, 9.0),
    ]


def pack_tiles() -> list[tuple[Any, ...]]:
    levels = torch.randint(SKIP, 3, (6, 11), dtype=torch.int8)
    return [(levels, [0], [0], [64], 32), (levels, [0, 2, SKIP], [0, 22, 40], [64, 16, 1], 32)]


def taylor_state() -> list[tuple[Any, ...]]:
    video = (~BLOCKS.text).nonzero().flatten()
    return [(tokens(), tokens(), *PLACE, video, order) for order in (None, ORDER)]


def add_first_order() -> list[tuple[Any, ...]]:
    moment, rest = torch.randn(2, 2, 64, 64), torch.rand(2, 2, GRID.tokens)
    return [(tokens(), moment, rest, tokens())]


def key_mean() -> list[tuple[Any, ...]]:
    return [(torch.randn(2, 2, 96, 64).half(), torch.zeros(96))]


def quantise_keys() -> list[tuple[Any, ...]]:
    x = torch.randn(2, 2, 96, 64).half()
    return [(x, 32, torch.zeros(96)), (x, 32, torch.zeros(96), torch.randn(2, 2, 64))]


def quantise_queries() -> list[tuple[Any, ...]]:
    mean = torch.randn(2, 2, 64)
    return [(tokens().half(), *PLACE, 16), (tokens().half(), *PLACE, 16, mean, ORDER)]


def sparse_forward() -> list[tuple[Any, ...]]:
    calls = []
    for form, rest in (("pointer", False), ("pointer", True), ("tma", True), ("ws", True)):
        given = problem(masked=rest, rest=rest)
        keys, lists, rows, shape = given.keys, given.lists, given.rows, given.shape
        out, lse, share = (None if x is None else x.zero_() for x in given.outputs())
        order = torch.randperm(given.q.shape[2]) if rest else None
        calls.append((
            *(given.q, keys.k, keys.v, keys.bias),
            *(lists.entry, lists.bits, lists.count, lists.whole),
            *(rows.start, rows.count, rows.size, order, out, lse, share, None, None, None),
            *(shape.block_m, shape.block_n, shape.warps, shape.stages, shape.registers),
            *(shape.split, form),
        ))  # fmt: skip
    return calls


CALLS: dict[str, Callable[[], list[tuple[Any, ...]]]] = {
    f"vidsparse::{call.__name__}": call
    for call in (
        *(block_means, fill_keys, draft_scores, select, pack_tiles, taylor_state, add_first_order),
        *(key_mean, quantise_keys, quantise_queries, sparse_forward),
    )
}


def test_all_operators_are_here() -> None:
    assert sorted(operators()) == sorted(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_operator(name: str) -> None:
    """Schema, what it writes, shapes and strides of the fake, use in a graph of any sizes."""
    for arguments in CALLS[name]():
        opcheck(operators()[name], arguments)


def test_one_graph() -> None:
    """The engine of a plan in one graph, equal to the same calls without a graph."""
    levels = torch.randint(SKIP, 5, (2, 2, len(BLOCKS), len(BLOCKS)), dtype=torch.int8)
    plan = BlockPlan.from_levels(levels, BLOCKS, BLOCKS, (0, 1, 2, 3, 4)).with_rest(4, "global")
    shape = engine.tiling_for(tokens(), plan)
    layout = engine.layout_for(plan, shape.block_n, torch.device("cpu"))
    rows = engine.query_rows(BLOCKS, torch.device("cpu"))
    video = (~BLOCKS.text).nonzero().flatten()

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys = engine.fill(k, v, layout)
        lists = engine.lists_for(plan, layout, shape.block_n)
        out, lse = torch.zeros_like(q), torch.zeros(q.shape[:3])
        rest = torch.zeros_like(lse)
        engine.sparse_forward(q, keys, lists, rows, shape, out, lse, rest)
        engine.add_first_order(q, engine.taylor_state(k, v, *PLACE, video), rest, out)
        return out, lse

    qkv = tokens(), tokens(), tokens()
    graph = torch.compile(run, fullgraph=True, backend="aot_eager")
    for found, want in zip(graph(*qkv), run(*qkv), strict=True):
        assert torch.equal(found, want)
