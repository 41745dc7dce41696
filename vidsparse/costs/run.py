"""A prediction: steps of a schedule on a machine, dense and sparse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from vidsparse import registry
from vidsparse.config import SparseConfig
from vidsparse.costs import clock, sharing, stages
from vidsparse.costs.clock import Timed, timed
from vidsparse.costs.forward import Forward
from vidsparse.costs.machine import Machine
from vidsparse.decision import not_faster, requested, scheduled
from vidsparse.kernels.executor import Executor, Form
from vidsparse.plan import StepContext

GPU_EXECUTOR = "triton"


@dataclass(frozen=True)
class Plan:
    """What a run does. steps: of the denoising. branches: forwards a step, of guidance. devices:
    how many share each forward, see `sharing.py`."""

    forward: Forward
    config: SparseConfig
    steps: int
    branches: int = 1
    devices: int = 1

    @property
    def attended(self) -> Forward:
        """Of which a device computes the self-attention."""
        return sharing.inside(self.forward, self.devices)


@dataclass(frozen=True)
class Prediction:
    """Seconds of a run on a machine, or on as many as share it.

    crossover: density above which calls are dense, as on this machine; 1.0 where nothing says so.
    calls: for every step, density of its layers -> how many; a dense layer counts as None.
    """

    plan: Plan
    machine: Machine
    crossover: float
    calls: tuple[Mapping[float | None, int], ...]

    @property
    def method(self) -> stages.Method:
        return method(self.plan.attended, self.plan.config, self.machine)

    def step(self, number: int) -> Timed:
        """Of the sparse run."""
        return self._step(tuple(sorted(self.calls[number].items(), key=str)))

    @cached_property
    def dense_step(self) -> Timed:
        """Without vidsparse."""
        return self._step(((None, self.plan.forward.layers),), stock=True)

    @cached_property
    def sparse_step(self) -> Timed:
        """The last step that is not dense in all layers; the last one if all are."""
        sparse = [n for n, calls in enumerate(self.calls) if set(calls) != {None}]
        return self.step(sparse[-1] if sparse else -1)

    @cached_property
    def dense_run(self) -> Timed:
        return self.dense_step.times(self.plan.steps)

    @cached_property
    def sparse_run(self) -> Timed:
        total = Timed()
        for calls, count in Counter(tuple(sorted(c.items(), key=str)) for c in self.calls).items():
            total += self._step(calls).times(count)
        return total

    @property
    def dense_steps(self) -> int:
        """Steps that are dense in all layers."""
        return sum(set(calls) == {None} for calls in self.calls)

    @property
    def density(self) -> float:
        """Mean over the sparse calls; 1.0 if there are none."""
        sparse = Counter[float]()
        for calls in self.calls:
            sparse.update({d: n for d, n in calls.items() if d is not None})
        return sum(d * n for d, n in sparse.items()) / sum(sparse.values()) if sparse else 1.0

    @property
    def speedup(self) -> float:
        return self.dense_run.seconds / self.sparse_run.seconds

    @property
    def errors(self) -> dict[str, float]:
        """Standard errors, relative: of the seconds of both runs, and of their ratio."""
        return {
            "dense": clock.error(self.dense_run, self.machine),
            "sparse": clock.error(self.sparse_run, self.machine),
            "speedup": clock.ratio_error(self.dense_run, self.sparse_run, self.machine),
        }

    @property
    def balance(self) -> float:
        """Density at which a sparse layer takes as long as a dense one, in 0 .. 1."""
        forward, machine = self.plan.attended, self.machine
        dense = timed(stages.dense_layer(forward), machine).seconds
        low, high = 0.0, 1.0
        while high - low > 1e-3:
            middle = (low + high) / 2
            sparse = timed(stages.sparse_layer(forward, self.method, middle), machine).seconds
            low, high = (low, middle) if sparse > dense else (middle, high)
        return (low + high) / 2

    def _step(self, calls: tuple[tuple[float | None, int], ...], stock: bool = False) -> Timed:
        whole, machine, devices = self.plan.forward, self.machine, self.plan.devices
        work = stages.around_attention(sharing.outside(whole, devices))
        work += [] if stock else [stages.once(whole)]
        work += [stage.times(whole.layers) for stage in sharing.exchange(whole, devices)]
        forward = self.plan.attended
        for density, count in calls:
            if density is None:
                layer = stages.dense_layer(forward)
            else:
                layer = stages.sparse_layer(forward, self.method, density)
            work += [stage.times(count) for stage in layer]
        return timed(work, machine).times(self.plan.branches)


def predict(plan: Plan, machine: Machine, crossover: float = 1.0) -> Prediction:
    """crossover: density above which this machine's calls are dense, if that was measured."""
    config, layers = plan.config, plan.forward.layers
    if isinstance(config.kernel.crossover, float):
        crossover = config.kernel.crossover
    auto = requested(config, "auto") == "auto"
    calls = []
    for step in range(plan.steps):
        found = Counter[float | None]()
        for layer in range(layers):
            context = StepContext(step, plan.steps, layer, layers)
            density, reason = scheduled(config, plan.forward.grid, context)
            dense = reason or (auto and not_faster(config, density, crossover))
            found[None if dense else density] += 1
        calls.append(found)
    return Prediction(plan, machine, crossover, tuple(calls))


def method(forward: Forward, config: SparseConfig, machine: Machine) -> stages.Method:
    """What sparse calls of a config do on a machine."""
    name = GPU_EXECUTOR if machine.is_gpu else "cpu"
    executor: Executor = registry.executor(name)
    block_q = executor.query_block(form(forward, config, machine))
    layout, first_order = config.layout, config.compensation.first_order
    products = getattr(config.estimator, "products", None)
    return stages.Method(
        block_q=block_q,
        block_k=config.kernel.block_k,
        centroids=config.compensation.centroids,
        first_order=first_order != "none",
        row_moments=first_order == "row",
        spread=config.estimator.spread or config.compensation.spread,
        reads_tokens=config.estimator.reads_tokens,
        products=products(block_q, config.kernel.block_k, forward.heads)
        if products
        else (0.0, 1.0),
        one_launch=getattr(config.estimator, "one_launch", False),
        blend=getattr(config.compensation, "blend", False),
        refresh=config.orders_last,
        axes=layout.axes if layout.per_head else 0,
    )


def form(forward: Forward, config: SparseConfig, machine: Machine, trial: Any = None) -> Form:
    """A sparse call, as executors are asked about it."""
    return Form(
        config,
        forward.grid,
        torch.device("cuda" if machine.is_gpu else "cpu"),
        getattr(torch, forward.dtype),
        forward.head_dim,
        forward.heads,
        forward.hoisted,
        trial,
    )
