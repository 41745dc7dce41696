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

import libraries
from tiles import problem
from torch import Tensor
from torch.library import opcheck

import vidsparse.kernels.gpu
from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.kernels import reference
from vidsparse.kernels.gpu import engine, exact_engine, exact_lists, rest, spread, summary, weights
from vidsparse.kernels.gpu import rest_merge as rest_merge_module
from vidsparse.kernels.gpu.exact import ExactLists
from vidsparse.kernels.gpu.exact import triton as ours
from vidsparse.kernels.gpu.operands import Means, Tiling
from vidsparse.kernels.gpu.operator import Operator
from vidsparse.plan import SKIP, BlockPlan

pytestmark = pytest.mark.interp

GRID = TokenGrid(2, 5, 7, 9)
BLOCKS = Blocks.cut(GRID, 16)
PLACE = BLOCKS.start, BLOCKS.count.int(), 16
ORDER = torch.randperm(GRID.tokens)


def operators() -> dict[str, Operator]:
    """Of all modules of Triton kernels, by their names in torch."""
    folder = Path(vidsparse.kernels.gpu.__file__).parent
    found = {}
    for path in sorted(folder.glob("**/[a-z]*.py")):
        inside = ".".join(path.relative_to(folder).with_suffix("").parts)
        for value in vars(import_module(f"vidsparse.kernels.gpu.{inside}")).values():
            if isinstance(value, Operator):
                found[f"vidsparse::{value.name}"] = value
    return found


def tokens(depth: int = 40) -> Tensor:
    return torch.randn(2, GRID.tokens, 2, depth).transpose(1, 2)


def block_means() -> list[tuple[Any, ...]]:
    return [(tokens(), *PLACE), (tokens().half(), *PLACE, ORDER)]


def second_moments() -> list[tuple[Any, ...]]:
    return [(tokens(), *PLACE, None, True), (tokens().half(), *PLACE, ORDER, False)]


def fill_keys() -> list[tuple[Any, ...]]:
    return [(tokens().half(), *PLACE, [0, -1, 192], 240, 64, order) for order in (None, ORDER)]


def draft_scores() -> list[tuple[Any, ...]]:
    count = BLOCKS.count.int()
    one = torch.randn(2, 2, len(BLOCKS), 40), torch.randn(2, 2, len(BLOCKS), 40)
    four = torch.randn(2, 2, 8, 40), torch.randn(2, 2, 12, 40)
    pieces = torch.ones(8, dtype=torch.int32), torch.ones(12, dtype=torch.int32)
    return [(*one, count, count, 1, 0.1), (*four, *pieces, 4, 0.1)]


def draft_spread() -> list[tuple[Any, ...]]:
    means = [torch.rand(2, 2, n, 40) for n in (3, 3, 7, 7)]
    values = [torch.ones(7, dtype=torch.int32), *torch.rand(2, 2, 2, 7)]
    how = 0.1, 2.0, 1e-37
    return [(*means, rule, *how, values if rule == "moments" else []) for rule in spread.RULES]


def block_errors() -> list[tuple[Any, ...]]:
    means, values = torch.randn(2, 2, 3, 40), tokens()
    return [(means, x, values.to(x), *PLACE, order, 0.1, 1e-37)
            for x, order in ((tokens(), None), (tokens().half(), ORDER))]  # fmt: skip


def lost_mass() -> list[tuple[Any, ...]]:
    text = torch.arange(33) > 30
    return [(*torch.rand(2, 2, 2, 3, 33), torch.full((33,), 16), text, 7)]


def grams() -> list[tuple[Any, ...]]:
    return [(tokens(), 3, GRID.tokens - 5), (tokens().half(), 0, 7)]


def project() -> list[tuple[Any, ...]]:
    basis = torch.randn(2, 2, 40, 6)
    return [(tokens(), basis, None, 3, 50), (tokens().half(), basis, ORDER, 0, GRID.tokens)]


def main_axes() -> list[tuple[Any, ...]]:
    x = torch.randn(3, 40, 40)
    return [(x @ x.mT, torch.randn(40, axes), 1e-5, 2) for axes in (1, 6)]


def bisect() -> list[tuple[Any, ...]]:
    names = torch.arange(50, dtype=torch.int32)
    return [(torch.randn(2, 2, 3, 50), names, size) for size in ([8], [16, 64])]


def finite_means() -> list[tuple[Any, ...]]:
    return [(tokens(), *PLACE, None), (tokens().half(), *PLACE, ORDER)]


def rest_weights() -> list[tuple[Any, ...]]:
    levels = torch.randint(SKIP, 1, (2, 2, 3, 33), dtype=torch.int8)
    count = torch.full((33,), 16, dtype=torch.int32)
    return [
        (torch.randn(2, 2, 3, 33), levels, tilt, count, columns, dtype)
        for tilt, columns, dtype in (
            (None, 33, torch.float32),
            (torch.rand(levels.shape), 40, torch.float16),
        )
    ]


def rest_bias() -> list[tuple[Any, ...]]:
    levels = torch.randint(SKIP, 1, (2, 2, 3, 33), dtype=torch.int8)
    bias = torch.zeros(64)
    return [(levels, tilt, bias) for tilt in (None, torch.rand(levels.shape))]


def select() -> list[tuple[Any, ...]]:
    scores, forced = torch.randn(2, 2, 3, 33), torch.rand(3, 33) < 0.1
    sizes = torch.full((33,), 16)
    return [
        (scores, forced, "rank", None, [0], [7.0], 0, 33.0),
        (scores, forced, "logit", sizes, [0, 2], [0.3, 0.8], 1, 9.0),
    ]


def pack_tiles() -> list[tuple[Any, ...]]:
    levels = torch.randint(SKIP, 3, (6, 11), dtype=torch.int8)
    return [(levels, [0], [0], [64], 32), (levels, [0, 2], [0, 22], [64, 16], 32)]


def pack_exact() -> list[tuple[Any, ...]]:
    levels = torch.randint(SKIP, 1, (2, 2, 3, 11), dtype=torch.int8)
    return [(levels, torch.arange(11, dtype=torch.int32) * 64, 2, 32, 23)]


def row_shares() -> list[tuple[Any, ...]]:
    levels = torch.randint(SKIP, 2, (2, 2, 3, 11), dtype=torch.int8)
    groups, count = torch.arange(33).view(3, 11), torch.tensor([16, 16, 3])
    return [(levels, groups, count, torch.tensor([99.0]).double())]


def summarise() -> list[tuple[Any, ...]]:
    video = (~BLOCKS.text).int()
    return [(tokens(), tokens(), *PLACE, video, order, n) for order, n in ((None, 70), (ORDER, 0))]


def block_moments() -> list[tuple[Any, ...]]:
    return [(tokens(), tokens(), *PLACE, order) for order in (None, ORDER)]


def rest_merge() -> list[tuple[Any, ...]]:
    q = tokens()
    levels = torch.randint(SKIP, 1, (2, 2, len(BLOCKS), len(BLOCKS)), dtype=torch.int8)
    rows = BLOCKS.start, BLOCKS.count.int(), 16
    means = *torch.randn(2, 2, 2, 64, 64), torch.randn(*levels.shape[:3], 64)
    short = [torch.tensor([3], dtype=torch.int32)] * 3
    moment = torch.randn(2, 2, 2, 64, 64)
    return [
        (q, tokens(), tokens(), levels, *rows, order, tokens(), torch.randn(2, 2, GRID.tokens),
         *rest, 1, 2)
        for order, rest in (
            (None, (*means, None, [])),
            (ORDER, (None, None, None, None, short)),
            (None, (*means, moment, short)),
        )
    ]  # fmt: skip


def key_mean() -> list[tuple[Any, ...]]:
    return [(torch.randn(2, 2, 96, 64).half(), torch.zeros(96))]


def quantise_keys() -> list[tuple[Any, ...]]:
    x = torch.randn(2, 2, 96, 64).half()
    return [(x, 32, torch.zeros(96)), (x, 32, torch.zeros(96), torch.randn(2, 2, 64))]


def quantise_queries() -> list[tuple[Any, ...]]:
    mean = torch.randn(2, 2, 64)
    return [(tokens().half(), *PLACE, 16), (tokens().half(), *PLACE, 16, mean, ORDER)]


def levels_forward() -> list[tuple[Any, ...]]:
    calls = []
    for masked in (False, True):
        given = problem(masked=masked)
        keys, lists, rows, shape = given.keys, given.lists, given.rows, given.shape
        out, lse = (x.zero_() for x in given.outputs())
        order = torch.randperm(given.q.shape[2]) if masked else None
        calls.append((
            *(given.q, keys.k, keys.v, keys.bias),
            *(lists.entry, lists.bits, lists.count, lists.whole),
            *(rows.start, rows.count, rows.size, order, out, lse, None, None, None),
            *(shape.block_m, shape.block_n, shape.warps, shape.stages, shape.split),
        ))  # fmt: skip
    return calls


def exact_tiles() -> list[tuple[Any, ...]]:
    q = torch.randn(2, GRID.tokens, 2, 64).half().transpose(1, 2)
    entry, count = torch.zeros(2, 2, 1, 3, dtype=torch.int32), torch.ones(2, 2, 1).int()
    rows = torch.zeros(1, dtype=torch.int64), torch.tensor([GRID.tokens], dtype=torch.int32), 128
    return [
        (q, q, q, entry, count, *rows, order, torch.zeros_like(q), torch.zeros(q.shape[:3]),
         128, 64, 4, 2, None, form)
        for form, order in (("pointer", None), ("tma", ORDER))
    ]  # fmt: skip


def cudnn_tiles() -> list[tuple[Any, ...]]:
    q, entry, count, out = library_operands()
    return [(*(q, q, q), entry, count, size, 64, *out) for size in (64, 128)]


def unblock() -> list[tuple[Any, ...]]:
    start, count, size = PLACE
    found = []
    for order, view in ((None, False), (ORDER, True)):
        x = torch.randn(2, 2, len(count) * size, 64).half()[..., :40]
        out = torch.zeros(2, GRID.tokens, 2, 40).half().transpose(1, 2) if view else tokens().half()
        lses = torch.randn(x.shape[:3]), torch.zeros(out.shape[:3])
        found.append((x, lses[0], start, count, size, order, out, lses[1]))
    return found


def fa4_tiles() -> list[tuple[Any, ...]]:
    q, entry, count, out = library_operands()
    return [(*(q, q, q), entry[:, :, :1], count[:, :, :1], 128, 64, *out)]


def library_operands() -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """q, lists for blocks of 64, out and lse."""
    q = torch.randn(2, GRID.tokens, 2, 64).half().transpose(1, 2)
    entry, count = torch.zeros(2, 2, 2, 3, dtype=torch.int32), torch.ones(2, 2, 2).int()
    return q, entry, count, (torch.zeros_like(q), torch.zeros(q.shape[:3]))


CALLS: dict[str, Callable[[], list[tuple[Any, ...]]]] = {
    f"vidsparse::{call.__name__}": call
    for call in (
        *(block_means, second_moments, fill_keys, draft_scores, draft_spread, lost_mass),
        block_errors,
        *(finite_means, rest_weights, rest_bias, grams, project, main_axes, bisect, unblock),
        *(select, pack_exact, exact_tiles, rest_merge),
        *(summarise, block_moments, pack_tiles, levels_forward, row_shares),
        *(key_mean, quantise_keys, quantise_queries, cudnn_tiles, fa4_tiles),
    )
}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for the libraries of exact engines."""
    libraries.install(monkeypatch)


def test_all_operators_are_here() -> None:
    assert sorted(operators()) == sorted(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_operator(name: str) -> None:
    """Schema, what it writes, shapes and strides of the fake, use in a graph of any sizes."""
    for arguments in CALLS[name]():
        opcheck(operators()[name].overload, arguments)


def test_one_graph() -> None:
    """The kernels of a plan in one graph, equal to the same calls without a graph."""
    levels = torch.randint(SKIP, 1, (2, 2, len(BLOCKS), len(BLOCKS)), dtype=torch.int8)
    plan = BlockPlan.from_levels(levels, BLOCKS, BLOCKS, (0,)).with_rest(4, "global")
    place = exact_engine.key_place(BLOCKS, 16, "token", False, torch.device("cpu"))
    shape, rows = Tiling(16, 16, 4, 1), engine.query_rows(BLOCKS, torch.device("cpu"))
    video, bias = (~BLOCKS.text).int(), rest._bias(BLOCKS, torch.device("cpu"))

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        lists = ExactLists(*exact_lists.pack_exact(levels, place.entry, 1, 16, place.width))
        out, lse = torch.zeros_like(q), torch.zeros(q.shape[:3])
        ours.exact_tiles(q, k, v, lists, rows, out, lse, shape, "pointer")
        _, *pair, moment = summary.summarise(k, v, *PLACE, video, None, 70)
        operands = q, k, v, levels, rows, out, lse, Means(*pair, bias)
        unlisted = weights.rest_bias(levels, None, bias)
        rest_merge_module.rest_merge(*operands, unlisted, moment, place.short)
        return out, lse

    qkv = tokens(), tokens(), tokens()
    graph = torch.compile(run, fullgraph=True, backend="aot_eager")
    for found, want in zip(graph(*qkv), run(*qkv), strict=True):
        assert torch.equal(found, want)
    want, _ = reference.execute(*(x.double() for x in qkv), plan)
    assert (run(*qkv)[0] - want).norm() < 3e-6 * want.norm()
