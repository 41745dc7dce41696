"""The Triton executor against the reference in float64, in Triton's CPU interpreter.

    TRITON_INTERPRET=1 pytest -m interp

in a process of its own: what is interpreted there cannot be compiled later.
"""

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.kernels import reference
from vidsparse.plan import SKIP, BlockPlan, FirstOrder

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

import far

from vidsparse.kernels.gpu import engine, levels_forward, support
from vidsparse.kernels.gpu import rest as rest_of_plan

pytestmark = pytest.mark.interp

GRIDS = {
    "337": (TokenGrid(1, 1, 337),) * 2,
    "text-first": (TokenGrid(2, 9, 13, 41, True),) * 2,
    "text-last": (TokenGrid(2, 9, 13, 41),) * 2,
    "cross": (TokenGrid(1, 3, 50), TokenGrid(1, 1, 241, 30)),
    "one-block": (TokenGrid(1, 1, 5),) * 2,
    "one-token": (TokenGrid(1, 1, 1),) * 2,
}
TOLERANCES = {torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""Relative L2 of the output."""

LSE_TOLERANCE = 1e-4
"""Absolute, where the reference rounds the means as the engine does: the kernel's own error."""


def level_plan(grids: str, block_q: int, block_k: int, kind: str, heads: int = 2) -> BlockPlan:
    """Random levels, "mixed" over all or "exact" ones; with an empty and a full row."""
    q_blocks, k_blocks = (
        Blocks.cut(g, n) for g, n in zip(GRIDS[grids], (block_q, block_k), strict=True)
    )
    levels = torch.randint(SKIP, k_blocks.levels + 1, (1, heads, len(q_blocks), len(k_blocks)))
    if kind == "exact":
        levels = torch.where(torch.rand(levels.shape) < 0.3, 0, SKIP)
    levels[0, -1, -1] = 0
    levels[0, 0, 0] = SKIP
    return BlockPlan.from_levels(levels.to(torch.int8), q_blocks, k_blocks)


def with_rest(plan: BlockPlan, rest: str) -> BlockPlan:
    """rest: "skip", "centroid", or a first-order term; "row" comes with a bias."""
    if rest == "skip":
        return plan
    bias = torch.randn(plan.levels.shape) if rest == "row" else None
    order: FirstOrder = "none" if rest == "centroid" else rest  # type: ignore[assignment]
    return plan.with_rest(plan.k_blocks.levels, order, bias)


def with_orders(plan: BlockPlan) -> BlockPlan:
    """An order of queries and one of keys for every head."""
    rows = plan.levels.shape[:2]
    orders = (
        torch.rand(*rows, blocks.tokens).argsort(-1) for blocks in (plan.q_blocks, plan.k_blocks)
    )
    return plan.with_orders(*orders)


def tensors(plan: BlockPlan, depth: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v [B, H, S, D] as views of [B, S, H, D] memory; neighbouring tokens are alike."""
    batch, heads = plan.levels.shape[:2]
    sizes = (plan.q_blocks.tokens, plan.k_blocks.tokens, plan.k_blocks.tokens)
    made = (
        torch.randn(batch, n, heads, depth) + torch.randn(batch, n // 8 + 1, heads, depth)
        .repeat_interleave(8, 1)[:, :n] for n in sizes
    )  # fmt: skip
    return [x.to(dtype).transpose(1, 2) for x in made]


def rounded_lse(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Tensor:
    """LSE of the reference in float64 with means rounded to the dtype of k."""
    pool = reference.pool

    def rounded(x: Tensor, blocks: Blocks, level: int) -> tuple[Tensor, Tensor, Tensor]:
        means, count, owner = pool(x, blocks, level)
        return means.to(k.dtype).double(), count, owner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "pool", rounded)
        lse = reference.execute(q.double(), k.double(), v.double(), plan)[1]
    assert lse is not None
    return lse


def assert_matches(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> None:
    """Output and LSE equal the reference in float64 on the same numbers."""
    want, _ = reference.execute(q.double(), k.double(), v.double(), plan)
    want_lse = rounded_lse(q, k, v, plan)
    out, lse = engine.execute(q, k, v, plan, return_lse=True)
    assert lse is not None
    assert out.dtype == q.dtype and out.shape == q.shape and lse.dtype == torch.float32
    assert (out.double() - want).norm() <= TOLERANCES[q.dtype] * want.norm()
    empty = want_lse.isinf()
    assert torch.equal(lse == float("-inf"), empty)
    assert not out[empty].any()
    assert ((lse.double() - want_lse)[~empty].abs() <= LSE_TOLERANCE).all()


@pytest.mark.parametrize("rest", ["skip", "centroid", "global", "row"])
@pytest.mark.parametrize("kind", ["exact", "mixed"])
@pytest.mark.parametrize("grids", ["337", "text-first", "text-last"])
def test_any_plan(grids: str, kind: str, rest: str) -> None:
    plan = with_rest(level_plan(grids, 128, 64, kind), rest)
    assert_matches(*tensors(plan, 64), plan)


@pytest.mark.parametrize("rest", ["skip", "global", "row"])
@pytest.mark.parametrize("kind", ["exact", "mixed"])
@pytest.mark.parametrize("grids", ["cross", "text-first"])
def test_orders_of_heads(grids: str, kind: str, rest: str) -> None:
    plan = with_orders(with_rest(level_plan(grids, 64, 64, kind), rest))
    assert_matches(*tensors(plan, 64), plan)


def test_moments_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head and a query block at a time, as where all of them would fill the memory."""
    plan = with_orders(with_rest(level_plan("text-first", 64, 64, "exact"), "row"))
    q, k, v = tensors(plan, 64)
    whole, _ = engine.execute(q, k, v, plan)
    monkeypatch.setattr(rest_of_plan, "MOMENT_BYTES", 1)
    pieces, _ = engine.execute(q, k, v, plan)
    assert (pieces - whole).norm() <= 1e-6 * whole.norm()


@pytest.mark.parametrize("blocks", [(64, 128), (128, 32), (16, 16), (32, 64)], ids=str)
@pytest.mark.parametrize("rest", ["skip", "global"])
def test_block_sizes(blocks: tuple[int, int], rest: str) -> None:
    plan = with_rest(level_plan("text-first", *blocks, "mixed", heads=1), rest)
    assert_matches(*tensors(plan, 64, torch.float16), plan)


@pytest.mark.parametrize("grids", ["cross", "one-block", "one-token"])
@pytest.mark.parametrize("rest", ["skip", "global"])
def test_odd_lengths(grids: str, rest: str) -> None:
    plan = with_rest(level_plan(grids, 64, 64, "mixed"), rest)
    assert_matches(*tensors(plan, 64), plan)


@pytest.mark.parametrize("rest", ["skip", "global", "row"])
@pytest.mark.parametrize("depth", [64, 96, 128, 40])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_dtypes(dtype: torch.dtype, depth: int, rest: str) -> None:
    kind = "mixed" if depth < 100 else "exact"
    plan = with_rest(level_plan("text-first", 128, 128, kind, heads=1), rest)
    assert_matches(*tensors(plan, depth, dtype), plan)


def test_two_batches_and_memory_layouts() -> None:
    """Contiguous, transposed and strided inputs give the same numbers; out is laid out like q."""
    one = level_plan("cross", 64, 64, "mixed")
    levels = torch.cat([one.level_map(), one.level_map().flip(1)])
    plan = BlockPlan.from_levels(levels, one.q_blocks, one.k_blocks).with_rest(6, "global")
    q, k, v = tensors(plan, 64)
    assert_matches(q, k, v, plan)
    out, _ = engine.execute(q, k, v, plan)
    assert out.transpose(1, 2).is_contiguous()
    straight, _ = engine.execute(*(x.contiguous() for x in (q, k, v)), plan)
    assert straight.is_contiguous() and torch.equal(straight, out)
    parts = (torch.cat([x, x], -1)[..., :64] for x in (q, k, v))
    assert torch.equal(engine.execute(*parts, plan)[0], out)
    columns = (x.mT.contiguous().mT for x in (q, k, v))
    assert torch.equal(engine.execute(*columns, plan)[0], out)


def test_a_level_map_in_any_memory_layout() -> None:
    """One batch and one head, whose rows flatten without a copy."""
    plan = level_plan("337", 64, 64, "exact", heads=1)
    q, k, v = tensors(plan, 64)
    strided = replace(plan, levels=plan.levels.mT.contiguous().mT)
    assert not strided.levels.is_contiguous() and torch.equal(strided.levels, plan.levels)
    assert_matches(q, k, v, strided)


def test_rising_scores() -> None:
    """Later tiles raise the running max: sums, output and rest share are all rescaled."""
    plan = with_rest(level_plan("337", 64, 16, "exact", heads=1), "global")
    q, k, v = tensors(plan, 64)
    direction = torch.nn.functional.normalize(torch.randn(64), dim=0)
    q = q * 0.3 + 4 * direction
    k = k * 0.1 + torch.linspace(0, 20, 337)[:, None] * direction
    assert_matches(q, k, v, plan)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("kind", ["exact", "mixed"])
def test_bad_query_stays_alone(kind: str) -> None:
    plan = with_rest(level_plan("text-first", 64, 64, kind), "global")
    q, k, v = tensors(plan, 64)
    clean, _ = engine.execute(q, k, v, plan)
    q = q.clone(memory_format=torch.preserve_format)
    q[0, 1, 200, 3] = float("nan")
    out, lse = engine.execute(q, k, v, plan, return_lse=True)
    assert lse is not None and out[0, 1, 200].isnan().all() and lse[0, 1, 200].isnan()
    out[0, 1, 200] = clean[0, 1, 200]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("arch", [(8, 0), (9, 0), (10, 0), (12, 0)], ids=str)
def test_tilings_divide_their_blocks(arch: tuple[int, int]) -> None:
    for dtype in TOLERANCES:
        for block_q in engine.BLOCK_SIZES:
            for block_k in engine.BLOCK_SIZES:
                shape = levels_forward.tiling(dtype, arch, block_q, block_k)
                assert block_q % shape.block_m == 0 and 16 <= shape.block_n <= block_k


def test_offsets_past_2_31_elements() -> None:
    """Four tensors of 4.3 GB of address space, of which only the pages in use are committed."""
    far.assert_passes("""
from vidsparse.kernels.gpu.levels_forward import levels_forward
from vidsparse.kernels.gpu.operands import Keys, QueryRows, TileLists, Tiling
HEADS, N, D = 3, 130, 64
far_head = (1, HEADS, 128, D), (0, 2**30 + 1024, D, 1)  # heads 2 start past 2^31 elements
far_token = (1, HEADS, N, D), (0, D, 2**24, 1)  # the last tokens lie there
def at(place):
    size = 1 + sum((n - 1) * step for n, step in zip(*place))
    return virtual(size, torch.float16).as_strided(*place)
q, out, k, v = at(far_token), at(far_token), at(far_head), at(far_head)
for x in (q, k, v):
    x.copy_(torch.randn(x.shape))
lse = torch.empty(1, HEADS, N)
entry = torch.tensor([[0, 1, 0]], dtype=torch.int32).repeat(2 * HEADS, 1) | 6 << 24
count = torch.full((2 * HEADS,), 2, dtype=torch.int32)
rows = QueryRows(torch.tensor([0, 128]), torch.tensor([128, 2], dtype=torch.int32), 128)
bits, whole = torch.ones(2 * HEADS, 2, dtype=torch.int64), count // 2
keys, lists = Keys(k, v, torch.zeros(128)), TileLists(entry, bits, count, whole)
levels_forward(q, keys, lists, rows, Tiling(128, 64, 8, 3), out, lse)
named = oracles.named_rows(entry, bits, count, whole, 64, 128)
blocks = Blocks(rows.start, rows.count.long(), torch.zeros(2, dtype=torch.bool), 128)
want, _ = oracles.levels_forward(q, k, v, keys.bias, named, blocks)
assert close(out, want)
""")


def test_refusals() -> None:
    plan = level_plan("337", 64, 64, "exact")
    q, k, v = tensors(plan, 64)
    run = engine.execute
    with pytest.raises(ValueError, match=r"'block': the Triton engine .*use impl='reference'$"):
        run(q, k, v, plan.with_rest(6, "block"))
    order = torch.arange(337)
    richer = plan.with_orders(order.repeat(*plan.levels.shape[:2], 1), None)
    with pytest.raises(ValueError, match=r"there can be one order; put .* into the plan's"):
        run(q, k, v, richer, order=order)
    with pytest.raises(ValueError, match=r"kernel\.engine='cuda': allowed are auto, .*triton"):
        run(q, k, v, plan, engine="cuda")
    levels = level_plan("337", 64, 64, "mixed")
    for given, how, words in (
        (levels, {"form": "tma"}, r"form='tma': plans of several levels .* pointer alone"),
        (levels, {"engine": "cudnn"}, r"engine='cudnn': plans of several levels .*'triton' alone"),
        (plan, {"form": "tma", "qk": "int8"}, r"form='tma': products in 8 bits .* pointer alone"),
    ):
        with pytest.raises(ValueError, match=words):
            run(q, k, v, given, **how)
    with pytest.raises(ValueError, match=r"'global'.*rest=-1"):
        run(q, k, v, plan.with_rest(SKIP, "global"))
    with pytest.raises(ValueError, match="rest=3"):
        run(q, k, v, plan.with_rest(3))
    with pytest.raises(ValueError, match="337 queries and 337 keys"):
        run(q[:, :, 1:], k, v, plan)
    with pytest.raises(ValueError, match=r"expected \(1, 1, 6, 6\)"):
        run(q[:, :1], k[:, :1], v[:, :1], plan)
    with pytest.raises(ValueError, match=r"v is .*bfloat16"):
        run(q, k, v.bfloat16(), plan)
    with pytest.raises(ValueError, match=r"float64.*float32, bfloat16, float16.*reference"):
        run(q.double(), k.double(), v.double(), plan)
    with pytest.raises(ValueError, match=r"head dim 192.*1 \.\. 128"):
        run(*tensors(plan, 192), plan)
    for sizes, name in (((8, 64), "block_q=8"), ((64, 256), "block_k=256")):
        with pytest.raises(ValueError, match=rf"{name}.*16, 32, 64, 128"):
            run(q, k, v, level_plan("337", *sizes, "exact"))
    with pytest.raises(ValueError, match="'fp8': allowed are native and int8"):
        run(q, k, v, plan, qk="fp8")
    with pytest.raises(ValueError, match=r"inference only.*no_grad"):
        run(q.clone().requires_grad_(True), k, v, plan)


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = level_plan("337", 64, 64, "exact")
    why = "a CPU needs TRITON_INTERPRET=1"
    monkeypatch.setattr(support, "refusal", lambda device: why)
    with pytest.raises(ValueError, match=rf"{why}.*impl='cpu'"):
        engine.execute(*tensors(plan, 64), plan)


def test_grad_modes() -> None:
    """Layouts cached in one grad mode serve the others."""
    plan = with_rest(level_plan("one-block", 64, 64, "exact"), "global")
    q, k, v = tensors(plan, 64)
    with torch.inference_mode():
        inside, _ = engine.execute(q * 1, k, v, plan)
    q.requires_grad_(True)
    with torch.no_grad():
        out, _ = engine.execute(q, k, v, plan)
    assert torch.equal(out, inside) and not out.requires_grad
