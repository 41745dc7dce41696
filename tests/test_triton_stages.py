"""The kernels around the sparse forward against float64, in Triton's CPU interpreter.

    TRITON_INTERPRET=1 pytest tests/test_triton_stages.py

in a process of its own: what is interpreted there cannot be compiled later.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vidsparse.kernels import reference
from vidsparse.plan import Blocks, TokenGrid

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)


from vidsparse.kernels import triton_draft, triton_pool, triton_taylor

pytestmark = [
    pytest.mark.interp,
    pytest.mark.filterwarnings("ignore:divide by zero", "ignore:All-NaN slice"),
]

GRIDS = {
    "337": TokenGrid(1, 1, 337),
    "text-first": TokenGrid(2, 9, 13, 41, True),
    "text-last": TokenGrid(2, 9, 13, 41),
    "one-token": TokenGrid(1, 1, 1),
}
HALF_ULP = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Relative error of one element that was rounded once; for float32, of its sum."""

TOLERANCES = {torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""Relative L2 of a product."""

PACKAGE = Path(triton_pool.__file__).parents[2]


def tokens(
    blocks: Blocks, depth: int, dtype: torch.dtype = torch.float32, batch: int = 1
) -> Tensor:
    """[B, 2, S, D], a view of [B, S, 2, D] memory."""
    return (torch.randn(batch, blocks.tokens, 2, depth) + 0.5).to(dtype).transpose(1, 2)


def table(blocks: Blocks) -> tuple[Tensor, Tensor, int]:
    """start, count and size as the kernels take them."""
    return blocks.start, blocks.count.int(), blocks.size


def pieces(blocks: Blocks, sub: int) -> tuple[Tensor, Tensor, int]:
    """The table of `sub` pieces to every block, missing ones of no token."""
    size = blocks.size // sub
    start = blocks.start[:, None] + torch.arange(sub) * size
    count = ((blocks.start + blocks.count)[:, None] - start).clamp(0, size)
    return start.flatten(), count.flatten().int(), size


def rows_of(first: dict[int, int]) -> list[int]:
    """First row of each level as `fill_keys` takes it."""
    return [first.get(level, triton_pool.ABSENT) for level in range(max(first) + 1)]


def segments(blocks: Blocks, levels: tuple[int, ...], block_n: int) -> tuple[dict[int, int], int]:
    """First row of each level and rows of the buffer, levels from multiples of block_n on."""
    first, rows = {}, 0
    for level in levels:
        first[level] = rows
        rows += -(-len(blocks) * (blocks.size >> level) // block_n) * block_n
    return first, rows


def expected_keys(
    x: Tensor, blocks: Blocks, first: dict[int, int], rows: int, width: int
) -> Tensor:
    """The key buffer in float64."""
    out = torch.zeros(*x.shape[:2], rows, width, dtype=torch.float64)
    for level, at in first.items():
        means, _, owner = reference.pool(x.double(), blocks, level)
        nth = torch.arange(len(owner)) - torch.searchsorted(owner, owner)
        out[:, :, at + owner * (blocks.size >> level) + nth, : x.shape[3]] = means
    return out


def assert_close(found: Tensor, wanted: Tensor, relative: float, absolute: float = 1e-6) -> None:
    """Of every element; the bound is for rounding, so a thousandth is added."""
    assert found.shape == wanted.shape
    error = (found.double() - wanted).abs()
    assert (error <= 1.001 * relative * wanted.abs() + absolute).all(), error.max()


def assert_keys(x: Tensor, blocks: Blocks, levels: tuple[int, ...], block_n: int) -> None:
    """`fill_keys` equals the oracle, tokens and zeros bit for bit."""
    first, rows = segments(blocks, levels, block_n)
    width = 64 if x.shape[3] <= 64 else 128
    found = triton_pool.fill_keys(x, *table(blocks), rows_of(first), rows, width)
    wanted = expected_keys(x, blocks, first, rows, width)
    assert found.dtype == x.dtype and found.is_contiguous()
    assert_close(found, wanted, HALF_ULP[x.dtype])
    exact = wanted == 0
    exact[:, :, : len(blocks) * blocks.size] = True
    assert torch.equal(found[exact].double(), wanted[exact])


@pytest.mark.parametrize("size", [1, 4, 16, 64, 128])
@pytest.mark.parametrize("grid", GRIDS)
def test_block_means(grid: str, size: int) -> None:
    blocks = Blocks.cut(GRIDS[grid], size)
    x = tokens(blocks, 64, batch=2)
    found = triton_pool.block_means(x, *table(blocks))
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert_close(found, blocks.mean(x.double()), 1e-6)


@pytest.mark.parametrize("depth", [64, 128, 80, 40])
@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
def test_block_means_are_float32_of_any_dtype(dtype: torch.dtype, depth: int) -> None:
    blocks = Blocks.cut(GRIDS["text-first"], 64)
    x = tokens(blocks, depth, dtype)
    assert_close(triton_pool.block_means(x, *table(blocks)), blocks.mean(x.double()), 1e-6)


@pytest.mark.parametrize("sub", [2, 4, 8])
def test_block_means_of_pieces(sub: int) -> None:
    """A missing piece gives zeros, and no token outside a block is read."""
    blocks = Blocks.cut(GRIDS["text-first"], 128)
    start, count, size = pieces(blocks, sub)
    count[0] -= 3  # leaves tokens to no block
    x = tokens(blocks, 64)
    owned = torch.zeros(blocks.tokens, dtype=torch.bool)
    wanted = torch.zeros(1, 2, len(start), 64, dtype=torch.float64)
    for j, (first, n) in enumerate(zip(start.tolist(), count.tolist(), strict=True)):
        owned[first : first + n] = True
        if n:
            wanted[:, :, j] = x[:, :, first : first + n].double().mean(2)
    assert (count == 0).any() and not owned.all()
    x[:, :, ~owned] = float("nan")
    assert_close(triton_pool.block_means(x, start, count, size), wanted, 1e-6)


@pytest.mark.parametrize(
    ("size", "levels", "block_n"),
    [
        (128, (0, 1, 2, 3, 4, 5, 6, 7), 64),
        (128, (0, 7), 128),
        (64, (0,), 32),
        (64, (0, 2, 6), 64),
        (32, (0, 1, 4, 5), 64),
        (16, (0, 3, 4), 16),
        (4, (0, 1, 2), 16),
    ],
    ids=str,
)
@pytest.mark.parametrize("grid", GRIDS)
def test_key_buffer(grid: str, size: int, levels: tuple[int, ...], block_n: int) -> None:
    blocks = Blocks.cut(GRIDS[grid], size)
    assert_keys(tokens(blocks, 64), blocks, levels, block_n)


@pytest.mark.parametrize("depth", [64, 128, 80, 40])
@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
def test_key_buffer_of_any_dtype(dtype: torch.dtype, depth: int) -> None:
    """Means come from the tokens and are rounded once, not from the level below."""
    blocks = Blocks.cut(GRIDS["text-last"], 64)
    assert_keys(tokens(blocks, depth, dtype), blocks, (0, 1, 3, 6), 64)


def test_memory_layouts() -> None:
    """Contiguous, transposed and strided inputs give the same numbers."""
    blocks = Blocks.cut(TokenGrid(1, 5, 9, 7, True), 16)
    first, rows = segments(blocks, (0, 2), 16)
    x = tokens(blocks, 64, torch.bfloat16, batch=2)
    doubled = torch.cat([x, x], -1)[..., 64:], torch.cat([x, x], 1)[:, 2:]
    views = x, x.contiguous(), *doubled, x.mT.contiguous().mT
    keys = [triton_pool.fill_keys(each, *table(blocks), rows_of(first), rows, 64) for each in views]
    means = [triton_pool.block_means(each, *table(blocks)) for each in views]
    moments = [
        triton_taylor.taylor_state(each, views[-n], *table(blocks), torch.arange(len(blocks)))
        for n, each in enumerate(views)
    ]
    for results in (keys, means, moments):
        assert all(torch.equal(each, results[0]) for each in results)


@pytest.mark.parametrize("size", [128, 16])
def test_gather_order(size: int) -> None:
    blocks = Blocks.cut(GRIDS["text-first"], size)
    first, rows = segments(blocks, (0, 1, 4), 64)
    x, order = tokens(blocks, 80), torch.randperm(blocks.tokens)
    laid_out = triton_pool.fill_keys(x[:, :, order], *table(blocks), rows_of(first), rows, 128)
    found = triton_pool.fill_keys(x, *table(blocks), rows_of(first), rows, 128, order)
    assert torch.equal(found, laid_out)
    assert not torch.equal(
        found, triton_pool.fill_keys(x, *table(blocks), rows_of(first), rows, 128)
    )


def expected_scores(q: Tensor, k: Tensor, q_blocks: Blocks, k_blocks: Blocks, sub: int) -> Tensor:
    """Log of the mean of exp(q . k / sqrt(D)) over the token pairs of two blocks, in float64.

    Every token stands for the mean of its piece.
    """
    q, k = (
        blocks.split(sub).mean(x.double())[:, :, blocks.split(sub).owner]
        for x, blocks in ((q, q_blocks), (k, k_blocks))
    )
    score = q @ k.mT / q.shape[3] ** 0.5
    for blocks in (k_blocks, q_blocks):
        runs = score.split(blocks.count.tolist(), -1)
        means = [run.logsumexp(-1) - math.log(run.shape[-1]) for run in runs]
        score = torch.stack(means, -1).mT
    return score


def draft(q: Tensor, k: Tensor, q_blocks: Blocks, k_blocks: Blocks, sub: int) -> Tensor:
    """Scores from the tokens; the means of missing pieces are spoilt."""
    means, counts = [], []
    for x, blocks in ((q, q_blocks), (k, k_blocks)):
        start, count, size = pieces(blocks, sub)
        means.append(triton_pool.block_means(x, start, count, size))
        means[-1][:, :, count == 0] = float("nan")
        counts.append(count)
    return triton_draft.draft_scores(*means, *counts, sub, q.shape[3] ** -0.5)


@pytest.mark.parametrize("sub", [1, 2, 4, 8])
@pytest.mark.parametrize("sizes", [(64, 32), (8, 16), (128, 128)], ids=str)
@pytest.mark.parametrize("grids", [("text-first", "337"), ("337", "text-last")], ids=str)
def test_draft_scores(grids: tuple[str, str], sizes: tuple[int, int], sub: int) -> None:
    cuts = [Blocks.cut(GRIDS[grid], size) for grid, size in zip(grids, sizes, strict=True)]
    q, k = (3 * tokens(blocks, 64) for blocks in cuts)
    wanted = expected_scores(q, k, *cuts, sub)
    found = draft(q, k, *cuts, sub)
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert_close(found, wanted, 1e-6, 1e-5)


@pytest.mark.parametrize("depth", [128, 80, 40])
@pytest.mark.parametrize("sub", [1, 4])
def test_draft_head_dims(sub: int, depth: int) -> None:
    cuts = [Blocks.cut(GRIDS["text-last"], size) for size in (16, 32)]
    q, k = (tokens(blocks, depth, torch.bfloat16) for blocks in cuts)
    wanted = expected_scores(q, k, *cuts, sub)
    assert_close(draft(q, k, *cuts, sub), wanted, 1e-6, 1e-5)


@pytest.mark.parametrize("sub", [1, 4])
def test_draft_of_extreme_means(sub: int) -> None:
    """Logits far past the range of exp stay finite; a NaN spoils its own row, visibly."""
    blocks = Blocks.cut(GRIDS["text-first"], 32)
    q, k = (40 * tokens(blocks, 64) for _ in range(2))
    wanted = expected_scores(q, k, blocks, blocks, sub)
    found = draft(q, k, blocks, blocks, sub)
    assert wanted.abs().max() > 1000
    assert_close(found, wanted, 2e-6, 1e-5)
    q[0, 1, 100, 3] = float("nan")
    spoilt = draft(q, k, blocks, blocks, sub)
    row = int(blocks.owner[100])
    assert spoilt[0, 1, row].isnan().all()
    spoilt[0, 1, row] = found[0, 1, row]
    assert torch.equal(spoilt, found)


def expected_moment(k: Tensor, v: Tensor, blocks: Blocks, width: int) -> Tensor:
    """(1 / N) sum_n (k_n - mean of its block)^T v_n over the video, in float64."""
    k, v = k.double(), v.double()
    video = ~blocks.text[blocks.owner]
    centred = (k - blocks.mean(k)[:, :, blocks.owner])[:, :, video]
    moment = centred.mT @ v[:, :, video] / int(video.sum())
    rest = width - k.shape[3]
    return torch.nn.functional.pad(moment, (0, rest, 0, rest))


def assert_moment(k: Tensor, v: Tensor, blocks: Blocks, tolerance: float) -> None:
    """Relative L2; exact zeros past the head dim."""
    depth = k.shape[3]
    width = 64 if depth <= 64 else 128
    video = (~blocks.text).nonzero().flatten()
    found = triton_taylor.taylor_state(k, v, *table(blocks), video)
    wanted = expected_moment(k, v, blocks, width)
    assert found.shape == wanted.shape and found.dtype == torch.float32
    assert (found.double() - wanted).norm() <= tolerance * wanted.norm()
    assert (found[..., depth:, :] == 0).all() and (found[..., depth:] == 0).all()


@pytest.mark.parametrize("slab", [2, 16])
@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", ["text-first", "text-last"])
def test_moment(
    grid: str, dtype: torch.dtype, size: int, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_taylor, "SLAB", slab)
    blocks = Blocks.cut(GRIDS[grid], size)
    k, v = (tokens(blocks, 64, dtype) for _ in range(2))
    assert_moment(k, v, blocks, TOLERANCES[dtype])


@pytest.mark.parametrize("depth", [128, 80, 40])
@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
def test_moment_head_dims(dtype: torch.dtype, depth: int) -> None:
    """Keys with a large common part, which must be gone before the keys are rounded.

    In float32 the sums of a block lose as many digits as that part has too many.
    """
    blocks = Blocks.cut(GRIDS["text-first"], 128)
    k, v = (tokens(blocks, depth, dtype, batch=2) for _ in range(2))
    common = 20 * torch.randn(depth).to(dtype)
    assert_moment(k + common, v, blocks, max(TOLERANCES[dtype], 2e-5))


def test_moment_of_one_head_stands_alone() -> None:
    """One token has no moment; other heads do not change the numbers of a head."""
    blocks = Blocks.cut(GRIDS["one-token"], 64)
    k, v = (tokens(blocks, 64) for _ in range(2))
    assert (triton_taylor.taylor_state(k, v, *table(blocks), torch.tensor([0])) == 0).all()
    blocks = Blocks.cut(GRIDS["text-last"], 64)
    k, v = (tokens(blocks, 64, torch.bfloat16) for _ in range(2))
    video = (~blocks.text).nonzero().flatten()
    both = triton_taylor.taylor_state(k, v, *table(blocks), video)
    one = triton_taylor.taylor_state(k[:, 1:], v[:, 1:], *table(blocks), video)
    assert torch.equal(one, both[:, 1:])


OFFSETS = """
import sys
sys.path[:0] = [{tests!r}, {package!r}]
import mmap
import resource
import interpreter
import torch
interpreter.install()
from vidsparse.kernels.triton_draft import draft_scores_kernel
from vidsparse.kernels.triton_pool import block_means, fill_keys, fill_keys_kernel
from vidsparse.kernels.triton_taylor import taylor_state
NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux
def virtual(elements, dtype):
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags), dtype=dtype)
def close(found, wanted):
    return (found.double() - wanted).norm() < 1e-3 * wanted.norm()
torch.manual_seed(0)
HEADS, N, D = 3, 130, 64
start, count = torch.tensor([0, 128]), torch.tensor([128, 2], dtype=torch.int32)
for head, token in ((D, 2**24), (2**30 + 1024, D)):  # the last tokens, the last head are far away
    shape, stride = (1, HEADS, N, D), (0, head, token, 1)
    k, v = (
        virtual((HEADS - 1) * head + (N - 1) * token + D, torch.float16).as_strided(shape, stride)
        for _ in range(2)
    )
    for x in (k, v):
        x.copy_(torch.randn(x.shape))
    x = k.double()
    means = torch.stack([x[:, :, :128].mean(2), x[:, :, 128:].mean(2)], 2)
    assert close(block_means(k, start, count, 128), means)
    keys = fill_keys(k, start, count, 128, [0, *[-1] * 6, 256], 272, D)
    assert torch.equal(keys[:, :, :N], k) and close(keys[:, :, 256:258], means)
    centred = x - means[:, :, [0] * 128 + [1] * 2]
    moment = taylor_state(k, v, start, count, 128, torch.arange(2))
    assert close(moment, centred.mT @ v.double() / N)

rows = 2**24  # of a head, of which the first few are written
out = virtual((HEADS - 1) * rows * D + 128 * D, torch.float16)
fill_keys_kernel[(1, HEADS)](
    k, start, count, start, out, *k.stride()[:3], HEADS, 1, rows, (0,), (128,),
    D=D, DP=D, SIZE=128, LOW=8, HIGH=16, LEVELS=1, TOP=0, ORDERED=False,
)
assert torch.equal(out[2 * rows * D :].view(128, D), k[0, 2, :128])

one = torch.ones(1, dtype=torch.int32)
for rows, wide in ((2**23, 64), (64, 2**23)):  # query blocks of a head, key blocks
    q, k = (virtual((4 * n + 64) * D, torch.float32) for n in (rows, wide))
    a, b = q[4 * rows * D :].view(64, D), k[4 * wide * D :].view(64, D)
    for x in (a, b):
        x.copy_(torch.randn(64, D))
    out = virtual((4 * rows + 64) * wide, torch.float32)
    draft_scores_kernel[(1, 1, 5)](
        q, k, one, one, out, 1.0, rows, wide, D=D, BM=64, BN=64, BK=32, SUB=1, STAGES=2
    )
    assert close(out[4 * rows * wide :].view(64, wide)[:, :64], a.double() @ b.double().T)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 * 2**20
print("right")
"""


def test_offsets_past_2_31_elements() -> None:
    """In address space of which only the pages in use are committed."""
    code = OFFSETS.format(tests=str(Path(__file__).parent), package=str(PACKAGE))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "right", done.stderr
