"""What the CPU engine refuses, what it leaves as it was, and its threads."""

import pytest
import torch
from cpu_calls import (
    assert_matches,
    calm,  # noqa: F401 - a fixture
    exact_plan,
    tensors,
)

from vidsparse.kernels.cpu import engine, threads
from vidsparse.kernels.cpu.routes import Route
from vidsparse.plan import SKIP, BlockPlan


def test_refusals() -> None:
    plan = exact_plan()
    q, k, v = tensors(plan, 64)
    with pytest.raises(ValueError, match=r"'block'.*impl='reference'"):
        engine.execute(q, k, v, plan.with_rest(6, "block"))
    with pytest.raises(ValueError, match=r"'global'.*rest=-1"):
        engine.execute(q, k, v, plan.with_rest(SKIP, "global"))
    with pytest.raises(ValueError, match="rest=3"):
        engine.execute(q, k, v, plan.with_rest(3))
    with pytest.raises(ValueError, match="1000 queries and 1000 keys"):
        engine.execute(q[:, :, 1:], k, v, plan)
    with pytest.raises(ValueError, match=r"expected \(1, 3, 8, 16\)"):
        engine.execute(q[:1], k[:1], v[:1], plan)
    with pytest.raises(ValueError, match="bfloat16"):
        engine.execute(q, k, v.bfloat16(), plan)
    with pytest.raises(ValueError, match="int64"):
        engine.execute(q.long(), k.long(), v.long(), plan)
    with pytest.raises(ValueError, match="workers=0"):
        engine.execute(q, k, v, plan, workers=0)


def test_grad_modes() -> None:
    plan = exact_plan()
    q, k, v = tensors(plan, 64)
    want, _ = engine.execute(q, k, v, plan, workers=2)
    with torch.inference_mode():
        out, _ = engine.execute(q * 1, k, v, plan, workers=2)
        assert out.is_inference()
    assert torch.equal(out, want)
    q.requires_grad_(True)
    with torch.no_grad():
        out, _ = engine.execute(q, k, v, plan, workers=2)
    assert torch.equal(out, want) and not out.requires_grad
    with pytest.raises(ValueError, match=r"inference only.*no_grad"):
        engine.execute(q, k, v, plan)


def test_inputs_stay_as_they_are() -> None:
    plan = exact_plan()
    given_tensors = [x.contiguous() for x in tensors(plan, 64)]
    before = [x.clone() for x in given_tensors]
    engine.execute(*given_tensors, plan)
    assert all(torch.equal(a, b) for a, b in zip(given_tensors, before, strict=True))


def test_error_in_a_worker_is_raised_once_and_leaves_order() -> None:
    plan = exact_plan()
    q, k, v = tensors(plan, 64)
    flag = torch.backends.mkldnn.matmul.fp32_precision
    broken = BlockPlan.from_levels(plan.levels, plan.q_blocks, plan.k_blocks)
    broken.__dict__["index"] = plan.index + 99
    with pytest.raises((IndexError, RuntimeError)):
        engine.execute(q, k, v, broken, workers=2)
    assert torch.backends.mkldnn.matmul.fp32_precision == flag
    assert_matches(q, k, v, plan, workers=2)


@pytest.mark.parametrize("route", [None, Route(fused=True)], ids=["mm", "sdpa"])
def test_workers_do_not_change_the_result(route: Route | None) -> None:
    """Six heads on 1 to 4 threads (with 4, two heads are cut into rows): the same bits."""
    plan = exact_plan()
    q, k, v = tensors(plan, 64)
    how = {"return_lse": True, "route": route}
    want, want_lse = engine.execute(q, k, v, plan, workers=1, **how)  # type: ignore[arg-type]
    for workers in (2, 4):
        out, lse = engine.execute(q, k, v, plan, workers=workers, **how)  # type: ignore[arg-type]
        assert torch.equal(out, want) and torch.equal(lse, want_lse)  # type: ignore[arg-type]


def test_workers_are_single_threaded() -> None:
    """Also after their first operation, and whatever the caller has."""
    torch.set_num_threads(2)
    seen: list[int] = []

    def worker() -> object:
        torch.ones(4) @ torch.ones(4)
        return lambda _: seen.append(torch.get_num_threads())

    for workers in (3, 2, 1):  # a new pool each time
        threads.for_each(range(4), worker, workers)  # type: ignore[arg-type]
    assert seen == [1] * 12
