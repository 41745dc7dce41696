"""The Triton engine's kernel over plain lists, in every form, against float64.

    TRITON_INTERPRET=1 pytest -m interp

The interpreter knows neither TMA's rules nor warp groups: this tests indices and arithmetic.
"""

import os
from dataclasses import dataclass, replace
from itertools import product
from math import nan
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

import far

from vidsparse.blocks import Blocks
from vidsparse.kernels.gpu import levels_forward, oracles, rest_merge, support
from vidsparse.kernels.gpu.exact import ExactLists, Question
from vidsparse.kernels.gpu.exact import triton as ours
from vidsparse.kernels.gpu.operands import QueryRows, Tiling

pytestmark = pytest.mark.interp

TOLERANCES = {torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""Relative L2 of the output."""

LSE_TOLERANCE = 1e-4
FORMS = ours.FORMS
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Problem:
    """q [B, H, S, D], k, v [B, H, R, D] and lists of tiles of 64 keys at any rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    lists: ExactLists
    rows: QueryRows

    def outputs(self) -> tuple[Tensor, Tensor]:
        """out and lse to write into, full of NaN."""
        batch, heads, tokens, depth = self.q.shape
        out = torch.full((batch, tokens, heads, depth), nan, dtype=self.v.dtype)
        return out.transpose(1, 2), torch.full(self.q.shape[:3], nan)

    def expected(self) -> tuple[Tensor, Tensor]:
        entry, count = self.lists.entry, self.lists.count
        text = torch.zeros(len(self.rows.count), dtype=torch.bool)
        blocks = Blocks(self.rows.start, self.rows.count.long(), text, self.rows.size)
        return oracles.exact_tiles(self.q, self.k, self.v, entry, count, 64, blocks)


def problem(
    depth: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
    counts: tuple[int, ...] = (128, 43, 128, 1),
    tiles: int = 7,
) -> Problem:
    """Tiles 64 or more rows apart, none on a grid; an empty and a full list; q, k, v strided.

    counts: tokens of the query blocks.
    """
    heads, size = 2, max(64, *counts)
    first = torch.arange(tiles) * 64 + torch.randint(0, 3, (tiles,)).cumsum(0)
    length = int(first[-1]) + 64
    q = torch.randn(batch, sum(counts), 3, heads, depth).to(dtype)[:, :, 1].transpose(1, 2)
    k, v = (torch.randn(batch, length, 2, heads, depth).to(dtype)[:, :, 1].transpose(1, 2)
            for _ in range(2))  # fmt: skip
    keep = torch.rand(batch, heads, len(counts), tiles) < 0.6
    keep[0, 0, 0], keep[-1, -1, -1] = False, True
    entry = torch.randint(0, length - 64, (*keep.shape[:3], tiles + 1), dtype=torch.int32)
    for row, kept in zip(entry.flatten(0, 2), keep.flatten(0, 2), strict=True):
        row[: int(kept.sum())] = first[kept].int()
    start = torch.tensor([sum(counts[:i]) for i in range(len(counts))])
    rows = QueryRows(start, torch.tensor(counts, dtype=torch.int32), size)
    return Problem(q, k, v, ExactLists(entry, keep.sum(-1).int()), rows)


def assert_form(given: Problem, form: str, block_m: int = 128, **how: Any) -> None:
    shape = Tiling(block_m, 64, 4, 2)
    if given.q.dtype == torch.float32:
        shape = Tiling(32, 64, 4, 1)
    out, lse = given.outputs()
    ours.exact_tiles(given.q, given.k, given.v, given.lists, given.rows, out, lse, shape, form)
    want, want_lse = given.expected()
    empty = want_lse.isinf()
    assert empty.any() and not empty.all() and torch.equal(lse == float("-inf"), empty)
    assert not out[empty].any()
    assert (out.double() - want).norm() <= TOLERANCES[given.q.dtype] * want.norm()
    assert ((lse.double() - want_lse)[~empty].abs() <= LSE_TOLERANCE).all()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("depth", [64, 96, 128, 40])
@pytest.mark.parametrize("form", FORMS)
def test_any_list(form: str, depth: int, batch: int) -> None:
    assert_form(problem(depth, torch.bfloat16, batch), form)


@pytest.mark.parametrize("form", FORMS)
def test_float16(form: str) -> None:
    assert_form(problem(128, torch.float16, 2, (43, 128)), form)


@pytest.mark.parametrize("depth", [64, 72])
def test_float32(depth: int) -> None:
    assert_form(problem(depth, torch.float32), "pointer")


@pytest.mark.parametrize(
    ("form", "counts", "block_m"),
    [
        ("pointer", (128, 64, 65, 3), 64),
        ("tma", (128, 64, 65, 3), 64),
        ("tma", (64, 21, 64), 64),
        ("tma", (256, 128, 130), 128),
    ],
)
def test_several_tiles_of_queries(form: str, counts: tuple[int, ...], block_m: int) -> None:
    """Blocks of two tiles, some of which are empty, and blocks of one tile of 64."""
    given = problem(counts=counts)
    assert given.rows.size == max(counts)
    assert_form(given, form, block_m)


@pytest.mark.parametrize("each", [False, True], ids=["one order", "of each head"])
@pytest.mark.parametrize("form", FORMS)
def test_orders_of_queries(form: str, each: bool) -> None:
    """Read and written by an order: the same numbers as on moved queries."""
    given = problem(64, batch=2)
    shape, total = Tiling(128, 64, 4, 2), given.q.shape[2]
    orders = torch.stack([torch.randperm(total) for _ in range(4)]).view(2, 2, total)
    order = orders if each else orders[0, 0]
    place = orders if each else order.expand(2, 2, total)
    moved = given.q.gather(2, place[..., None].expand(given.q.shape))
    out, lse = given.outputs()
    operands = given.k, given.v, given.lists
    ours.exact_tiles(moved, *operands, given.rows, out, lse, shape, form)
    found, found_lse = given.outputs()
    rows = replace(given.rows, order=order)
    ours.exact_tiles(given.q, *operands, rows, found, found_lse, shape, form)
    assert torch.equal(found.gather(2, place[..., None].expand(out.shape)), out)
    assert torch.equal(found_lse.gather(2, place), lse)


def test_offsets_past_2_31_elements() -> None:
    far.assert_passes("""
from vidsparse.kernels.gpu.exact import ExactLists, triton as ours
from vidsparse.kernels.gpu.operands import QueryRows, Tiling
HEADS, N, D = 3, 130, 64
far_head = (1, HEADS, N, D), (0, 2**30 + 1024, D, 1)  # heads 2 start past 2^31 elements
far_token = (1, HEADS, N, D), (0, D, 2**24, 1)  # the last tokens lie there
rows = QueryRows(torch.tensor([0, 128]), torch.tensor([128, 2], dtype=torch.int32), 128)
entry = torch.tensor([1, 66, 0], dtype=torch.int32).repeat(1, HEADS, 2, 1)
lists = ExactLists(entry, torch.full((1, HEADS, 2), 2, dtype=torch.int32))
def at(place):
    shape, strides = place
    size = 1 + sum((n - 1) * step for n, step in zip(shape, strides))
    return virtual(size, torch.float16).as_strided(*place)
for q_place, k_place in ((far_head, far_token), (far_token, far_head)):
    q, k, v, out = at(q_place), at(k_place), at(k_place), at(q_place)
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape))
    want, _ = oracles.exact_tiles(q, k, v, entry, lists.count, 64, Blocks(
        rows.start, rows.count.long(), torch.zeros(2, dtype=torch.bool), 128))
    for form in ours.FORMS:
        out.zero_()
        lse = torch.empty(1, HEADS, N)
        ours.exact_tiles(q, k, v, lists, rows, out, lse, Tiling(128, 64, 8, 2), form)
        assert close(out, want), form
""")


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_stands_off_the_grid_of_tma(name: str) -> None:
    """Rows of 68 numbers are 136 bytes apart, and a tensor may begin at any byte of two."""
    given = problem()
    for odd in (F.pad(getattr(given, name), (0, 4))[..., :64], shifted(getattr(given, name))):
        assert_form(replace(given, **{name: odd}), "tma")


def shifted(x: Tensor) -> Tensor:
    """The same numbers, contiguous, two bytes off the grid."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    return room[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_what_auto_runs(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """The first form that takes a call where it was measured, elsewhere the pointer form."""
    monkeypatch.setattr(ours.support, "capability", lambda device: capability)
    found = [
        ours.form_of(asked(**changes))
        for changes in (
            {},
            {"block_q": 64, "block_k": 64},
            {"block_q": 32},
            {"dtype": torch.float32},
            {"head_dim": 60},
            {"form": "tma"},
        )
    ]
    measured = ["tma", "tma", "pointer", "pointer", "pointer", "tma"]
    assert found == (measured if capability[0] == 9 else [*["pointer"] * 5, "tma"])
    assert ours.tiling(asked(form="auto")) == ours.tiling(asked(form=found[0]))


def asked(**changes: Any) -> Question:
    return replace(Question(CPU, torch.bfloat16, 128, 128, 64), **changes)


@pytest.mark.parametrize("arch", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_tilings_divide_their_blocks(
    form: str, arch: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours.support, "capability", lambda device: arch)
    sizes, offered = (16, 32, 64, 128), 0
    for block_q, block_k, depth, dtype in product(sizes, sizes, (40, 64, 128), TOLERANCES):
        question = asked(form=form, block_q=block_q, block_k=block_k, head_dim=depth, dtype=dtype)
        if why := ours.ENGINE.refuses(question):
            assert "pointer" in why
            continue
        offered += 1
        shape = ours.tiling(question)
        assert block_q % shape.block_m == 0 and block_k % shape.block_n == 0
        assert ours.ENGINE.tile(question) == shape.block_n >= 16
    assert bool(offered) == (form == "pointer" or arch[0] in (9, 10))


@pytest.mark.parametrize("arch", [(13, 1), support.AMD], ids=str)
def test_an_unknown_device_takes_the_portable_tiling(
    arch: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "capability", lambda device: arch)
    for head_dim in (128, 64, 128):
        assert ours.tiling(asked(head_dim=head_dim)) == ours.PORTABLE
    with pytest.raises(ValueError, match=r": form 'tma' was built for NVIDIA's .*'pointer'"):
        ours.tiling(asked(form="tma"))


def test_generations_are_those_of_the_tilings() -> None:
    assert {major for major, _ in ours.POINTER} == set(support.GENERATIONS)
    assert {major for major, _ in levels_forward.TILINGS} == set(support.GENERATIONS)
    assert {major for major, _ in rest_merge.TILINGS} == set(support.GENERATIONS)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, words in (
        ({"form": "cuda"}, r"form 'cuda': expected one of pointer, tma"),
        ({"form": "tma", "dtype": torch.float32}, r"float32.*bfloat16 or float16.*'pointer'"),
        ({"form": "tma", "head_dim": 60}, r"head dim 60: form 'tma' needs a multiple of 8"),
        ({"form": "tma", "block_q": 32}, r"blocks of 32 queries.*at least 64"),
    ):
        with pytest.raises(ValueError, match=words):
            ours.tiling(asked(**changes))
    for arch in ((8, 0), (8, 9), (12, 0)):
        monkeypatch.setattr(ours.support, "capability", lambda device, arch=arch: arch)
        with pytest.raises(ValueError, match=r"9\.x and 10\.x.*'pointer'"):
            ours.tiling(asked(form="tma"))
