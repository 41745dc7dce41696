"""What a call does, before anything is computed: sparse or dense, why, and on which executor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vidsparse import registry
from vidsparse.config import Keep, SparseConfig, require
from vidsparse.geometry import pattern_fault
from vidsparse.grid import TokenGrid
from vidsparse.kernels.executor import Executor, Form, Trial
from vidsparse.plan import BlockPlan, StepContext


@dataclass(frozen=True)
class Choice:
    """What executes sparse calls of a form, and why.

    executor: its name; "" if there is none. passed: (name, why not) of those that `impl: auto`
    asked before it. code: of `vidsparse.reasons.REASONS`, why calls are dense if there is none.
    crossover: density above which dense is as fast; 1.0 if nobody asked. route: how it computes,
    with the figures behind it; "" if there is one way only, or nothing has been measured.
    """

    executor: str = ""
    passed: tuple[tuple[str, str], ...] = ()
    code: str | None = None
    crossover: float = 1.0
    route: str = ""

    def __str__(self) -> str:
        text = self.executor or "dense"
        text += f": {self.route}" if self.route else ""
        return "; ".join([text, *(f"not {name}: {why}" for name, why in self.passed)])


@dataclass(frozen=True)
class Decision:
    """density: what the call may cost, in (0, 1]. reason: of `vidsparse.reasons`, None if sparse.

    choice: empty where the schedule or the length decided. block_q: tokens per query block of a
    sparse call, else 0. by_head: density of each head where they differ, else None.
    """

    density: float
    reason: str | None
    choice: Choice = Choice()
    block_q: int = 0
    by_head: tuple[float, ...] | None = None


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
    trial: Trial | None = None,
    hoisted: bool = False,
) -> Decision:
    """Whether a call is sparse, before anything is computed.

    impl as in `vidsparse.sparse_attention`; dtype, head_dim and heads (times batch) of q, None if
    not known yet. trial: makes whole sparse calls of this config, hoisted or not, for timing them
    where that has not been done; without it the crossover is a guess.

    Raises ValueError for settings that no sparse call of this kind could be executed with, in dense
    steps and layers too: what is refused at all is refused at the first call.
    """
    form = Form(config, grid, device, dtype, head_dim, heads, hoisted, trial)
    choice = choose(form, impl)
    if choice.executor and heads is not None:
        _check_pattern(form, context, choice.executor)
    density, reason = scheduled(config, grid, context)
    if reason:
        return Decision(1.0, reason)
    if not choice.executor:
        return Decision(1.0, choice.code, choice)
    executor: Executor = registry.executor(choice.executor)
    block_q = executor.query_block(form)
    if route := executor.route(form):
        choice = replace(choice, route=route)
    if requested(config, impl) == "auto":
        given = config.kernel.crossover
        crossover = given if isinstance(given, float) else executor.crossover(form)
        choice = replace(choice, crossover=crossover)
        if not_faster(config, density, crossover):
            return Decision(1.0, "not-faster", choice)
    schedule = registry.method("schedule", config.schedule.name)
    of_heads = getattr(schedule, "head_densities", None)
    by_head = of_heads(context, config.schedule) if of_heads else None
    return Decision(density, None, choice, block_q, by_head)


def _check_pattern(form: Form, context: StepContext | None, executor: str) -> None:
    """Raise the ValueError of a pattern that costs more than the density that is asked for."""
    config = form.config
    if config.pattern.name == "none":
        return
    block_q = registry.executor(executor).query_block(form)
    phase = registry.method("pattern", config.pattern.name).phase(context, config.pattern)
    if fault := pattern_fault(config, form.grid, block_q, phase):
        raise ValueError(fault)


def scheduled(
    config: SparseConfig, grid: TokenGrid, context: StepContext | None = None
) -> tuple[float, str | None]:
    """What the schedule and the length say of a call: its density, and why it is dense or None."""
    schedule = registry.method("schedule", config.schedule.name)
    density, reason = schedule.density_at(context, config.schedule)
    if not reason and grid.tokens < config.schedule.min_tokens:
        reason = "too-short"
    return (1.0, reason) if reason else (density, None)


def not_faster(config: SparseConfig, density: float, crossover: float) -> bool:
    """Whether a call of which nobody has named the executor is dense because that is as fast."""
    return crossover <= 0 or (config.selector.spends_budget and density > crossover)


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


def choose(form: Form, impl: str = "auto") -> Choice:
    """Which executor runs sparse calls of a form; impl as in `decide`.

    One that is asked for by name runs, or is refused by a ValueError. Of all others the first in
    the order of the device that is available and takes the form; if there is none, calls are dense,
    or, where a setting is at fault, a ValueError says so.
    """
    name = requested(form.config, impl)
    if name != "auto":
        executor: Executor = registry.executor(name)
        if why := executor.available(form.device):
            raise ValueError(f"impl {name!r} on {form.device.type}: {why}; use impl auto")
        if refusal := executor.refuses(form):
            raise ValueError(refusal.why)
        return Choice(name)
    passed: list[tuple[str, str]] = []
    faults: list[str] = []
    codes: list[str] = []
    for executor in preferred(form.device):
        why = executor.available(form.device)
        refusal = None if why else executor.refuses(form)
        if refusal is None and why is None:
            return Choice(executor.name, tuple(passed))
        passed.append((executor.name, why or (refusal.why if refusal else "")))
        if refusal is not None:
            faults += [] if refusal.code else [refusal.why]
            codes += [refusal.code] if refusal.code else []
    if faults:
        raise ValueError(faults[0])
    return Choice("", tuple(passed), (codes or ["no-kernel"])[0])


def preferred(device: torch.device) -> list[Executor]:
    """The executors that `impl: auto` asks on a device, in this order."""
    able = [e for e in registry.executors().values() if device.type in e.preferred]
    return sorted(able, key=lambda executor: executor.preferred[device.type])


def too_dense(plan: BlockPlan, config: SparseConfig, crossover: float) -> bool:
    """Whether a plan whose density the budget does not fix is too dense to gain; CPU only.

    On a GPU the answer would cost a wait.
    """
    fixed = config.selector.spends_budget and config.force.in_budget
    if fixed or plan.levels.device.type != "cpu":
        return False
    return float(plan.density.mean()) > crossover


def requested(config: SparseConfig, impl: str) -> str:
    """The implementation that is asked for: impl or, if that is "auto", the config's."""
    allowed = registry.implementations()
    require(impl in allowed, "impl", impl, ", ".join(allowed))
    return config.kernel.impl if impl == "auto" else impl


def tried(config: SparseConfig, name: str, block_q: int, density: float) -> SparseConfig:
    """The config of a sparse call by an executor that shows what one of `config` costs.

    A selector that follows the data, or the grid, more than a budget is replaced by one of which
    the density is known.
    """
    schedule = registry.method("schedule", "constant").Params("constant", density, 0)
    kernel = replace(config.kernel, impl=name, block_q=block_q)
    layout = getattr(config.layout, "steady", config.layout)  # few calls are the first of a run
    config = replace(config, layout=layout, schedule=schedule, kernel=kernel, keep=Keep())
    if config.selector.spends_budget:
        return config
    parts = {"selector": "topk", "pattern": "none"}
    if config.estimator.name == "none":
        parts["estimator"] = "mean"
    made = {stage: registry.method(stage, n).Params() for stage, n in parts.items()}
    return replace(config, **made)
