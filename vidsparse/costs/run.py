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
from vidsparse.costs import clock, keeping, sharing, stages
from vidsparse.costs.clock import Timed, timed
from vidsparse.costs.forward import Forward
from vidsparse.costs.keeping import Call
from vidsparse.costs.machine import Machine
from vidsparse.costs.stage import Method, Stage
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
    calls: for every step, what its layers do -> how many do it.
    """

    plan: Plan
    machine: Machine
    crossover: float
    calls: tuple[Mapping[Call, int], ...]

    @property
    def method(self) -> Method:
        return method(self.plan.attended, self.plan.config, self.machine)

    def step(self, number: int) -> Timed:
        """Of the sparse run."""
        return self._step(tuple(sorted(self.calls[number].items(), key=str)))

    @cached_property
    def dense_step(self) -> Timed:
        """Without vidsparse."""
        return self._step(((Call(None), self.plan.forward.layers),), stock=True)

    @cached_property
    def sparse_step(self) -> Timed:
        """The last step that is not dense in all layers; the last one if all are. The mean of so
        many such steps as what is kept lasts."""
        sparse = [n for n, calls in enumerate(self.calls) if not _dense(calls)]
        last = sparse[-keeping.period(self.plan.config) :] or [len(self.calls) - 1]
        total = Timed()
        for number in last:
            total += self.step(number)
        return total.times(1 / len(last))

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
        return sum(map(_dense, self.calls))

    @property
    def density(self) -> float:
        """Mean over the sparse calls; 1.0 if there are none."""
        sparse = Counter[float]()
        for calls in self.calls:
            for call, count in calls.items():
                if call.density is not None:
                    sparse[call.work] += count
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
            sparse = timed(self.steady(middle), machine).seconds
            low, high = (low, middle) if sparse > dense else (middle, high)
        return (low + high) / 2

    def steady(self, density: float) -> list[Stage]:
        """A sparse layer at a density, in the mean of the sparse steps."""
        sparse = len(self.calls) - self.dense_steps
        return steady(self.plan.attended, self.plan.config, self.method, density, sparse)

    def attention(self, call: Call) -> list[Stage]:
        """One call of self-attention."""
        forward, method = self.plan.attended, self.method
        if call.density is not None:
            return stages.sparse_layer(forward, method, call.density, call.carried)
        work = stages.dense_layer(forward)
        if call.beside is not None:
            work += stages.sparse_layer(forward, method, call.beside, call.beside_carried)
            work.append(stages.difference(forward))
        return work

    def _step(self, calls: tuple[tuple[Call, int], ...], stock: bool = False) -> Timed:
        whole, machine, devices = self.plan.forward, self.machine, self.plan.devices
        work = stages.around_attention(sharing.outside(whole, devices))
        work += [] if stock else [stages.once(whole)]
        work += [stage.times(whole.layers) for stage in sharing.exchange(whole, devices)]
        for call, count in calls:
            work += [stage.times(count) for stage in self.attention(call)]
        return timed(work, machine).times(self.plan.branches)


def predict(plan: Plan, machine: Machine, crossover: float = 1.0) -> Prediction:
    """crossover: density above which this machine's calls are dense, if that was measured."""
    config, layers = plan.config, plan.forward.layers
    if isinstance(config.kernel.crossover, float):
        crossover = config.kernel.crossover
    auto = requested(config, "auto") == "auto"
    found = [Counter[Call]() for _ in range(plan.steps)]
    for layer in range(layers):
        densities: list[float | None] = []
        for step in range(plan.steps):
            context = StepContext(step, plan.steps, layer, layers)
            density, reason = scheduled(config, plan.forward.grid, context)
            dense = reason or (auto and not_faster(config, density, crossover))
            densities.append(None if dense else density)
        for calls, call in zip(found, keeping.calls(config, densities), strict=True):
            calls[call] += 1
    return Prediction(plan, machine, crossover, tuple(found))


def _dense(calls: Mapping[Call, int]) -> bool:
    """Whether all layers of a step are."""
    return all(call.density is None for call in calls)


def steady(
    forward: Forward, config: SparseConfig, how: Method, density: float, steps: int
) -> list[Stage]:
    """A sparse layer in the mean of so many sparse steps of a run."""
    return [
        stage.times(share)
        for carried, share in keeping.steady(config, steps)
        for stage in stages.sparse_layer(forward, how, density, carried)
    ]


def method(forward: Forward, config: SparseConfig, machine: Machine) -> Method:
    """What sparse calls of a config do on a machine."""
    name = GPU_EXECUTOR if machine.is_gpu else "cpu"
    executor: Executor = registry.executor(name)
    block_q = executor.query_block(form(forward, config, machine))
    layout, first_order = config.layout, config.compensation.first_order
    products = getattr(config.estimator, "products", None)
    return Method(
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
        rest_spread=config.compensation.spread,
        refresh=-(-config.orders_last // config.keep.tail),  # of calls that make a plan
        axes=layout.axes if layout.per_head else 0,
        order=layout if hasattr(layout, "making") else None,
        of_clusters=getattr(config.estimator, "of_clusters", False),
        keep=config.keep,
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
