"""What the house asks about the CPU executor."""

from __future__ import annotations

import json
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from vidsparse.config import Kernel, SparseConfig
from vidsparse.kernels import executor
from vidsparse.kernels.cpu import contest, crossover, engine, routes, store
from vidsparse.kernels.cpu.crossover import Kind, Trial
from vidsparse.kernels.executor import Form, Refusal, Timing
from vidsparse.plan import BlockPlan

CROSSOVER_DENSITY = 0.6
"""Above this density dense attention may be faster, for calls that `crossover` does not time.

Whole call, one thread, heads of 64, float32, 2,048 tokens, x dense at density 0.5 / 0.6 / 0.7:
1.9 / 1.6 / 1.5 on an AMD EPYC with AVX-512, 1.1 / 1.0 / 1.0 on one with AVX2.
"""


class Executor(executor.Executor):
    """In plain torch, on the threads of torch."""

    name = "cpu"
    about = "gathers what a plan lists, then two matrix products"
    preferred: ClassVar = {"cpu": 0}
    executes = engine.EXECUTES

    def available(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "tensors must be on the CPU"

    def refuses(self, form: Form) -> Refusal | None:
        if refusal := super().refuses(form):
            return refusal
        why = contest.refusal(form.config.kernel.cpu_route, form.dtype)
        return Refusal(why) if why else None

    def crossover(self, form: Form) -> float:
        """Measured on this machine, once for a kind of calls.

        Calls that are shorter than any that is timed are sparse only where the user has lowered
        `schedule.min_tokens` for them, and stay so.
        """
        if not _timed(form):
            return CROSSOVER_DENSITY
        kind, trial = self._kind(form)
        return crossover.density(kind, form.grid.tokens, trial)

    def timings(self, form: Form) -> tuple[Timing, ...]:
        """Of the lengths that the crossover is interpolated between."""
        if not _timed(form):
            return ()
        kind, trial = self._kind(form)
        near = crossover.near(kind, form.grid.tokens, trial)
        return tuple(
            Timing(
                length,
                crossover.heads(kind, length),
                found.dense,
                dict(zip(crossover.DENSITIES, found.sparse, strict=True)),
                found.noise,
            )
            for length, found in near.items()
        )

    def _kind(self, form: Form) -> tuple[Kind, Trial]:
        """What a call is timed as, and a sparse call of that kind."""
        assert form.dtype and form.head_dim and form.heads and form.trial, "known"
        block_q = self.query_block(form)
        route = contest.choose(form.dtype, form.head_dim, form.config.kernel.cpu_route)
        cost = _cost(form.config, block_q, form.hoisted, route.name)
        period = form.config.orders_last or 1
        kind = crossover.kind(form.dtype, form.head_dim, form.heads, cost, period)
        return kind, partial(form.trial, self.name, block_q)

    def query_block(self, form: Form) -> int:
        """Larger where torch's attention computes the rows, if it gains enough by that."""
        size, kernel = super().query_block(form), form.config.kernel
        if kernel.block_q != "auto" or not _known(form):
            return size
        assert form.dtype and form.head_dim, "known"
        return max(size, contest.block(form.dtype, form.head_dim, kernel.cpu_route))

    def route(self, form: Form) -> str:
        if not _known(form):
            return ""
        assert form.dtype and form.head_dim, "known"
        return contest.described(form.dtype, form.head_dim, form.config.kernel.cpu_route)

    def figures(self) -> dict[str, Any]:
        found = engine.engine_info()
        return {**found, "kept": found["problem"] or f"kept in {store.folder()}"}

    def forget(self) -> None:
        store.forget(disk=True)
        routes.forget()
        contest.forget()
        crossover.forget()

    def execute(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockPlan,
        *,
        kernel: Kernel,
        order: Tensor | None = None,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        assert order is None, "not among the facts"
        route = contest.choose(q.dtype, q.shape[3], kernel.cpu_route)
        return engine.execute(q, k, v, plan, return_lse=return_lse, route=route)


EXECUTOR = Executor()


def _known(form: Form) -> bool:
    """Whether all that is measured by is known of a call."""
    return bool(form.dtype and form.head_dim and form.heads and form.trial)


def _timed(form: Form) -> bool:
    """Whether a call is one of those that are timed."""
    return form.grid.tokens >= crossover.LENGTHS[0] and _known(form)


@lru_cache(maxsize=64)
def _cost(config: SparseConfig, block_q: int, hoisted: bool, route: str) -> str:
    """What the time of a call depends on beside its form, as JSON."""
    method = config.to_dict()
    block_k = method["kernel"]["block_k"]
    del method["about"], method["schedule"]
    method["kernel"] = {"block_q": block_q, "block_k": block_k, "route": route}
    return json.dumps({**method, "hoisted": hoisted})
