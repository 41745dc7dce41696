"""sparse_attention from the outside: dense limits, layouts undone, reasons, bad input."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from vidsparse import SparseConfig, StepContext, TokenGrid, sparse_attention
from vidsparse.attention import attend
from vidsparse.decision import decide
from vidsparse.geometry import token_order
from vidsparse.plan import SKIP

GRIDS = {
    "divides": TokenGrid(4, 8, 8),
    "ragged": TokenGrid(3, 9, 13),
    "text-last": TokenGrid(5, 7, 9, text_tokens=77),
    "text-first": TokenGrid(3, 5, 7, text_tokens=26, text_first=True),
}
SMALL = {
    "layout": {"name": "tile", "tile": [2, 4, 4]},
    "schedule": {"name": "constant", "density": 0.3, "min_tokens": 0},
    "kernel": {"block_q": 32, "block_k": 16},
}
COMPENSATIONS = ["none", "centroid", "taylor"]


def config(**sections: dict) -> SparseConfig:
    return SparseConfig.from_dict(SMALL | sections)


def qkv(grid: TokenGrid, dtype: torch.dtype = torch.float32, heads: int = 3, dim: int = 24):
    return [torch.randn(2, grid.tokens, heads, dim).to(dtype) for _ in range(3)]


def dense(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("layout", ["raster", "tile", "hilbert"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_nearly_full_density_with_all_blocks_forced_is_dense(grid, layout, impl):
    """A minimum of all blocks per row makes the plan full although the call is sparse."""
    everything = config(
        layout={"name": layout},
        selector={"name": "topk", "min_blocks": 10**6},
        schedule={"name": "constant", "density": 0.5, "min_tokens": 0},
    )
    q, k, v = qkv(grid)
    out, lse, plan = sparse_attention(
        q, k, v, grid=grid, config=everything, impl=impl, return_lse=True, return_plan=True
    )
    assert plan is not None and float(plan.density.min()) == 1.0
    torch.testing.assert_close(out, dense(q, k, v), rtol=1e-5, atol=1e-5)
    score = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * 24**-0.5
    torch.testing.assert_close(lse.double(), score.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("selector", ["topk", "topp", "pyramid"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_cpu_engine_and_float64_reference_agree_on_the_same_plan(grid, selector, compensation):
    method = config(selector={"name": selector}, compensation={"name": compensation})
    q, k, v = qkv(grid)
    fast = attend(q, k, v, grid=grid, config=method, impl="cpu", return_lse=True)
    from vidsparse.kernels import reference

    order, inverse = token_order(grid, method.layout)
    double = (x.double()[:, order].transpose(1, 2) for x in (q, k, v))
    out, lse = reference.execute(*double, fast.plan)
    wanted = out.transpose(1, 2)[:, inverse]
    assert (fast.out - wanted).norm() / wanted.norm() < 2e-6
    torch.testing.assert_close(fast.lse.double(), lse[:, :, inverse], rtol=1e-5, atol=1e-5)
    assert len(fast.density) == 3 and fast.reason is None
    assert {"permute", "estimate", "select", "kernel"} == set(fast.seconds)


def test_hoisted_tokens_give_the_same_rows():
    grid = GRIDS["text-last"]
    q, k, v = qkv(grid)
    plain = sparse_attention(q, k, v, grid=grid, config=config(), impl="reference")
    order, inverse = token_order(grid, config().layout)
    moved = (x[:, order] for x in (q, k, v))
    hoisted = attend(*moved, grid=grid, config=config(), impl="reference", hoisted=True).out
    torch.testing.assert_close(hoisted[:, inverse], plain, rtol=0, atol=0)


def test_text_is_exact_both_ways():
    grid = GRIDS["text-first"]
    q, k, v = qkv(grid)
    out, plan = sparse_attention(q, k, v, grid=grid, config=config(), impl="cpu", return_plan=True)
    levels = plan.level_map()
    assert not levels[..., plan.k_blocks.text].any()
    assert not levels[..., plan.q_blocks.text, :].any()
    torch.testing.assert_close(out[:, :26], dense(q, k, v)[:, :26], rtol=1e-5, atol=1e-5)


def test_forced_blocks_come_on_top_of_the_budget_when_asked():
    grid = TokenGrid(4, 8, 8)
    q, k, v = qkv(grid)
    counts = {}
    for in_budget in (True, False):
        method = config(force={"first_frame": True, "own_block": False, "in_budget": in_budget})
        _, plan = sparse_attention(
            q, k, v, grid=grid, config=method, impl="reference", return_plan=True
        )
        exact = plan.level_map() == 0
        counts[in_budget] = exact.sum(-1)
        # frame 0 has 64 tokens in tiles of 2 x 4 x 4: it touches half of the 16 blocks
        assert bool((exact[..., :, :].sum(-1) >= 4).all())
    assert bool((counts[False] >= counts[True]).all()) and bool(
        (counts[False] > counts[True]).any()
    )


def reason(grid: TokenGrid, method: SparseConfig, context: StepContext | None = None) -> str | None:
    return decide(method, grid, context, device=torch.device("cpu")).reason


def test_every_dense_call_has_its_reason():
    grid = TokenGrid(4, 8, 8)
    assert reason(grid, config()) is None
    short = {"name": "constant", "density": 0.3, "min_tokens": 257}
    assert reason(grid, config(schedule=short)) == "too-short"
    assert reason(grid, config(schedule={**short, "density": 1.0})) == "user"
    assert reason(grid, config(schedule={**short, "density": 0.9, "min_tokens": 0})) == "not-faster"
    warm = config(schedule={"name": "warmup", "density": 0.3, "min_tokens": 0, "dense_layers": [1]})
    assert reason(grid, warm, StepContext(0, 10)) == "warmup-step"
    assert reason(grid, warm, StepContext(5, 10, layer=1, layers=4)) == "dense-layer"
    assert reason(grid, warm, StepContext(5, 10, layer=2, layers=4)) is None
    assert decide(config(), grid, device=torch.device("cuda")).reason == "no-kernel"
    forced = config(schedule={**short, "density": 0.9, "min_tokens": 0})
    assert decide(forced, grid, device=torch.device("cpu"), impl="cpu").reason is None


def test_dense_calls_are_scaled_dot_product_attention():
    grid = TokenGrid(4, 8, 8)
    q, k, v = qkv(grid)
    method = config(schedule={"name": "constant", "density": 1.0})
    out, lse, plan = sparse_attention(
        q, k, v, grid=grid, config=method, return_lse=True, return_plan=True
    )
    assert plan is None and torch.equal(out, dense(q, k, v))
    score = torch.einsum("bqhd,bkhd->bhqk", q, k) * 24**-0.5
    torch.testing.assert_close(lse, score.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_a_plan_that_turns_out_too_dense_goes_dense_with_the_reason():
    grid = TokenGrid(4, 8, 8)
    q, k, v = qkv(grid)
    method = config(
        selector={"name": "topp", "p": 0.999},
        schedule={"name": "constant", "density": 0.99, "min_tokens": 0},
    )
    result = attend(0 * q, k, v, grid=grid, config=method)
    assert result.reason == "not-faster" and result.density == (1.0, 1.0, 1.0)
    assert torch.equal(result.out, dense(0 * q, k, v))


@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_bad_query_row_stays_alone(bad, impl, compensation):
    grid = GRIDS["ragged"]
    q, k, v = qkv(grid)
    q[1, 40, 2] = bad
    out = sparse_attention(
        q, k, v, grid=grid, config=config(compensation={"name": compensation}), impl=impl
    )
    finite = out.isfinite().all(-1)
    assert not finite[1, 40, 2]
    finite[1, 40, 2] = True
    assert bool(finite.all())


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_bad_key_reaches_only_rows_that_read_it(impl):
    grid = GRIDS["ragged"]
    method = config(compensation={"name": "none"})
    q, k, v = qkv(grid)
    k[0, 100, 1] = float("nan")
    out, plan = sparse_attention(q, k, v, grid=grid, config=method, impl=impl, return_plan=True)
    _, inverse = token_order(grid, method.layout)
    block = plan.k_blocks.owner[inverse[100]]
    reads = (plan.level_map()[0, 1, :, block] != SKIP)[plan.q_blocks.owner][inverse]
    assert torch.equal(~out[0, :, 1].isfinite().all(-1), reads)
    assert bool(out[1].isfinite().all()) and bool(out[0, :, [0, 2]].isfinite().all())


def test_bad_calls_are_refused_with_a_cure():
    grid = TokenGrid(4, 8, 8)
    q, k, v = qkv(grid)
    with pytest.raises(ValueError, match=r"sequence of 256 tokens does not match .* = 128 tokens"):
        sparse_attention(q, k, v, grid=TokenGrid(2, 8, 8), config=config())
    with pytest.raises(ValueError, match=r"expected .batch, tokens, heads, head_dim."):
        sparse_attention(q[0], k[0], v[0], grid=grid, config=config())
    with pytest.raises(ValueError, match=r"k is .*bfloat16.*one shape, dtype and device"):
        sparse_attention(q, k.bfloat16(), v, grid=grid, config=config())
    with pytest.raises(ValueError, match=r"impl='fast': allowed is auto, cpu, reference, triton"):
        sparse_attention(q, k, v, grid=grid, config=config(), impl="fast")
    why = "a CPU needs TRITON_INTERPRET=1" if find_spec("triton") else "triton is not installed"
    with pytest.raises(ValueError, match=why):
        sparse_attention(q, k, v, grid=grid, config=config(), impl="triton")
    with pytest.raises(ValueError, match=r"q.dtype=torch.int32"):
        sparse_attention(*(x.int() for x in (q, k, v)), grid=grid, config=config())
    with pytest.raises(ValueError, match=r"selector.levels.*at most 4"):
        deep = {"name": "pyramid", "levels": [0, 5]}
        sparse_attention(q, k, v, grid=grid, config=config(selector=deep), impl="reference")


def test_one_graph_break_under_torch_compile():
    grid = TokenGrid(4, 8, 8)
    q, k, v = (torch.randn(1, grid.tokens, 2, 32) for _ in range(3))

    def attention(q: torch.Tensor) -> torch.Tensor:
        return sparse_attention(q * 2, k, v, grid=grid, config=config()) + 1

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(attention, backend=backend)(q), attention(q))
    assert len(graphs) == 2


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_casts_as_stock_attention_does(dtype, impl):
    """Norms leave q and k in float32 beside a narrow v; the plan and its error are float64's."""
    grid = GRIDS["ragged"]
    q, k, v = qkv(grid)
    v = v.to(dtype)
    how = {"grid": (3, 9, 13), "config": config(), "impl": impl, "return_plan": True}
    with torch.autocast("cpu", dtype):
        wanted = dense(q, k, v)
        out, plan = sparse_attention(q, k, v, **how)
        full = config(schedule={"name": "constant", "density": 1.0})
        assert torch.equal(sparse_attention(q, k, v, grid=grid, config=full), wanted)
    assert out.dtype == wanted.dtype == dtype
    by_hand, _ = sparse_attention(*(x.to(dtype) for x in (q, k, v)), **how)
    assert torch.equal(out, by_hand)
    from vidsparse.kernels import reference

    order, inverse = token_order(grid, config().layout)
    wide = (x.to(dtype).double()[:, order].transpose(1, 2) for x in (q, k, v))
    exact = reference.execute(*wide, plan)[0].transpose(1, 2)[:, inverse]
    assert (out - exact).norm() / exact.norm() < (2e-2 if dtype == torch.bfloat16 else 2e-3)
    with pytest.raises(ValueError, match="one shape, dtype and device"):
        sparse_attention(q, k, v, **how)


def test_views_and_empty_batches_are_taken_as_stock_takes_them():
    grid = TokenGrid(4, 8, 8)
    q, k, v = qkv(grid)
    wanted = sparse_attention(q, k, v, grid=grid, config=config())
    strided = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    got = sparse_attention(*strided, grid=grid, config=config())
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    one = [x[:1, :, :1].expand(2, -1, 3, -1) for x in (q, k, v)]
    copies = sparse_attention(*(x.contiguous() for x in one), grid=grid, config=config())
    got = sparse_attention(*one, grid=grid, config=config())
    torch.testing.assert_close(got, copies, rtol=1e-5, atol=1e-5)
    for empty in ([x[:0] for x in (q, k, v)], [x[:, :, :0] for x in (q, k, v)]):
        out, lse, plan = sparse_attention(
            *empty, grid=grid, config=config(), return_lse=True, return_plan=True
        )
        assert out.shape == dense(*empty).shape and plan is None
        assert lse.shape == (out.shape[0], out.shape[2], out.shape[1])


def test_arguments_of_another_kind():
    grid = TokenGrid(4, 8, 8)
    q, k, v = qkv(grid)
    named = sparse_attention(q, k, v, grid=[4, 8, 8], config=SMALL)
    assert torch.equal(named, sparse_attention(q, k, v, grid=grid, config=config()))
    assert sparse_attention(q, k, v, grid=grid, config="tiles").shape == q.shape
    call = {"grid": grid, "config": config()}
    for change, said in (
        ({"grid": (4, 8)}, "grid is .*expected a TokenGrid"),
        ({"grid": 256}, "grid is 256"),
        ({"config": 3}, "preset is a int"),
        ({"context": {"step": 1}}, "context is a dict: expected a StepContext"),
    ):
        with pytest.raises(TypeError, match=said):
            sparse_attention(q, k, v, **(call | change))
    with pytest.raises(TypeError, match="q is a ndarray"):
        sparse_attention(q.numpy(), k, v, **call)
    with pytest.raises(ValueError, match="k has 1 heads, q has 3: grouped queries"):
        sparse_attention(q, k[:, :, :1], v[:, :, :1], **call)
    with pytest.raises(ValueError, match=r"q.dtype=torch.float8"):
        sparse_attention(*(x.to(torch.float8_e4m3fn) for x in (q, k, v)), **call)
    with pytest.raises(ValueError, match=r"on meta.*one shape, dtype and device"):
        sparse_attention(q, k.to("meta"), v, **call)
    with pytest.raises(ValueError, match="requires grad"):
        sparse_attention(q.requires_grad_(), k, v, **call)


def test_sizes_of_a_grid_are_integers_of_any_library():
    import numpy as np

    grid = TokenGrid(np.int64(4), torch.tensor(8), 8, np.int32(3), np.True_)
    assert grid == TokenGrid(4, 8, 8, 3, True) and hash(grid) == hash(TokenGrid(4, 8, 8, 3, True))
    assert type(grid.frames) is type(grid.height) is int and grid.text_first is True
    for bad in (True, 4.0, np.float64(4), "4", None, 0, -1, np.bool_(True), torch.tensor([4, 4])):
        with pytest.raises(ValueError, match=r"TokenGrid.frames=.*expected an integer >= 1"):
            TokenGrid(bad, 8, 8)
    for bad in (2, "yes", None):
        with pytest.raises(ValueError, match=r"TokenGrid.text_first=.*expected True or False"):
            TokenGrid(4, 8, 8, 3, bad)
