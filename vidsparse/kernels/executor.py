"""What an executor is: it turns a BlockPlan into (O, LSE), and states what the house asks about it.

An executor is a file `vidsparse/kernels/<name>.py`, or the `executor.py` of a folder there, with
one `EXECUTOR`; `vidsparse.registry.executors` finds it. What is chosen for a call, by name or by
`impl: auto`, follows from these facts alone (`vidsparse.decision`), and so does what `vidsparse
doctor` and the run report say of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from vidsparse import registry
from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.plan import BlockPlan, FirstOrder

if TYPE_CHECKING:  # with it OmegaConf, which the kernels do without
    from vidsparse.config import Kernel, SparseConfig

LONG_SEQUENCE = 16_384
"""Tokens from which a query block of 128 is no large piece of a sequence."""


class Trial(Protocol):
    """A whole sparse call by the named executor: q, k, v [1, S, H, D] of a grid, at a density.

    fresh: it makes all that later steps of a run take over; else it takes that from the last fresh
    one.
    """

    def __call__(
        self,
        name: str,
        block_q: int,
        /,
        *qkv: Tensor,
        grid: TokenGrid,
        density: float,
        fresh: bool,
    ) -> object: ...


@dataclass(frozen=True)
class Form:
    """What is known of a call before anything is computed.

    config, grid, device: of the call. dtype, head_dim, heads (times batch): of q; None: not known
    yet. hoisted: the tokens already stand in layout order. trial: makes calls of this config, for
    timing them where that has not been done; None: nothing may be timed.
    """

    config: SparseConfig
    grid: TokenGrid
    device: torch.device
    dtype: torch.dtype | None = None
    head_dim: int | None = None
    heads: int | None = None
    hoisted: bool = False
    trial: Trial | None = None


@dataclass(frozen=True)
class Refusal:
    """Why an executor does not take a call, in one line with the cure.

    code: of `vidsparse.reasons.REASONS`, if such a call is dense where nobody asked for the
    executor; None: the settings are at fault, which no other call would mend.
    """

    why: str
    code: str | None = None


@dataclass(frozen=True)
class KeySummary:
    """Of the key blocks of a call, from one read of keys and values before the estimate.

    means: float32 [B, H, nk, D], of the keys. kept: what else the executor wants back.
    """

    means: Tensor
    kept: Any


@dataclass(frozen=True)
class Executes:
    """What an executor executes of a plan, beside levels, the centroid of the rest, and its cuts.

    first_orders: of `BlockPlan.first_order`. rest_bias: whether it takes one. head_orders: whether
    it takes `order_q` and `order_k`. blend: whether it does that itself.
    """

    first_orders: tuple[FirstOrder, ...] = ("none", "global")
    rest_bias: bool = False
    head_orders: bool = False
    blend: bool = False

    def lacks(self, plan: BlockPlan) -> str | None:
        """The first of a plan's fields that is not among these, None if all are."""
        ordered = plan.order_q is not None or plan.order_k is not None
        if plan.first_order not in self.first_orders:
            return f"plan.first_order={plan.first_order!r}"
        if plan.rest_bias is not None and not self.rest_bias:
            return "plan.rest_bias"
        if plan.blend is not None and not self.blend:
            return "plan.blend"
        return "plan.order_q and order_k" if ordered and not self.head_orders else None


@dataclass(frozen=True)
class Timing:
    """Whole calls of one length, timed. heads: of the calls. dense: seconds. sparse: density ->
    seconds. noise: standard error, as a share of the dense seconds."""

    tokens: int
    heads: int
    dense: float
    sparse: Mapping[float, float]
    noise: float


class Executor(ABC):
    """Facts with defaults; `execute` has none.

    name: what users write in `kernel.impl`. about: one line. preferred: device type -> place in the
    order in which `impl: auto` asks there, the lowest first; a device that is not named: only when
    asked for by name. takes_order: whether `execute` reads and writes by a token order of all
    heads. takes: key of the config -> its values that this executor knows; a key that no executor
    names is none of its business. executes: which plans.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    preferred: ClassVar[Mapping[str, int]] = {}
    takes_order: ClassVar[bool] = False
    takes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "qk": ("native",),
        "form": ("auto", "pointer"),
        "engine": ("auto",),
    }
    executes: ClassVar[Executes] = Executes()

    def available(self, device: torch.device) -> str | None:
        """Why nothing runs on a device, in one line with the cure; None if it can."""
        return None

    def remark(self, device: torch.device) -> str | None:
        """What users are to know before they rely on it on an available device; None: nothing."""
        return None

    def refuses(self, form: Form) -> Refusal | None:
        """Why a call is not taken, None if it is. Asked of available ones, before any call.

        What only a plan shows is refused by `execute`, before any kernel runs.
        """
        for key, allowed in self.takes.items():
            value = getattr(form.config.kernel, key)
            if value not in allowed:
                others = [e.name for e in registry.executors().values() if value in e.takes[key]]
                return Refusal(
                    f"kernel.{key}={value!r}: impl {self.name!r} takes {' or '.join(allowed)}; "
                    f"of impl {' and '.join(others)} alone"
                )
        order = form.config.compensation.first_order
        if order not in self.executes.first_orders:
            known = " or ".join(self.executes.first_orders)
            able = cure(form.device, lambda executes: order in executes.first_orders)
            return Refusal(
                f"compensation.scope={order!r}: impl {self.name!r} executes {known}; {able}"
            )
        if form.config.layout.per_head and not self.executes.head_orders:
            able = cure(form.device, lambda executes: executes.head_orders)
            return Refusal(
                f"layout.name={form.config.layout.name!r}: impl {self.name!r} has one order for "
                f"all heads; {able}"
            )
        return None

    def query_block(self, form: Form) -> int:
        """Tokens per query block of a call; `kernel.block_q: auto` is this one's choice."""
        given = form.config.kernel.block_q
        if isinstance(given, int):
            return given
        return 64 if form.grid.tokens < LONG_SEQUENCE else 128

    def crossover(self, form: Form) -> float:
        """Density above which dense attention is as fast, in 0 .. 1; 0: always.

        Measured where it can be, else a guess.
        """
        return 1.0

    def timings(self, form: Form) -> tuple[Timing, ...]:
        """What calls like a form were measured to take, at the lengths next to its own; () where
        nothing is measured. The crossover follows from the same figures."""
        return ()

    def route(self, form: Form) -> str:
        """How calls of a form are computed here, with the figures behind it; "": one way only."""
        return ""

    def figures(self) -> dict[str, Any]:
        """What was measured on this machine, ready for JSON; "kept": where, or why it is not."""
        return {}

    def forget(self) -> None:  # noqa: B027  (most measure nothing)
        """Measure again what was measured on this machine."""

    def summarise(
        self, k: Tensor, v: Tensor, blocks: Blocks, config: SparseConfig, order: Tensor | None
    ) -> KeySummary | None:
        """What `execute` will need of k and v [B, H, S, D] and an estimate can use; None: nothing.

        order: as for `execute`, which is given the summary as `summary` if there is one.
        """
        return None

    @abstractmethod
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
        """Attention by a plan; shapes and formulas in `vidsparse.kernels`. No wait for a device.

        order: int64 [S], given to executors with `takes_order` alone, for plans without orders of
        their own: position t of the plan is token order[t] of q, k, v and of the results.

        Raises ValueError for plans that are not among those it `executes`, before any kernel runs.
        """


def cure(device: torch.device, able: Callable[[Executes], bool]) -> str:
    """The cure: which executors of a device execute what another one refuses."""
    every = registry.executors().values()
    return "use " + " or ".join(
        f"impl={e.name!r}" for e in every if e.available(device) is None and able(e.executes)
    )
