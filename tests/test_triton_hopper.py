"""The TMA and the warp-specialised form of the sparse forward against float64.

    TRITON_INTERPRET=1 pytest -m interp

The interpreter knows neither TMA's rules nor warp groups: this tests indices and arithmetic.
"""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

import triton
from tiles import BLOCK_N, Problem, assert_right, problem

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.kernels import reference
from vidsparse.kernels.gpu import engine as triton_engine
from vidsparse.kernels.gpu import forward_hopper
from vidsparse.kernels.gpu.forward_hopper import FORMS, sparse_forward, tiling
from vidsparse.kernels.gpu.operands import Tiling
from vidsparse.plan import SKIP, BlockPlan

pytestmark = pytest.mark.interp

TOLERANCES = {torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""Relative L2 of the output."""

LSE_TOLERANCE = 1e-4
CONTENTS = {
    "plain": {},
    "masked": {"masked": True},
    "rest": {"masked": True, "rest": True},
    "all": {"masked": True, "rest": True, "batch": 2, "counts": (43, 128)},
}


def assert_form(given: Problem, form: str) -> None:
    outputs = given.outputs()
    sparse_forward(given.q, given.keys, given.lists, given.rows, given.shape, *outputs, form=form)
    assert_right(given, outputs, TOLERANCES[given.q.dtype], LSE_TOLERANCE)


@pytest.mark.parametrize("contents", CONTENTS)
@pytest.mark.parametrize("depth", [64, 96, 128])
@pytest.mark.parametrize("form", FORMS)
def test_any_list(form: str, depth: int, contents: str) -> None:
    assert_form(problem(depth, torch.bfloat16, **CONTENTS[contents]), form)


@pytest.mark.parametrize("depth", [64, 128])
@pytest.mark.parametrize("form", FORMS)
def test_float16(form: str, depth: int) -> None:
    assert_form(problem(depth, torch.float16, **CONTENTS["all"]), form)


@pytest.mark.parametrize(
    ("form", "counts", "block_m"),
    [("tma", (128, 64, 65, 3), 64), ("tma", (64, 21, 64), 64), ("ws", (256, 128, 130), 128)],
)
def test_several_tiles_of_queries(form: str, counts: tuple[int, ...], block_m: int) -> None:
    """Blocks of two tiles, some of which are empty, and blocks of one tile of 64."""
    given = problem(masked=True, rest=True, counts=counts, block_m=block_m)
    assert given.rows.size == max(counts)
    assert_form(given, form)


PITCH = 9 * BLOCK_N + 5
"""Rows from one half of a shared key buffer to the next."""


@pytest.mark.parametrize("form", FORMS)
def test_keys_and_values_in_one_buffer(form: str) -> None:
    """Heads that stand apart by other rows than their own."""
    given = problem(batch=2, counts=(128, 3))
    both = torch.full((2, 3, 2, PITCH, 64), float("inf"), dtype=torch.bfloat16)
    k, v = both[:, :2, 0, : given.keys.k.shape[2]], both[:, :2, 1, : given.keys.k.shape[2]]
    k.copy_(given.keys.k)
    v.copy_(given.keys.v)
    assert_form(replace(given, keys=replace(given.keys, k=k, v=v)), form)


@pytest.mark.parametrize("form", FORMS)
def test_plans(form: str) -> None:
    """A plan with every level through the engine, in this form."""
    grid = TokenGrid(2, 9, 13, 41)
    q_blocks, k_blocks = Blocks.cut(grid, 128), Blocks.cut(grid, 64)
    levels = torch.randint(SKIP, 7, (1, 2, len(q_blocks), len(k_blocks)), dtype=torch.int8)
    plan = BlockPlan.from_levels(levels, q_blocks, k_blocks).with_rest(6)
    q, k, v = (torch.randn(1, grid.tokens, 2, 64).half().transpose(1, 2) for _ in range(3))
    out, lse = triton_engine.execute(q, k, v, plan, return_lse=True, form=form)
    want, want_lse = reference.execute(q.double(), k.double(), v.double(), plan)
    assert lse is not None and want_lse is not None
    assert (out.double() - want).norm() <= 6e-4 * want.norm()
    assert (lse - want_lse).abs().max() <= 1e-3  # the engine rounds means to float16


OFFSETS = """
import sys
sys.path[:0] = [{tests!r}, {package!r}]
import resource
import interpreter
import torch
interpreter.install()
from vidsparse.kernels.gpu.forward import *
from vidsparse.kernels.gpu.operands import *
from vidsparse.kernels.gpu.forward_hopper import FORMS, sparse_forward
HEADS, N, D = 3, 130, 64
FAR = 2**30 + 1024  # between heads of q, k and v; heads 2 start past 2^31 elements
def rows_of(stride):
    memory = torch.empty((N - 1) * stride + HEADS * D, dtype=torch.float16)
    return memory.as_strided((1, HEADS, N, D), (0, D, stride, 1))
def heads_of(tokens):
    memory = torch.empty((HEADS - 1) * FAR + tokens * D, dtype=torch.float16)
    return memory.as_strided((1, HEADS, tokens, D), (0, FAR, D, 1))
out = rows_of(2**24)  # between tokens; the last ones lie past 2^31 elements
q, k, v = heads_of(N), heads_of(128), heads_of(128)
torch.manual_seed(0)
for x in (q, k, v):
    x.copy_(torch.randn(x.shape))
lse = torch.empty(1, HEADS, N)
entry = torch.tensor([[0, 1, 0]], dtype=torch.int32).repeat(2 * HEADS, 1) | 6 << 24
count = torch.full((2 * HEADS,), 2, dtype=torch.int32)
rows = QueryRows(torch.tensor([0, 128]), torch.tensor([128, 2], dtype=torch.int32), 128)
bits = torch.ones(2 * HEADS, 2, dtype=torch.int64)
keys, lists = Keys(k, v, torch.zeros(128)), TileLists(entry, bits, count, count // 2)
weight = (q.double() @ k.double().mT / D**0.5).softmax(-1)
want = weight @ v.double()
for form in FORMS:
    out.zero_()
    sparse_forward(q, keys, lists, rows, Tiling(128, 64, 8, 2), out, lse, form=form)
    assert (out.double() - want).norm() < 1e-3 * want.norm(), form
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 * 2**20
print("right")
"""


def test_offsets_past_2_31_elements() -> None:
    """Four tensors of 4.3 GB of address space, of which only the pages in use are committed."""
    package = Path(forward_hopper.__file__).parents[2]
    code = OFFSETS.format(tests=str(Path(__file__).parent), package=str(package))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "right", done.stderr


def test_allocator_of_the_caller_stays() -> None:
    from triton.runtime import _allocation

    def own(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8)

    triton.set_allocator(own)
    assert_form(problem(counts=(128, 3)), "ws")
    assert _allocation._allocator.get() is own


@pytest.mark.parametrize("arch", [(9, 0), (10, 0)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_tilings_divide_their_blocks(form: str, arch: tuple[int, int]) -> None:
    sizes, offered = (16, 32, 64, 128), 0
    for block_q, block_k, padded, masked in product(sizes, sizes, (64, 128), (False, True)):
        try:
            shape = tiling(form, torch.bfloat16, arch, block_q, block_k, padded, masked)
        except ValueError as error:
            assert "pointer" in str(error)
            continue
        offered += 1
        assert block_q % shape.block_m == 0 and block_k % shape.block_n == 0
    assert offered


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(counts=(128, 3))
    rest = given.lists, given.rows, given.shape, *given.outputs()
    keys = given.keys
    with pytest.raises(ValueError, match=r"'pointer'.*tma, ws"):
        sparse_forward(given.q, keys, *rest, form="pointer")
    exact = replace(keys, k=keys.k.float(), v=keys.v.float())
    with pytest.raises(ValueError, match=r"float32.*bfloat16 or float16.*'pointer'"):
        sparse_forward(given.q.float(), exact, *rest)
    wide = torch.zeros(1, 2, keys.k.shape[2], 72).bfloat16()[..., :64]
    with pytest.raises(ValueError, match=r"strides .*contiguous"):
        sparse_forward(given.q, replace(keys, k=wide, v=wide), *rest)
    far = torch.empty(2, 2**25, 64, 64, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match=r"4294967296 rows.*2\^31"):
        sparse_forward(given.q, replace(keys, k=far, v=far), *rest)
    odd = torch.zeros(1, 2, 131, 68).bfloat16()[..., :64]
    with pytest.raises(ValueError, match=r"q with strides .*16-byte grid"):
        sparse_forward(odd, keys, *rest, form="ws")
    small = given.lists, given.rows, Tiling(64, 64, 4, 2), *given.outputs()
    with pytest.raises(ValueError, match=r"'ws' splits 128 queries"):
        sparse_forward(given.q, keys, *small, form="ws")
    for arch in ((8, 0), (8, 9), (12, 0)):
        with pytest.raises(ValueError, match=r"9\.x and 10\.x.*'pointer'"):
            tiling("tma", torch.bfloat16, arch, 128, 128)
    with pytest.raises(ValueError, match=r"32 x 128 tokens.*at least 128 x 64"):
        tiling("ws", torch.bfloat16, (9, 0), 32, 128)
    with pytest.raises(ValueError, match=r"blocks of 32 queries.*at least 64"):
        tiling("tma", torch.bfloat16, (9, 0), 32, 128)
