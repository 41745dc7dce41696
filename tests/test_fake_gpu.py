"""Whole calls on a GPU that is not there: tensors without memory, which refuse to be read.

Whatever would wait for the device (a value read, a size that depends on values) raises, and so does
a tensor that was left on the CPU. Launchers of Triton kernels are operators, and only say here what
they return.
"""

from collections.abc import Iterator
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

from vidsparse import geometry
from vidsparse.attention import attend
from vidsparse.config import SparseConfig, presets
from vidsparse.decision import check_config
from vidsparse.draft import pieces
from vidsparse.grid import TokenGrid
from vidsparse.kernels.gpu import engine, exact_engine, levels_engine, rest, support, work
from vidsparse.pipelines import guard
from vidsparse.pipelines.report import RunReport
from vidsparse.plan import StepContext

DEVICE = torch.device("cuda:0")
GRID = TokenGrid(5, 16, 22, text_tokens=77, text_first=True)
CACHES: tuple[Any, ...] = (
    *(geometry.plan_geometry, pieces, engine._rows, levels_engine.key_layout),
    *(exact_engine.key_place, exact_engine._full_rows, exact_engine._rows_of_tokens),
    *(rest._blocks, rest._bias, work._tables),
)


class FakeGPU(FakeTensorMode):
    """Real work on the CPU where no tensor of the GPU takes part.

    within: an operator on fake tensors, whose parts make fake tensors: a copy to the host starts as
    an empty tensor there.
    """

    within = False

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.launched: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*tree_leaves((args, kwargs))]
        fake = any(isinstance(x, FakeTensor) for x in given) or DEVICE in given
        if not (fake or self.within):
            return func(*args, **kwargs or {})
        if not self.within and str(func.overloadpacket) not in FREE:
            self.launched.append(str(func.overloadpacket))
        outer, self.within = self.within, True
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.within = outer


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


def run(
    device: torch.device, preset: str, *changes: str, hoisted: bool = True, watch: bool = True
) -> Any:
    config = SparseConfig.load(
        preset, ["schedule.min_tokens=0", "schedule.name=constant", *changes]
    )
    # Watched, so each test shows that nobody waits to see whether the output is finite.
    sizes = 2, GRID.tokens, 3, 128
    q, k, v = (torch.empty(sizes, dtype=torch.bfloat16, device=device) for _ in range(3))
    how: Any = {"grid": GRID, "config": config, "hoisted": hoisted, "return_lse": True}
    how["watch"] = watch
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
    "how", ["form=pointer", "form=tma", "form=ws", "qk=int8"], ids=lambda how: how.split("=")[1]
)
def test_forms(how: str, cuda: torch.device) -> None:
    result = run(cuda, "balanced", f"kernel.{how}", "kernel.block_q=128")
    assert result.reason is None and result.out.device == cuda


@pytest.mark.parametrize("preset", ["balanced", "pisa"])
def test_launches_of_a_call(preset: str, cuda: torch.device) -> None:
    """No small launches between those of the kernels; the density and the watch apart.

    The summary of a call with a moment is two, so that Taylor takes eight.
    """
    changes = "kernel.block_q=128", "selector.name=topk", "schedule.density=0.2"
    run(cuda, preset, *changes)  # fills what is kept of a cut
    mode = torch.utils._python_dispatch._get_current_dispatch_mode()
    assert isinstance(mode, FakeGPU)
    mode.launched.clear()
    run(cuda, preset, *changes, watch=False)
    density = mode.launched.index("vidsparse.row_shares")
    assert mode.launched[density:] == ["vidsparse.row_shares", "aten.sum"]
    assert mode.launched[:density] == [f"vidsparse.{name}" for name in KERNELS]


KERNELS = ("summarise", "block_means", "draft_scores", "select", "pack_exact", "exact_tiles",
           "rest_merge")  # fmt: skip


def test_the_density_is_read_on_demand(cuda: torch.device) -> None:
    """What a reader of the report waits for; that it raises here shows that reads are noticed."""
    with pytest.raises(DataDependentOutputException):
        _ = run(cuda, "balanced").density


def test_flags_of_a_run_are_copied_and_not_waited_for(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copies of steps wait to arrive; no call and no step reads one before.

    That the first one to arrive is read, and that this raises, shows that reads are noticed.
    """
    event = SimpleNamespace(record=lambda: None, query=lambda: False)
    monkeypatch.setattr(guard.torch, "Event", lambda device: event)
    report = RunReport("balanced", SparseConfig.load("balanced"))
    for step in range(3):
        report.guard.at(step)
        for layer in range(2):
            report.add(StepContext(step, 3, layer, 2), run(cuda, "balanced"))
    assert [(len(calls), copy.shape) for calls, copy, _ in report.guard._copied] == [
        (2, (2, 4))
    ] * 2
    event.query = lambda: True
    with pytest.raises(DataDependentOutputException):
        report.guard.at(3)


def test_dense_calls_and_checks(cuda: torch.device) -> None:
    config = SparseConfig.load("balanced")
    check_config(config, cuda)
    assert run(cuda, "balanced", "schedule.density=0.9").reason == "not-faster"
