"""Installation: everything that acceleration changes in one pipeline, and how it is taken back."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vidsparse.config import SparseConfig
from vidsparse.geometry import token_order
from vidsparse.pipelines import private
from vidsparse.pipelines.adapter import Adapter, Split, eager
from vidsparse.pipelines.call import Link
from vidsparse.pipelines.expectation import Expectation
from vidsparse.pipelines.forward import Forward
from vidsparse.pipelines.hoist import Hoist
from vidsparse.pipelines.hooks import ContextHook
from vidsparse.pipelines.observation import Observer
from vidsparse.pipelines.processor import SparseProcessor
from vidsparse.pipelines.report import RunReport
from vidsparse.pipelines.steps import Runs
from vidsparse.plan import StepContext

HOOK = "vidsparse_context"


@dataclass
class Slot:
    """An attention module with our processor, and what stood in its place.

    path: of the module in its transformer. layer: index, 0-based.
    """

    path: str
    layer: int
    module: Any
    stock: Any
    ours: SparseProcessor

    def holds(self, transformer: nn.Module) -> bool:
        """Whether our processor sits in the module that the transformer has at this path."""
        try:
            found: Any = transformer.get_submodule(self.path)
        except AttributeError:
            return False
        return found is self.module and found.processor is self.ours

    def empty(self) -> bool:
        """Put the stock processor back. False if ours was no longer there: what is there stays."""
        self.ours.link = None  # wherever someone has kept it, it is a stock processor
        if self.module.processor is not self.ours:
            return False
        self.stock.__dict__.update(self.ours.settings())  # a backend that was chosen since
        self.module.processor = self.stock
        return True


@dataclass
class Part:
    """What is ours in one transformer. slots: of its attention modules, in layer order."""

    name: str
    transformer: nn.Module
    forward: Forward
    hoist: Hoist
    context: ContextHook
    slots: list[Slot]


class Installation:
    """Hooks and processors on the transformers of one pipeline, and the reports of their runs.

    It is made installed; `remove` undoes all of it. It belongs to the transformers: all pipelines
    that share them run through it. The one that was accelerated is held weakly and may be gone.
    """

    def __init__(self, pipe: Any, adapter: Adapter, config: SparseConfig, preset: str) -> None:
        self.adapter, self.config, self.preset = adapter, config, preset
        self.runs = Runs(pipe, self._open_report, adapter.branch_order)
        self.lock = threading.Lock()
        self.observers: list[Observer] = []
        self.expectation = Expectation(config, preset)
        self.parts: list[Part] = []
        transformers = adapter.transformers(pipe)
        for name, transformer in transformers.items():
            check_stock(adapter, name, transformer)
        try:
            for name, transformer in transformers.items():
                self._install(name, transformer)
        except BaseException:
            self.remove()
            raise
        for transformer in transformers.values():
            _installed[transformer] = weakref.ref(self)

    def owner(self) -> Any | None:
        """The pipeline that was accelerated, if it still exists."""
        return self.runs.owner()

    def covers(self, transformers: Iterable[nn.Module]) -> bool:
        """Whether all of these are accelerated through it, and none of its processors is gone."""
        ours = {id(part.transformer) for part in self.parts}
        whole = all(slot.holds(part.transformer) for part in self.parts for slot in part.slots)
        return whole and all(id(transformer) in ours for transformer in transformers)

    def replaced(self, pipe: Any | None) -> list[str]:
        """Names under which a pipeline holds something that is not accelerated through this."""
        known = {id(part.transformer) for part in self.parts}
        components = {} if pipe is None else vars(pipe)  # getattr finds deleted ones in the config
        found = []
        for name in self.adapter.components:
            held = eager(components.get(name))
            modules = held.modules() if isinstance(held, nn.Module) else [held]
            if held is not None and not any(id(module) in known for module in modules):
                found.append(name)
        return found

    def report(self, pipe: Any) -> RunReport:
        """Of the last run of a pipeline; an empty one before its first."""
        return self.runs.report(pipe) or RunReport(self.preset, self.config)

    def _install(self, name: str, transformer: nn.Module) -> None:
        """Hooks and processors of one transformer."""
        forward = Forward()
        layout = self.config.layout if self.adapter.hoisted else None
        order = partial(token_order, layout=layout)
        position = partial(self._position, len(self.parts))
        hoist = Hoist(transformer, self.adapter, order, forward, position)
        context = ContextHook(partial(self.runs.end, transformer))
        part = Part(name, transformer, forward, hoist, context, [])
        self.parts.append(part)
        hoist.attach()
        plan = adapter_plan(self.adapter)
        if plan is not None:
            private.place_plan(transformer, plan)
        private.place_observer(transformer, part.context, HOOK)
        self._fill(part)

    def _fill(self, part: Part) -> None:
        """Our processor in every self-attention module that the transformer has now."""
        modules = self.adapter.self_attention(part.transformer)
        paths = {id(module): path for path, module in part.transformer.named_modules()}
        kept, old = {id(slot.module): slot for slot in part.slots}, part.slots
        part.slots = []
        for layer, module in enumerate(modules):
            slot = kept.get(id(module))
            if slot is None or module.processor is not slot.ours:
                stock = stock_processor(self.adapter, part.name, module)
                own = weakref.ref(module)
                whole = weakref.ref(part.transformer)
                told = self.observers, self.expectation
                link = Link(part.forward, layer, self.config, own, whole, self.adapter, *told)
                ours = self.adapter.processors()[type(stock)].replacing(stock, link)
                slot = Slot("", layer, module, stock, ours)
                module.processor = ours
            slot.path = paths[id(module)]
            part.slots.append(slot)
        for slot in old:
            if slot not in part.slots:
                slot.empty()

    def remove(self) -> int:
        """Undo everything. Returns the number of processors that were no longer ours, and stay."""
        emptied = [slot.empty() for part in self.parts for slot in part.slots]
        for part in self.parts:
            private.remove_observer(part.transformer, HOOK)
            part.hoist.detach()
            if adapter_plan(self.adapter) is not None:
                private.remove_plan(part.transformer)
            if _installed.get(part.transformer, _nothing)() is self:
                del _installed[part.transformer]
        self.runs.detach()
        self.parts.clear()
        return emptied.count(False)

    def _position(self, index: int) -> StepContext | None:
        """Before a transformer: see that all is in its place, and tell where in the run it is.

        None while it is exported, which is no step of a run.
        """
        part = self.parts[index]
        with self.lock:  # threads may run this transformer at once
            private.place_observer(part.transformer, part.context, HOOK)
            if not all(slot.holds(part.transformer) for slot in part.slots):
                self._refill(part)
        if torch.compiler.is_exporting():
            return None
        report, at = self.runs.before_forward(part.transformer, part.context.context)
        report.guard.at(at.step)
        part.forward.report, layers = report, len(part.slots)
        return StepContext(
            at.step, at.steps, 0, layers, at.branch, part.name, at.context_name, at.forward
        )

    def _refill(self, part: Part) -> None:
        """Attention modules were replaced: follow, and where projections were fused, which brings
        another stock processor. Raises RuntimeError if processors were replaced otherwise."""
        modules = self.adapter.self_attention(part.transformer)
        ours = {id(slot.module): slot.ours for slot in part.slots}
        others = {
            id(slot.module): set(self.adapter.processors()) - {type(slot.stock)}
            for slot in part.slots
        }
        lost = sum(
            m.processor is not ours.get(id(m), m.processor)
            and _stock_class(m.processor) not in others[id(m)]
            for m in modules
        )
        if lost:
            self._refuse(f"{lost} of {len(ours)} attention processors were")
        if len(modules) != len(ours):
            self._refuse(
                f"the attention layers of {part.name} (then {len(ours)}, now {len(modules)}) were"
            )
        self._fill(part)

    def _open_report(self, pipe: Any | None) -> RunReport:
        """A run starts: check that its pipeline is as we left it, and open a report."""
        for name in self.replaced(pipe):
            self._refuse(f"{name} was")
        with self.lock:
            for part in self.parts:
                if len(self.adapter.self_attention(part.transformer)) != len(part.slots):
                    self._refill(part)
        return RunReport(self.preset, self.config)

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"{what} replaced since accelerate_pipeline, so attention would be dense: call "
            "accelerate_pipeline again, after the replacement, or restore_pipeline"
        )


_installed: WeakKeyDictionary[nn.Module, Callable[[], Installation | None]] = WeakKeyDictionary()


def installation_of(module: Any) -> Installation | None:
    """What accelerates a transformer, or the one inside its compiled wrapper; None for the rest."""
    module = eager(module) if isinstance(module, nn.Module) else None
    return None if module is None else _installed.get(module, _nothing)()


def _nothing() -> None:
    return None


def _stock_class(processor: Any) -> type:
    """Of a processor; one of ours that is linked to nothing, as unfusing puts back, is stock."""
    unlinked = isinstance(processor, SparseProcessor) and processor.link is None
    return processor.stock_class if unlinked else type(processor)


def check_stock(adapter: Adapter, name: str, transformer: nn.Module) -> None:
    """Raise ValueError unless the attention of a transformer is stock and eager."""
    compiled = any(m._compiled_call_impl is not None for m in transformer.modules())
    if compiled or eager(transformer) is not transformer:
        raise ValueError(f"{name} is compiled: call accelerate_pipeline before compiling")
    for module in adapter.self_attention(transformer):
        stock_processor(adapter, name, module)


def stock_processor(adapter: Adapter, name: str, module: Any) -> Any:
    """The processor that ours will replace in an attention module of transformer `name`.

    A copied module has one of ours that is linked to nothing: then a new stock one. Raises
    ValueError if the processor is customised or at work for another pipeline.
    """
    processor = module.processor
    if isinstance(processor, SparseProcessor):
        if processor.link is not None:
            raise ValueError(
                f"{name} is already accelerated through another pipeline that shares it: "
                "restore_pipeline that one first"
            )
        settings, processor = processor.settings(), processor.stock_class()
        processor.__dict__.update(settings)
    known = adapter.processors()
    if type(processor) not in known:
        expected = " or ".join(stock.__name__ for stock in known)
        raise ValueError(
            f"{name} has a {type(processor).__name__} where {expected} was expected; what it does "
            "would be lost, so take it off first"
        )
    return processor


def adapter_plan(adapter: Adapter) -> Mapping[str, Any] | None:
    """The plan of ours by which diffusers splits transformers for which it has none."""
    return adapter.split.plan if isinstance(adapter.split, Split) else None


def check_layers(config: SparseConfig, name: str, layers: int) -> None:
    """Raise ValueError if the schedule names layers that a transformer does not have."""
    outside = [n for n in getattr(config.schedule, "dense_layers", ()) if not -layers <= n < layers]
    if outside:
        raise ValueError(
            f"schedule.dense_layers={outside}: {name} has {layers} layers, allowed is "
            f"{-layers} .. {layers - 1}"
        )
    table = getattr(config.schedule, "sizes", (layers, 0))[0]
    if table != layers:
        raise ValueError(f"schedule.groups is of {table} layers, but {name} has {layers}")
    given = len(getattr(config.schedule, "layer_density", ()))
    if given not in (0, layers):
        raise ValueError(
            f"schedule.layer_density has {given} numbers, but {name} has {layers} layers"
        )


def label(preset: object, overrides: list[str]) -> str:
    """A preset as the user would type it."""
    named = "custom" if isinstance(preset, Mapping | SparseConfig) else str(preset)
    return " ".join([named, *overrides])
