"""The cost model: units, and what must be true of it whatever the constants are."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse import SparseConfig, TokenGrid
from vidsparse.attention import attend
from vidsparse.costs import clock, gpus, machine, stages
from vidsparse.costs.forward import Forward, Linear
from vidsparse.costs.machine import Constant, Machine
from vidsparse.costs.memory import memory
from vidsparse.costs.run import Plan, predict
from vidsparse.costs.run import method as run_method
from vidsparse.costs.stage import (
    CROSS,
    DENSE,
    ESTIMATOR,
    EXACT,
    KEPT,
    ORDER,
    REST,
    SELECTOR,
    Carried,
    Method,
    Stage,
)
from vidsparse.decision import tried
from vidsparse.memory import Memory
from vidsparse.plan import StepContext

FORWARD = Forward(
    grid=TokenGrid(21, 45, 80),
    layers=40,
    heads=40,
    head_dim=128,
    linears=(Linear(75_600, 5120, 5120, 160), Linear(75_600, 5120, 13_824, 80)),
    cross=75_600 * 512 * 40.0,
    weights=14_000_000_000,
    dtype="bfloat16",
)
METHOD = Method(128, 64, first_order=True)
H100 = gpus.named("H100")
MACHINES = list(machine.table().values())


def plain(**changes):
    """A machine of which everything is one a second, but for what is given."""
    values = {name: Constant(1.0, 0.1, "assumed") for name in machine.UNITS}
    values |= {name: replace(values[name], value=value) for name, value in changes.items()}
    return Machine("plain", "", values)


def seconds(density, forward=FORWARD, where=H100):
    return clock.timed(stages.sparse_layer(forward, METHOD, density), where).seconds


def run(where=H100, forward=FORWARD, overrides=(), steps=10):
    config = SparseConfig.load("tiles", overrides)
    return predict(Plan(forward, config, steps, 2), where)


SCORED = {  # (query, key) pairs that an estimator scores, of all; numbers in a product by head dim
    "ear": (1 / 64, 1),
    "psa": (1 / 16, 1),
    "xattn": (1 / 64, 8),
    "proxy": (1 / 40 / 16, 1),
    "blasst": (1, 1),
    "absdiff": (4 / 64**2, 1),
    "hier": (0.5 * 4 / 64**2, 1),
    "tiles": (0, 1),
}


@pytest.mark.parametrize("preset", SCORED)
def test_estimators_cost_what_they_score(preset):
    share, depth = SCORED[preset]
    config = SparseConfig.load(preset, ["kernel.block_q=64"])
    method = run_method(FORWARD, config, H100)
    found = stages.sparse_layer(FORWARD, method, 0.2)
    pairs, cells = 75_600**2 * 40, (75_600 / 64) * (75_600 / config.kernel.block_k) * 40
    flops, exps = (
        sum(getattr(one, unit) for one in found if one.name == ESTIMATOR)
        for unit in ("flops", "exps")
    )
    assert exps == pytest.approx(share * pairs, rel=1e-6)
    assert flops == pytest.approx(2 * 128 * (share * depth * pairs + cells), rel=0.01)


def test_a_blend_reads_the_output_again():
    config = SparseConfig.load("rectified")
    blended = run_method(FORWARD, config, H100)
    plain = run_method(FORWARD, config.override("compensation.name=none"), H100)
    moved = [sum(s.bytes for s in stages.sparse_layer(FORWARD, m, 0.2)) for m in (blended, plain)]
    assert moved[0] - moved[1] == 5 * 75_600 * 5120 * 2


def test_units():
    """FLOPs and exponentials of dense attention are those of its definition."""
    (dense,) = stages.dense_layer(FORWARD)
    assert dense.flops == pytest.approx(117.05e12, rel=1e-3)
    assert dense.exps == 75_600**2 * 40
    assert dense.bytes == 4 * 75_600 * 5120 * 2
    exact = {s.name: s for s in stages.sparse_layer(FORWARD, METHOD, 0.1)}[EXACT]
    assert exact.flops == pytest.approx(dense.flops / 10)
    rest = {s.name: s for s in stages.sparse_layer(FORWARD, METHOD, 0.1)}[REST]
    centroids = 1.83e12  # of all blocks of 64, and the first-order state, twice 99e9
    assert rest.flops == pytest.approx(centroids + 198e9, rel=0.01)


@pytest.mark.parametrize(
    "stage, constants, expected",
    [
        (Stage("a", flops=6), {"matmul": 2.0}, 3.0),
        (Stage("a", flops=6, unit="dense"), {"dense": 3.0}, 2.0),
        (Stage("a", flops=6, bytes=8), {"matmul": 2.0, "bandwidth": 2.0}, 4.0),
        (Stage("a", flops=6, exps=10), {"matmul": 2.0, "exp": 2.0}, 5.0),
        (Stage("a", flops=6, launches=2), {"matmul": 2.0, "launch": 0.5}, 4.0),
    ],
    ids=["flops", "unit", "bytes", "exps", "launches"],
)
def test_a_stage_takes_its_slowest_resource_and_its_launches(stage, constants, expected):
    assert clock.timed([stage], plain(**constants)).seconds == pytest.approx(expected)


def test_what_was_measured_of_a_stage_counts_whatever_limits_it():
    slower = replace(plain(matmul=2.0), slower={"a": Constant(3.0, 0.1, "measured")})
    assert clock.timed([Stage("a", flops=6, launches=1)], slower).seconds == pytest.approx(12.0)


@settings(deadline=None)
@given(st.floats(0.01, 0.99), st.floats(0.0, 0.01), st.sampled_from(MACHINES))
def test_more_density_is_never_faster(density, more, where):
    assert seconds(density, where=where) <= seconds(density + more, where=where)


@settings(deadline=None)
@given(st.integers(1, 40), st.sampled_from(MACHINES))
def test_more_frames_are_slower(frames, where):
    short, long = (replace(FORWARD, grid=TokenGrid(n, 45, 80)) for n in (frames, frames + 1))
    for density in (0.1, 0.5):
        assert seconds(density, short, where) < seconds(density, long, where)
    assert run(where, short).dense_run.seconds < run(where, long).dense_run.seconds


@pytest.mark.parametrize("where", MACHINES, ids=lambda m: m.name)
def test_density_one_costs_at_least_dense(where):
    dense = clock.timed(stages.dense_layer(FORWARD), where).seconds
    assert seconds(1.0, where=where) >= dense


@pytest.mark.parametrize("where", MACHINES, ids=lambda m: m.name)
def test_the_crossover_is_where_both_take_as_long(where):
    found = run(where).balance
    dense = clock.timed(stages.dense_layer(FORWARD), where).seconds
    method = run(where).method
    sparse = clock.timed(stages.sparse_layer(FORWARD, method, found), where).seconds
    assert 0 < found < 1 and sparse == pytest.approx(dense, rel=0.01)


def test_a_run_is_the_sum_of_its_steps():
    found = run(overrides=["schedule.dense_layers=[0,1]"], steps=12)
    assert found.sparse_run.seconds == pytest.approx(sum(found.step(n).seconds for n in range(12)))
    assert found.dense_steps == 3 and found.density == 0.25
    assert found.step(0).stages.keys() >= {DENSE} and EXACT not in found.step(0).stages
    last = found.step(11).stages
    assert last[DENSE] == pytest.approx(found.dense_step.stages[DENSE] * 2 / 40)


def test_calls_above_the_crossover_are_dense():
    config = SparseConfig.load("tiles")
    plan = Plan(FORWARD, config, 10)
    below, above = (predict(plan, H100, crossover=c) for c in (0.26, 0.24))
    assert below.dense_steps == 3 and above.dense_steps == 10
    pinned = Plan(FORWARD, config.override("kernel.impl=triton"), 10)
    assert predict(pinned, H100, crossover=0.24).dense_steps == 3


def test_short_sequences_are_dense():
    found = run(forward=replace(FORWARD, grid=TokenGrid(1, 31, 33)))
    assert found.dense_steps == 10 and found.speedup == pytest.approx(1, abs=0.01)


def test_errors_are_carried_along():
    """An uncertain rate counts by its share; what dense and sparse share, hardly in their ratio."""
    bare = replace(H100, slower={})
    found = run(bare)
    sure = {n: replace(c, error=0.0) for n, c in H100.constants.items()}
    none = run(replace(bare, constants=sure)).errors
    assert none["dense"] == clock.MODEL_ERROR and none["speedup"] == 0.0
    assert found.errors["dense"] > none["dense"]
    wide = {**sure, "dense": replace(H100.constants["dense"], error=0.5)}
    errors = run(replace(bare, constants=wide)).errors
    share = found.dense_step.stages[DENSE] + found.dense_step.stages[CROSS]
    share /= found.dense_step.seconds
    expected = (clock.MODEL_ERROR**2 + (0.5 * share) ** 2) ** 0.5
    assert errors["dense"] == pytest.approx(expected, rel=1e-3)
    assert 0 < errors["speedup"] < 0.5 * share


def test_memory_counts_weights_and_buffers():
    dense, sparse = memory(FORWARD, None, FORWARD.weights), memory(FORWARD, METHOD, FORWARD.weights)
    assert dense["weights"] == 28e9 and dense["sparse buffers"] == 0
    passed = 75_600 * 5120 * 2
    cells = 40 * 591 * 1182
    assert METHOD.centroids and not (METHOD.spread or METHOD.row_moments)
    assert sparse["sparse buffers"] == 13 * cells
    tilted = replace(METHOD, spread=True, row_moments=True)
    assert memory(FORWARD, tilted, FORWARD.weights)["sparse buffers"] == 21 * cells
    raster = memory(replace(FORWARD, hoisted=False), METHOD, FORWARD.weights)
    assert raster["sparse buffers"] == 2 * passed + 13 * cells
    assert dense["activations"] == sparse["activations"] >= 6 * passed


def test_memory_counts_orders_that_heads_keep():
    """8 bytes a token and head, as `tests/test_content_order.py` finds of a running call."""
    ordered = replace(METHOD, refresh=4, axes=6)
    kept = memory(FORWARD, ordered, FORWARD.weights, branches=2)["orders of heads"]
    assert kept == 2 * 8 * 75_600 * 40 * FORWARD.layers
    assert memory(FORWARD, METHOD, FORWARD.weights, branches=2)["orders of heads"] == 0


def test_blocks_that_are_kept_are_neither_drafted_nor_selected_again():
    """SparseD chooses in the first sparse step of each layer, here in one of 8."""
    config = SparseConfig.load("sparsed")
    found = predict(Plan(FORWARD, config, 10), H100)
    assert found.dense_steps == 2
    (first,), (later,) = found.calls[2], found.calls[3]
    names = {s.name for s in found.attention(first)} - {s.name for s in found.attention(later)}
    assert names == {ESTIMATOR} and found.calls[3:] == (found.calls[3],) * 7
    assert found.step(2).stages[SELECTOR] > found.step(3).stages[SELECTOR]
    every = predict(Plan(FORWARD, config.override("keep.plans=1"), 10), H100)
    drafted = [run.sparse_run.stages[ESTIMATOR] for run in (every, found)]
    assert drafted[0] == pytest.approx(8 * drafted[1])
    shown = sum(found.step(n).seconds for n in range(2, 10)) / 8
    assert found.sparse_step.seconds == pytest.approx(shown)
    assert found.sparse_run.seconds < every.sparse_run.seconds
    assert found.balance > every.balance


@pytest.mark.parametrize(
    ("changes", "plans", "chosen"),
    [
        (("keep.plans=3",), 3, [2, 5, 8]),
        (("keep.plans=100", "layout.name=content", "layout.refresh=4"), 100, [2, 6]),
        (("keep.plans=100", "schedule.dense_steps=0"), 100, [0]),
    ],
    ids=["age", "orders", "no dense step"],
)
def test_steps_in_which_blocks_are_chosen(changes, plans, chosen):
    found = run(overrides=["schedule.dense_layers=[]", "schedule.dense_steps=2", *changes])
    made = [n for n, calls in enumerate(found.calls) for c in calls
            if c.density is not None and c.carried.chooses]  # fmt: skip
    assert made == chosen and found.method.keep.plans == plans


def test_a_residual_costs_a_sparse_call_in_the_last_dense_step_and_a_sum_in_later_ones():
    kept, plain = (
        run(overrides=["schedule.dense_layers=[]", "schedule.dense_steps=3", *more])
        for more in (["keep.residual=true"], [])
    )
    moved = 3 * 75_600 * 5120 * 2
    for step in range(10):
        work = [sum(s.bytes for s in one.attention(next(iter(one.calls[step]))))
                for one in (kept, plain)]  # fmt: skip
        sparse = sum(s.bytes for s in plain.attention(next(iter(plain.calls[3]))))
        more = {2: sparse + moved}.get(step, moved if step > 2 else 0)
        assert work[0] - work[1] == pytest.approx(more)
    assert kept.dense_steps == 3 and kept.density == plain.density


def test_a_tail_reads_everything_when_it_is_made_and_chooses_nothing_when_it_is_merged():
    how = ["schedule.dense_layers=[]", "schedule.dense_steps=1", "compensation.name=none"]
    found = run(overrides=[*how, "keep.tail=3"])
    exact = [
        sum(s.flops for s in found.attention(next(iter(calls))) if s.name == EXACT)
        for calls in found.calls[1:]
    ]
    (dense,) = stages.dense_layer(FORWARD)
    assert [x / dense.flops for x in exact] == pytest.approx([1, 0.25, 0.25] * 3)
    names = [{s.name for s in found.attention(next(iter(c)))} for c in found.calls[1:]]
    assert all((ESTIMATOR in some) == (n % 3 == 0) for n, some in enumerate(names))
    assert all(KEPT in some for some in names)
    assert found.density == pytest.approx(0.5), "as the report of such a run says"


@pytest.mark.parametrize("keep", ["plans=9", "residual=true", "tail=9"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_counts_what_is_kept_as_a_running_call_keeps_it(keep, dtype):
    grid = TokenGrid(3, 8, 9)
    small = "schedule.min_tokens=0", "schedule.dense_layers=[]", "schedule.dense_steps=1"
    blocks = "kernel.block_q=32", "kernel.block_k=16", "kernel.crossover=1"
    how = "schedule.density=0.3", "compensation.name=none", f"keep.{keep}"
    config = SparseConfig.load("tiles", [*small, *blocks, *how])
    forward = Forward(grid, 5, 4, 16, (), 0.0, 0, str(dtype).removeprefix("torch."))
    counted = memory(forward, run_method(forward, config, H100), 0, branches=2)
    held = Memory()
    for step in range(2):
        q, k, v = (torch.randn(1, grid.tokens, 4, 16).to(dtype) for _ in range(3))
        context = StepContext(step, 2)
        attend(q, k, v, grid=grid, config=config, impl="cpu", context=context,
               recall=held.of(step))  # fmt: skip
    found = {what: it for (what, _), (_, _, it) in held.entries.items()}
    sizes = {"plans=9": lambda: {"blocks": found["plan"]},
             "residual=true": lambda: {"residual": found["residual"]},
             "tail=9": lambda: {"tail": (found["tail"].out, found["tail"].lse),
                                "blocks": found["tail"].plan.levels}}[keep]()  # fmt: skip
    for name, kept in sizes.items():
        tensors = kept if isinstance(kept, tuple) else (kept,)
        assert counted[name] == 10 * sum(x.numel() * x.element_size() for x in tensors)
    assert set(counted) - set(memory(forward, METHOD, 0)) == set(sizes)


def of_orders(found, unit):
    return sum(getattr(s, unit) for s in found if s.name == ORDER)


def test_clusters_cost_their_iterations():
    """By hand: of 40 heads, 300 clusters of queries and 1000 of keys, as SVG2 has at 720p."""
    config = SparseConfig.load("svg2")
    method = run_method(FORWARD, config, H100)
    later, first = (
        stages.sparse_layer(FORWARD, method, 0.3, Carried(first=f)) for f in (False, True)
    )
    product = 2 * 75_600 * (300 + 1000) * 128 * 40
    assert of_orders(later, "flops") == pytest.approx(2 * product)
    assert of_orders(first, "flops") == pytest.approx(50 * product)
    scores = 4 * 75_600 * (300 + 1000) * 40  # float32, one reading of them
    assert 8 * scores < of_orders(later, "bytes") < 12 * scores
    assert of_orders(first, "launches") > 20 * of_orders(later, "launches")
    rare = run_method(FORWARD, config.override("layout.refresh=4"), H100)
    kept = of_orders(stages.sparse_layer(FORWARD, rare, 0.3), "flops")
    assert kept == pytest.approx(product / 2)
    plan = Plan(FORWARD, config.override("schedule.dense_layers=[]"), 10, 2)
    steps = [of_orders(predict(plan, H100).attention(next(iter(c))), "flops") / product
             for c in predict(plan, H100).calls]  # fmt: skip
    assert steps == pytest.approx([0, 0, 50, *[2] * 7])


def test_memory_counts_centroids_as_a_running_call_keeps_them():
    grid = TokenGrid(3, 8, 9, text_tokens=5)
    small = "schedule.min_tokens=0", "schedule.name=constant", "kernel.crossover=1"
    config = SparseConfig.load("svg2", [*small, "layout.clusters_q=7", "layout.clusters_k=11"])
    forward = Forward(grid, 5, 4, 16, (), 0.0, 0, "bfloat16")
    counted = memory(forward, run_method(forward, config, H100), 0, branches=2)
    held = Memory()
    q, k, v = (torch.randn(1, grid.tokens, 4, 16).bfloat16() for _ in range(3))
    attend(q, k, v, grid=grid, config=config, impl="cpu", recall=held.of(0))
    ((_, _, orders),) = held.entries.values()
    tensors = [x for one in orders.clusters for x in (one.centroid, one.count)]
    sizes = [sum(x.numel() * x.element_size() for x in some)
             for some in (tensors, (orders.order_q, orders.order_k))]  # fmt: skip
    assert [counted[name] for name in ("clusters", "orders of heads")] == [10 * n for n in sizes]


def test_calls_are_timed_as_a_later_step_of_a_run_clusters():
    config = SparseConfig.load("svg2")
    assert tried(config, "cpu", 64, 0.2).layout == replace(config.layout, iterations=2)
