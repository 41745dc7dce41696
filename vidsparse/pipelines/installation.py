"""Installation: everything that acceleration changes in one pipeline, and how it is taken back."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from vidsparse.attention import AttentionResult
from vidsparse.config import SparseConfig
from vidsparse.geometry import token_order
from vidsparse.pipelines import Adapter, Forward, eager
from vidsparse.pipelines.hoist import Hoist
from vidsparse.pipelines.hooks import ContextHook, add_hook, remove_hook
from vidsparse.pipelines.processor import Link, SparseProcessor
from vidsparse.pipelines.report import RunReport
from vidsparse.pipelines.steps import StepTracker
from vidsparse.plan import StepContext

HOOK = "vidsparse_context"


class Installation:
    """Hooks and processors on the transformers of one pipeline, and the report of its last run.

    It is made installed; `remove` undoes all of it. The pipeline is held weakly. When it is
    deleted, its transformers, which another pipeline may share, become stock again.
    """

    def __init__(self, pipe: Any, adapter: Adapter, config: SparseConfig, preset: str) -> None:
        self.pipe = weakref.ref(pipe)
        self.adapter, self.config, self.preset = adapter, config, preset
        self.transformers = adapter.transformers(pipe)
        self.report = RunReport(preset, config)
        self.tracker = StepTracker(pipe, self._start_run, adapter.branch_order)
        self.hoists: list[Hoist] = []
        self.contexts: dict[str, ContextHook] = {}
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.slots: list[tuple[Any, Any, SparseProcessor]] = []  # module, its stock, ours
        for name, transformer in self.transformers.items():
            check_stock(adapter, name, transformer)
        try:
            for name in self.transformers:
                self._install(name)
        except BaseException:
            self.remove()
            raise
        self.finalizer = weakref.finalize(pipe, self.remove)
        self.finalizer.atexit = False

    def _install(self, name: str) -> None:
        """Hooks and processors of one transformer."""
        transformer, forward = self.transformers[name], Forward()
        modules = self.adapter.self_attention(transformer)
        order = partial(token_order, layout=self.config.layout)
        hoist = Hoist(transformer, self.adapter, order, forward)
        self.hoists.append(hoist)
        hoist.attach()
        self.contexts[name] = ContextHook(self.tracker.end_run)
        add_hook(transformer, self.contexts[name], HOOK)
        before = partial(self._before_forward, name, forward, len(modules))
        self.handles.append(transformer.register_forward_pre_hook(before))
        for layer, module in enumerate(modules):
            stock = module.processor
            link = Link(forward, layer, self.config, self._record, weakref.ref(module))
            ours = self.adapter.sparse.replacing(stock, link)
            self.slots.append((module, stock, ours))
            module.processor = ours

    def remove(self) -> int:
        """Undo everything. Returns the number of processors that were no longer ours, and stay."""
        replaced = 0
        for module, stock, ours in self.slots:
            if module.processor is not ours:
                replaced += 1
                continue
            stock.__dict__.update(ours.settings())  # an attention backend that was chosen since
            module.processor = stock
        for handle in self.handles:
            handle.remove()
        for name in self.contexts:
            remove_hook(self.transformers[name], HOOK)
        for hoist in self.hoists:
            hoist.detach()
        self.tracker.detach()
        for collection in (self.slots, self.handles, self.contexts, self.hoists):
            collection.clear()
        return replaced

    @torch.compiler.disable
    def _before_forward(
        self, name: str, forward: Forward, layers: int, module: nn.Module, args: Any
    ) -> None:
        """Before a transformer: tell its processors where in the run they are."""
        at = self.tracker.before_forward(self.contexts[name].context_name)
        forward.context = StepContext(at.step, at.steps, 0, layers, at.branch, name)

    def _start_run(self) -> None:
        """A run starts: check that the pipeline still is as we left it, and open a new report."""
        pipe = self.pipe()
        held = {name: getattr(pipe, name, None) for name in self.transformers}
        gone = [
            n for n, m in held.items() if m is not None and eager(m) is not self.transformers[n]
        ]
        lost = sum(module.processor is not ours for module, _, ours in self.slots)
        if gone or lost:
            what = f"{lost} of {len(self.slots)} attention processors were"
            what = f"{', '.join(gone)} was" if gone else what
            raise RuntimeError(
                f"{what} replaced since accelerate_pipeline, so attention would be dense: call "
                "accelerate_pipeline again, after the replacement, or restore_pipeline"
            )
        self.report = RunReport(self.preset, self.config)

    def _record(self, context: StepContext, result: AttentionResult) -> None:
        self.report.add(context, result.head_density, result.reason, result.seconds)


def check_stock(adapter: Adapter, name: str, transformer: nn.Module) -> None:
    """Raise ValueError unless the attention of a transformer is stock, eager and not parallel."""
    compiled = any(m._compiled_call_impl is not None for m in transformer.modules())
    if compiled or eager(transformer) is not transformer:
        raise ValueError(f"{name} is compiled: call accelerate_pipeline before compiling")
    for module in adapter.self_attention(transformer):
        processor = module.processor
        if isinstance(processor, SparseProcessor):
            raise ValueError(
                f"{name} is already accelerated through another pipeline that shares it: "
                "restore_pipeline that one first"
            )
        if type(processor) is not adapter.stock:
            raise ValueError(
                f"{name} has a {type(processor).__name__} where {adapter.stock.__name__} was "
                "expected; what it does would be lost, so take it off first"
            )
        if getattr(processor, "_parallel_config", None) is not None:
            raise ValueError(f"{name} is context-parallel, which vidsparse does not support")


def check_layers(config: SparseConfig, name: str, layers: int) -> None:
    """Raise ValueError if the schedule names layers that a transformer does not have."""
    outside = [n for n in getattr(config.schedule, "dense_layers", ()) if not -layers <= n < layers]
    if outside:
        raise ValueError(
            f"schedule.dense_layers={outside}: {name} has {layers} layers, allowed is "
            f"{-layers} .. {layers - 1}"
        )
    given = len(getattr(config.schedule, "layer_density", ()))
    if given not in (0, layers):
        raise ValueError(
            f"schedule.layer_density has {given} numbers, but {name} has {layers} layers"
        )


def label(preset: object, overrides: list[str]) -> str:
    """A preset as the user would type it."""
    named = "custom" if isinstance(preset, Mapping | SparseConfig) else str(preset)
    return " ".join([named, *overrides])
