"""Every available executor over the same plans, against the definition; what it refuses of them."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from plans import GRID, PLANS, plan_of

from vidsparse import registry
from vidsparse.config import Kernel
from vidsparse.kernels import reference
from vidsparse.kernels.call_check import check_call
from vidsparse.plan import SKIP

CPU = torch.device("cpu")
KERNEL = Kernel(block_q=32, block_k=16)
AVAILABLE = {n: e for n, e in registry.executors().items() if e.available(CPU) is None}
RUNS = {name: partial(e.execute, kernel=KERNEL) for name, e in AVAILABLE.items()} | {
    f"cpu-{route}": partial(AVAILABLE["cpu"].execute, kernel=replace(KERNEL, cpu_route=route))
    for route in ("native", "sdpa")
}
RICH = [n for n in RUNS if AVAILABLE[n.split("-")[0]].executes.lacks(plan_of("all", 1, 1)) is None]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", RUNS)
def test_an_executor_does_what_the_definition_says(name: str, plan: str) -> None:
    torch.manual_seed(len(plan))
    made = plan_of(plan, 2, 3)
    shape = (2, 3, made.q_blocks.tokens, 24)
    q, k, v = (torch.randn(shape) for _ in range(3))
    if lacking := AVAILABLE[name.split("-")[0]].executes.lacks(made):
        with pytest.raises(ValueError, match=re.escape(lacking)):
            RUNS[name](q, k, v, made)
        return
    out, lse = RUNS[name](q, k, v, made, return_lse=True)
    want, want_lse = reference.execute(q.double(), k.double(), v.double(), made)
    empty = want_lse.isinf()
    assert (out.double() - want).norm() <= 5e-6 * want.norm()
    assert torch.equal(lse.isinf(), empty) and not out[empty].any()
    assert ((lse.double() - want_lse)[~empty].abs() <= 1e-5).all()
    assert RUNS[name](q, k, v, made)[1] is None


@pytest.mark.parametrize("bad", ["nan key", "inf value"])
@pytest.mark.parametrize("plan", ["bias", "row-ragged", "all"])
@pytest.mark.parametrize("name", RICH)
def test_what_a_row_does_not_read_stays_out_of_it(name: str, plan: str, bad: str) -> None:
    """A key block is not finite: rows whose bias leaves it out are as if it were."""
    torch.manual_seed(len(plan))
    made = plan_of(plan, 2, 3)
    q, k, v = (torch.randn(2, 3, made.q_blocks.tokens, 24) for _ in range(3))
    clean, _ = RUNS[name](q, k, v, made)
    read, as_rest = made.level_map() != SKIP, made.read_as_rest()
    blocks = as_rest.flatten(0, 2).any(0) & ~read.flatten(0, 2).all(0)
    block = int(blocks.nonzero()[0])
    broken = made.k_blocks.owner.expand(2, 3, -1) == block
    if made.order_k is not None:
        broken = torch.empty_like(broken).scatter_(2, made.order_k, broken)
    (k if bad == "nan key" else v)[broken] = float(bad[:3])
    out, _ = RUNS[name](q, k, v, made)
    reads = read[..., block][:, :, made.q_blocks.owner]
    if made.order_q is not None:
        reads = torch.empty_like(reads).scatter_(2, made.order_q, reads)
    assert reads.any() and not reads.all()
    torch.testing.assert_close(out[~reads], clean[~reads])
    assert not out[reads].isfinite().all(-1).any()


@pytest.mark.parametrize("plan", ["row", "all"])
@pytest.mark.parametrize("name", RICH)
def test_a_query_that_is_not_finite_drafts_nothing(name: str, plan: str) -> None:
    """The others of its block lose its share in their draft, other blocks do not notice."""
    torch.manual_seed(len(plan))
    made = plan_of(plan, 2, 3)
    q, k, v = (torch.randn(2, 3, made.q_blocks.tokens, 24) for _ in range(3))
    clean, _ = RUNS[name](q, k, v, made)
    row = int(made.read_as_rest()[1, 2].sum(-1).argmax())
    place = torch.arange(made.q_blocks.tokens)[made.q_blocks.owner == row]
    near = place if made.order_q is None else made.order_q[1, 2, place]
    q[1, 2, near[3], 7] = float("nan")
    out, _ = RUNS[name](q, k, v, made)
    assert out[1, 2, near[3]].isnan().all()
    out[1, 2, near[3]] = clean[1, 2, near[3]]
    far = torch.ones(out.shape[:3], dtype=torch.bool)
    far[1, 2, near] = False
    assert torch.equal(out[far], clean[far])
    assert out.isfinite().all() and 0 < (out - clean).norm() < 0.1 * clean.norm()


@pytest.mark.parametrize("name", registry.executors())
def test_what_an_executor_does_not_execute_is_refused_with_the_cure(name: str) -> None:
    executes = registry.executor(name).executes
    q = torch.zeros(1, 1, GRID.tokens, 24)
    plain = plan_of("taylor", 1, 1)
    check = partial(check_call, q, q, q, engine="named", dtypes=(q.dtype,), executes=executes)
    check(plan=plain)
    for field, able, plan in (
        ("plan.first_order='row'", "row" in executes.first_orders, plan_of("row", 1, 1)),
        ("plan.first_order='block'", "block" in executes.first_orders, plain.with_rest(4, "block")),
        ("plan.rest_bias", executes.rest_bias, plan_of("bias", 1, 1)),
        ("plan.order_q and order_k", executes.head_orders, plan_of("orders", 1, 1)),
    ):
        if able:
            check(plan=plan)
            continue
        cures = [f"impl={n!r}" for n, e in AVAILABLE.items() if e.executes.lacks(plan) is None]
        wanted = f"{field}: the named engine does not execute it; use {' or '.join(cures)}"
        with pytest.raises(ValueError, match=f"^{re.escape(wanted)}$"):
            check(plan=plan)
