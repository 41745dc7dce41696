"""Whole calls on a GPU that is not there: tensors without memory, which refuse to be read.

Whatever would wait for the device (a value read, a size that depends on values) raises, and so does
a tensor that was left on the CPU. Launchers of Triton kernels are operators, and only say here what
they return.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves

from vidsparse import bisection, geometry, inside
from vidsparse.attention import attend
from vidsparse.blocks import Blocks
from vidsparse.config import SparseConfig, presets
from vidsparse.costs import machine
from vidsparse.costs.forward import Forward
from vidsparse.costs.run import Plan, predict
from vidsparse.costs.run import method as costs_of
from vidsparse.costs.stage import ORDER, Carried
from vidsparse.costs.stages import sparse_layer
from vidsparse.decision import check_config
from vidsparse.draft import pieces
from vidsparse.estimator import antidiagonal, hier, proxy, relative, sampled
from vidsparse.grid import TokenGrid
from vidsparse.kernels.gpu import engine, exact_engine, levels_engine, rest, support, work
from vidsparse.layout import cycle, stride
from vidsparse.memory import Memory, Recall
from vidsparse.pipelines import guard
from vidsparse.pipelines.report import RunReport
from vidsparse.plan import SKIP, BlockPlan, StepContext

DEVICE = torch.device("cuda:0")
GRID = TokenGrid(5, 16, 22, text_tokens=77, text_first=True)
CACHES: tuple[Any, ...] = (
    *(
        bisection.start,
        bisection._rows,
        geometry.plan_geometry,
        geometry.patterned,
        stride.candidates,
        stride.drawn,
        stride.owner_on,
        cycle.turned,
        pieces,
        *(inside.slots, inside._text, sampled.sampled, antidiagonal.groups, proxy.every),
        *(relative.near, hier.supers, hier._weights),
        engine._rows,
        levels_engine.key_layout,
    ),
    *(exact_engine.key_place, exact_engine._full_rows),
    *(rest._blocks, rest._bias, work._tables),
)


class FakeGPU(FakeTensorMode):
    """Real work on the CPU where no tensor of the GPU takes part.

    launched: names of operators that launch something. copied: of those that bring numbers from one
    device to another. made: what came out of any operator. within: an operator on fake tensors,
    whose parts make fake tensors: a copy to the host starts as an empty tensor there.
    """

    within = False

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.launched: list[str] = []
        self.copied: list[str] = []
        self.made: list[weakref.ref[torch.Tensor]] = []

    def forget(self) -> None:
        for noted in (self.launched, self.copied, self.made):
            noted.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*tree_leaves((args, kwargs))]
        fake = any(isinstance(x, FakeTensor) for x in given) or DEVICE in given
        if not (fake or self.within):
            return func(*args, **kwargs or {})
        if not self.within and str(func.overloadpacket) not in FREE:
            self.launched.append(str(func.overloadpacket))
        outer, self.within = self.within, True
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.within = outer
        if not outer:
            made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            self.made += map(weakref.ref, made)
            tensors = [x for x in (*given, *made) if isinstance(x, torch.Tensor)]
            self.copied += [str(func.overloadpacket)] * (len({x.device for x in tensors}) > 1)
        return result


FREE = {
    *("aten.empty", "aten.new_empty", "aten.transpose", "aten.slice", "aten.detach", "aten.expand"),
    *("aten.view", "aten.unsqueeze", "aten.alias", "prim.device"),
}
"""Operators that launch nothing."""


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A Hopper GPU as far as shapes, strides, dtypes and devices go."""
    monkeypatch.setattr(support, "refusal", lambda device: None)
    monkeypatch.setattr(support, "capability", lambda device: (9, 0))
    for cache in CACHES:
        cache.cache_clear()
    with FakeGPU(allow_non_fake_inputs=True), torch.no_grad():
        yield DEVICE
    for cache in CACHES:
        cache.cache_clear()


def current_mode() -> FakeGPU:
    mode = torch.utils._python_dispatch._get_current_dispatch_mode()
    assert isinstance(mode, FakeGPU)
    return mode


def run(
    device: torch.device,
    preset: str,
    *changes: str,
    hoisted: bool = True,
    watch: bool = True,
    recall: Recall | None = None,
) -> Any:
    config = SparseConfig.load(
        preset, ["schedule.min_tokens=0", "schedule.name=constant", *changes]
    )
    # Watched, so each test shows that nobody waits to see whether the output is finite.
    sizes = 2, GRID.tokens, 3, 128
    q, k, v = (torch.empty(sizes, dtype=torch.bfloat16, device=device) for _ in range(3))
    how: Any = {"grid": GRID, "config": config, "hoisted": hoisted, "return_lse": True}
    how |= {"watch": watch, "recall": recall}
    return attend(q, k, v, **how)


@pytest.mark.parametrize("hoisted", [True, False], ids=["hoisted", "raster"])
@pytest.mark.parametrize("preset", presets())
def test_presets(preset: str, hoisted: bool, cuda: torch.device) -> None:
    result = run(cuda, preset, hoisted=hoisted)
    assert result.reason is None and "permute" not in result.seconds
    assert result.out.shape == (2, GRID.tokens, 3, 128) and result.out.is_contiguous()
    assert result.out.dtype == torch.bfloat16 and result.lse.dtype == torch.float32
    assert result.lse.shape == (2, 3, GRID.tokens)
    left = (result.out, result.lse, result.plan.levels, result.head_density, result.finite)
    assert {x.device for x in left} == {cuda}
    assert result.finite.shape == (4,) and result.finite.dtype == torch.bool


@pytest.mark.parametrize(
    "how", ["form=pointer", "form=tma", "qk=int8"], ids=lambda how: how.split("=")[1]
)
def test_forms(how: str, cuda: torch.device) -> None:
    result = run(cuda, "tiles", f"kernel.{how}", "kernel.block_q=128")
    assert result.reason is None and result.out.device == cuda


@pytest.mark.parametrize("preset", ["tiles", "pisa"])
def test_launches_of_a_call(preset: str, cuda: torch.device) -> None:
    """No small launches between those of the kernels; the density and the watch apart.

    The summary of a call with a moment is two, so that Taylor takes nine.
    """
    changes = ("kernel.block_q=128", "estimator.name=mean", "selector.name=topk",
               "schedule.density=0.2")  # fmt: skip
    run(cuda, preset, *changes)  # fills what is kept of a cut
    mode = current_mode()
    mode.forget()
    run(cuda, preset, *changes, watch=False)
    density = mode.launched.index("vidsparse.row_shares")
    assert mode.launched[density:] == ["vidsparse.row_shares", "aten.sum"]
    assert mode.launched[:density] == [f"vidsparse.{name}" for name in KERNELS]


KERNELS = ("summarise", "block_means", "draft_scores", "select", "pack_exact", "exact_tiles",
           "rest_bias", "rest_merge")  # fmt: skip


@pytest.mark.parametrize("made", [True, False], ids=["orders made", "orders kept"])
def test_launches_of_content_are_those_of_the_prediction(made: bool, cuda: torch.device) -> None:
    """All heads are taken at once; the watch apart."""
    config = SparseConfig.load("balanced", ["kernel.block_q=128", "schedule.density=0.2"])
    forward = Forward(GRID, 1, 6, 128, (), 0.0, 0, "bfloat16")
    method = replace(costs_of(forward, config, machine.table()["H100"]), refresh=1)
    counted = (one for one in sparse_layer(forward, method, 0.2) if made or one.name != ORDER)
    memory, mode = Memory(), current_mode()
    for step in range(2):
        mode.forget()
        run(cuda, "balanced", "kernel.block_q=128", "schedule.density=0.2", watch=False,
            recall=None if made else memory.of(step))  # fmt: skip
    found = [name for name in mode.launched if name not in VIEWS]
    assert len(found) == pytest.approx(sum(one.launches for one in counted), rel=0.2), found


@pytest.mark.parametrize("estimator", ["clusters", "cluster_errors", "mean"])
def test_launches_of_clusters_are_those_of_the_prediction(
    estimator: str, cuda: torch.device
) -> None:
    """In the first step of a run and in a later one, the watch apart."""
    small = "schedule.name=constant", "schedule.min_tokens=0", "kernel.block_q=128"
    config = SparseConfig.load("svg2", [*small, f"estimator.name={estimator}"])
    config = config.override("layout.iterations=5", "schedule.density=0.2")
    if estimator == "cluster_errors":
        config = config.override("selector.name=greedy")
    forward = Forward(GRID, 1, 6, 128, (), 0.0, 0, "bfloat16")
    method = costs_of(forward, config, machine.table()["H100"])
    memory, mode = Memory(), current_mode()
    operands = [
        torch.empty(1, GRID.tokens, 6, 128, dtype=torch.bfloat16, device=cuda) for _ in range(3)
    ]
    attend(*operands, grid=GRID, config=config, hoisted=True)  # fills what is kept of a cut
    for step in range(2):
        mode.forget()
        recall = memory.of(step)
        attend(*operands, grid=GRID, config=config, hoisted=True, recall=recall)
        found = [name for name in mode.launched if name not in VIEWS]
        work = sparse_layer(forward, method, 0.2, Carried(first=step == 0))
        assert len(found) == pytest.approx(sum(one.launches for one in work), rel=0.05)
        order = sum(one.launches for one in work if one.name == ORDER)
        last = found.index("aten.ones") + 2  # who has an order, and both are made narrow
        assert order == last + 1


KEEPING = {
    "plans": ("keep.plans=3", "compensation.name=none"),
    "plans, Taylor": ("keep.plans=3", "compensation.name=taylor"),
    "plans, tilt": ("keep.plans=3", "compensation.name=tilt", "estimator.name=variance"),
    "residual": ("keep.residual=true", "compensation.name=none"),
    "tail": ("keep.tail=3", "compensation.name=none"),
}


@pytest.mark.parametrize("keeping", KEEPING)
def test_launches_of_what_is_kept_are_those_of_the_prediction(
    keeping: str, cuda: torch.device
) -> None:
    """Of each step of a run: two dense ones, four sparse ones; the watch apart."""
    small = "schedule.min_tokens=0", "schedule.dense_layers=[]", "kernel.block_q=128"
    changes = "schedule.dense_steps=2", "schedule.density=0.2", *small
    config = SparseConfig.load("tiles", [*changes, *KEEPING[keeping]])
    forward = Forward(GRID, 1, 6, 128, (), 0.0, 0, "bfloat16")
    found = predict(Plan(forward, config, 6), machine.table()["H100"])
    memory, mode = Memory(), current_mode()
    operands = [
        torch.empty(2, GRID.tokens, 3, 128, dtype=torch.bfloat16, device=cuda) for _ in range(3)
    ]
    for run in range(2):  # the first one fills what is kept of a cut
        for step, calls in enumerate(found.calls):
            mode.forget()
            how: Any = {"context": StepContext(step, 6), "recall": memory.of(step)}
            how |= {"hoisted": True, "dense_path": lambda q, k, v: q.clone()}  # one launch
            attend(*operands, grid=GRID, config=config, **how)
            launched = [name for name in mode.launched if name not in VIEWS]
            if config.compensation.centroids:  # a summary with moments is two
                launched += [name for name in launched if name == "vidsparse.summarise"]
            else:  # the text ends in a short block
                launched = [name for name in launched if name != "vidsparse.rest_merge"]
            (call,) = calls
            wanted = sum(one.launches for one in found.attention(call))
            slack = "tilt" in keeping  # moments of all blocks are made in as many parts as fit
            assert run == 0 or abs(len(launched) - wanted) <= slack, (step, call, launched)
        memory.clear()
    assert {call.density for calls in found.calls for call in calls} == {None, 0.2}


VIEWS = {"aten.permute", "aten._unsafe_view", "aten.diagonal", "aten.squeeze", "aten.unsafe_chunk",
         "aten.select"}  # fmt: skip
"""Operators that launch nothing where their input is contiguous."""


ROUTES: dict[str, tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "exact": ((0,), {}, {}),
    "tma": ((0,), {}, {"form": "tma"}),
    "skip": ((0,), {"rest": SKIP}, {}),
    "moment": ((0,), {"first_order": "global"}, {}),
    "moments of rows": ((0,), {"first_order": "row"}, {}),
    "tilt": ((0,), {"tilt": True}, {}),
    "order": ((0,), {"order": True}, {}),
    "orders of heads": ((0,), {"orders": True, "first_order": "row", "tilt": True}, {}),
    "orders of heads, tma": ((0,), {"orders": True}, {"form": "tma"}),
    "levels": ((0, 2, 6), {"first_order": "global"}, {}),
    "levels, orders of heads": ((0, 2, 6), {"orders": True, "tilt": True}, {}),
    "int8": ((0,), {}, {"qk": "int8"}),
    "int8, order": ((0, 2), {"order": True}, {"qk": "int8"}),
}
"""Levels of a plan, what else it says, settings of `engine.execute`."""


@pytest.mark.parametrize("route", ROUTES)
def test_a_plan_can_be_captured(route: str, cuda: torch.device) -> None:
    """A CUDA graph allows no copy to or from the host, and what it allocates must not stay."""
    listed, says, how = ROUTES[route]
    cuts = Blocks.cut(GRID, 128), Blocks.cut(GRID, 64)
    heads = 2, 3
    levels = torch.empty(*heads, *map(len, cuts), dtype=torch.int8, device=cuda)
    plan = BlockPlan.from_levels(levels, *cuts, listed)
    tilt = torch.empty(levels.shape, device=cuda) if says.get("tilt") else None
    plan = plan.with_rest(says.get("rest", 6), says.get("first_order", "none"), tilt)
    order = torch.empty(GRID.tokens, dtype=torch.int64, device=cuda) if says.get("order") else None
    if says.get("orders"):
        each = torch.empty(*heads, GRID.tokens, dtype=torch.int64, device=cuda)
        plan = plan.with_orders(each, each)
    q, k, v = (
        torch.empty(2, GRID.tokens, 3, 128, dtype=torch.bfloat16, device=cuda).transpose(1, 2)
        for _ in range(3)
    )
    assert_captured(lambda: engine.execute(q, k, v, plan, order=order, return_lse=True, **how))


HOISTED = ("balanced", "psa", "tiles", "topp")
"""Of unlike stages; hoisted, the others differ from raster as these do."""
CAPTURED = [
    pytest.param(
        preset,
        hoisted,
        id=f"{preset}-{'hoisted' if hoisted else 'raster'}",
        marks=[pytest.mark.slow] * (hoisted and preset not in HOISTED),
    )
    for preset in presets()
    for hoisted in (True, False)
]


@pytest.mark.parametrize(("preset", "hoisted"), CAPTURED)
def test_a_whole_call_can_be_captured(preset: str, hoisted: bool, cuda: torch.device) -> None:
    changes = "kernel.block_q=128", "schedule.density=0.2"
    assert_captured(lambda: run(cuda, preset, *changes, hoisted=hoisted))


@pytest.mark.parametrize("keep", ["plans=3", "residual=true", "tail=3"])
def test_what_a_run_keeps_stays_on_the_device(keep: str, cuda: torch.device) -> None:
    """Two dense steps and three sparse ones: nothing is read, and nothing comes from the host."""
    changes = "schedule.dense_steps=2", "schedule.density=0.2", "compensation.name=none"
    small = "schedule.min_tokens=0", "kernel.block_q=128", "schedule.dense_layers=[]"
    config = SparseConfig.load("tiles", [f"keep.{keep}", *changes, *small])
    memory, mode = Memory(), current_mode()
    sizes = 2, GRID.tokens, 3, 128
    for step in range(6):
        q, k, v = (torch.empty(sizes, dtype=torch.bfloat16, device=cuda) for _ in range(3))
        how: Any = {"context": StepContext(step, 6), "recall": memory.of(step), "watch": True}
        mode.forget()
        result = attend(q, k, v, grid=GRID, config=config, **how)
        assert result.out.device == cuda and result.out.dtype == torch.bfloat16
        assert (result.reason is None) == (step >= 2)
        assert step < 4 or not mode.copied
    kept = [x for _, _, it in memory.entries.values() for x in tree_leaves(it)]
    assert kept and {x.device for x in kept if isinstance(x, torch.Tensor)} <= {cuda}


def assert_captured(call: Callable[[], Any]) -> None:
    """Of a call whose first one was outside of the graph. That it raises for a read, the next
    tests show."""
    mode = current_mode()
    result = call()
    assert mode.copied, "what is kept of a cut is copied to the device once"
    mode.forget()
    result = call()
    assert len(mode.launched) > 1 and not mode.copied
    del result
    gc.collect()
    assert not [x for ref in mode.made if (x := ref()) is not None]


def test_what_stays_and_what_is_copied_is_noticed(cuda: torch.device) -> None:
    kept: list[torch.Tensor] = []

    def call() -> Any:
        x = torch.arange(3).to(cuda)
        kept.append(x + 1)
        return x * 2

    with pytest.raises(AssertionError, match="copied"):
        assert_captured(call)
    mode = current_mode()
    mode.forget()
    call()
    assert mode.copied == ["aten._to_copy"]
    assert sum(ref() is not None for ref in mode.made) == 1


def test_the_density_is_read_on_demand(cuda: torch.device) -> None:
    """What a reader of the report waits for; that it raises here shows that reads are noticed."""
    with pytest.raises(DataDependentOutputException):
        _ = run(cuda, "tiles").density


def test_flags_of_a_run_are_copied_and_not_waited_for(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copies of steps wait to arrive; no call and no step reads one before.

    That the first one to arrive is read, and that this raises, shows that reads are noticed.
    """
    event = SimpleNamespace(record=lambda: None, query=lambda: False)
    monkeypatch.setattr(guard.torch, "Event", lambda device: event)
    report = RunReport("tiles", SparseConfig.load("tiles"))
    for step in range(3):
        report.guard.at(step)
        for layer in range(2):
            report.add(StepContext(step, 3, layer, 2), run(cuda, "tiles"))
    assert [(len(calls), copy.shape) for calls, copy, _ in report.guard._copied] == [
        (2, (2, 4))
    ] * 2
    event.query = lambda: True
    with pytest.raises(DataDependentOutputException):
        report.guard.at(3)


def test_dense_calls_and_checks(cuda: torch.device) -> None:
    config = SparseConfig.load("tiles")
    check_config(config, cuda)
    assert run(cuda, "tiles", "schedule.density=0.9").reason == "not-faster"
