"""What a call does, before anything is computed: sparse or dense, why, and on which executor."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from vidsparse import registry
from vidsparse.config import IMPLEMENTATIONS, SparseConfig, require
from vidsparse.kernels import cpu, cpu_crossover, gpu
from vidsparse.plan import BlockPlan, StepContext, TokenGrid


@dataclass(frozen=True)
class Decision:
    """density: what the call may cost, in (0, 1]. reason: of `vidsparse.reasons`, None if sparse.

    executor: of a sparse call, reference | cpu | triton. crossover: density above which the call is
    better dense; 1.0 if nobody asked.
    """

    density: float
    reason: str | None
    executor: str = ""
    crossover: float = 1.0


def decide(
    config: SparseConfig,
    grid: TokenGrid,
    context: StepContext | None = None,
    *,
    device: torch.device,
    impl: str = "auto",
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    heads: int | None = None,
    trial: cpu_crossover.Trial | None = None,
    hoisted: bool = False,
) -> Decision:
    """Whether a call is sparse, before anything is computed.

    impl as in `vidsparse.sparse_attention`; dtype, head_dim and heads (times batch) of q, None if
    not known yet. trial: makes whole sparse calls of this config on a CPU, hoisted or not, for
    timing them where that has not been done; without it the crossover is a guess.

    Raises ValueError for settings that no sparse call of this kind could be executed with, in dense
    steps and layers too: what is refused at all is refused at the first call.
    """
    unable, name = None, ""
    if requested(config, impl) == "auto" and device.type != "cpu":
        unable = gpu.reason(device, dtype, head_dim)
    if unable is None:
        name = executor(config, device, impl)
        if name == "triton":
            _check_triton(config, grid, device, dtype, head_dim)
    density, reason = registry.method("schedule", config.schedule.name).density_at(
        context, config.schedule
    )
    if reason:
        return Decision(1.0, reason)
    if grid.tokens < config.schedule.min_tokens:
        return Decision(1.0, "too-short")
    if unable:
        return Decision(1.0, unable)
    if requested(config, impl) != "auto":
        return Decision(density, None, name)
    crossover = config.kernel.crossover
    if not isinstance(crossover, float):
        crossover = gpu.CROSSOVER_DENSITY
        if device.type == "cpu":
            crossover = _on_cpu(config, grid.tokens, dtype, head_dim, heads, trial, hoisted)
    if crossover <= 0 or (config.selector.spends_budget and density > crossover):
        return Decision(1.0, "not-faster", crossover=crossover)
    return Decision(density, None, name, crossover)


def check_config(
    config: SparseConfig,
    device: torch.device,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> None:
    """Raise the ValueError that the first call on a device would raise for its config.

    dtype, head_dim: of q; None: not known yet, what depends on them shows in the first call.
    """
    decide(config, TokenGrid(1, 1, 1), device=device, dtype=dtype, head_dim=head_dim)


def executor(config: SparseConfig, device: torch.device, impl: str = "auto") -> str:
    """Which of reference, cpu and triton executes sparse calls; impl as in `decide`.

    Raises ValueError if the one asked for cannot run on the device, or not with these settings.
    """
    name = requested(config, impl)
    if name == "auto":
        name = "cpu" if device.type == "cpu" else "triton"
    kernel, order = config.kernel, config.compensation.first_order
    if name == "triton" and (refusal := gpu.refusal(device)):
        raise ValueError(f"impl 'triton' on {device.type}: {refusal}; use impl auto")
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"impl 'cpu' on {device.type}: tensors must be on the CPU; use impl auto")
    if name != "triton" and kernel.qk != "native":
        raise ValueError(
            f"kernel.qk={kernel.qk!r}: impl {name!r} computes native products only; "
            "8-bit ones need the Triton engine on a GPU"
        )
    if name != "triton" and kernel.form not in ("auto", "pointer"):
        raise ValueError(
            f"kernel.form={kernel.form!r}: a form of the Triton kernel, not of impl {name!r}; "
            "use form auto"
        )
    if name != "reference" and order == "block":
        raise ValueError(
            f"compensation.scope='block': impl {name!r} executes 'global' only; "
            "use impl='reference'"
        )
    return name


def _check_triton(
    config: SparseConfig,
    grid: TokenGrid,
    device: torch.device,
    dtype: torch.dtype | None,
    head_dim: int | None,
) -> None:
    """Raise the ValueError of settings that no Triton kernel takes."""
    from vidsparse.kernels import triton_engine  # needs triton, which a CPU need not have

    sizes = config.kernel.query_block(grid.tokens), config.kernel.block_k
    known = dtype or torch.bfloat16, head_dim or 64
    triton_engine.check_settings(device, *known, sizes, config.kernel.form)


def too_dense(
    plan: BlockPlan, config: SparseConfig, crossover: float = cpu.CROSSOVER_DENSITY
) -> bool:
    """Whether a plan whose density the budget does not fix is too dense to gain; CPU only.

    On a GPU the answer would cost a wait.
    """
    fixed = config.selector.spends_budget and config.force.in_budget
    if fixed or plan.levels.device.type != "cpu":
        return False
    return float(plan.density.mean()) > crossover


def requested(config: SparseConfig, impl: str) -> str:
    """The implementation that is asked for: impl or, if that is "auto", the config's."""
    require(impl in IMPLEMENTATIONS, "impl", impl, ", ".join(IMPLEMENTATIONS))
    return config.kernel.impl if impl == "auto" else impl


def tried(config: SparseConfig, block_q: int, density: float) -> SparseConfig:
    """The config of a sparse call on a CPU that shows what a call of `config` costs at a density.

    A selector that follows the data more than a budget is replaced by one of which the density is
    known.
    """
    schedule = registry.method("schedule", "constant").Params("constant", density, 0)
    selector = config.selector
    if not selector.spends_budget:
        selector = registry.method("selector", "topk").Params("topk")
    kernel = replace(config.kernel, impl="cpu", block_q=block_q, qk="native")
    return replace(config, schedule=schedule, selector=selector, kernel=kernel)


def _on_cpu(
    config: SparseConfig,
    tokens: int,
    dtype: torch.dtype | None,
    head_dim: int | None,
    heads: int | None,
    trial: cpu_crossover.Trial | None,
    hoisted: bool,
) -> float:
    """The density above which dense attention is as fast on this CPU, measured where it can be.

    Calls that are shorter than any that is timed are sparse only where the user has lowered
    `schedule.min_tokens` for them, and stay so.
    """
    if tokens < cpu_crossover.LENGTHS[0] or not (dtype and head_dim and heads and trial):
        return cpu.CROSSOVER_DENSITY
    cost = _cost(config, config.kernel.query_block(tokens), hoisted)
    kind = cpu_crossover.kind(dtype, head_dim, heads, cost)
    return cpu_crossover.density(kind, tokens, trial)


@lru_cache(maxsize=64)
def _cost(config: SparseConfig, block_q: int, hoisted: bool) -> str:
    """What the time of a call on a CPU depends on beside its form, as JSON."""
    method = config.to_dict()
    kernel = {key: method["kernel"][key] for key in ("block_k", "cpu_matmul")}
    del method["about"], method["schedule"]
    method["kernel"] = {**kernel, "block_q": block_q}
    return json.dumps({**method, "hoisted": hoisted})
