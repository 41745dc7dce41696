"""The ways to run exact tiles that are compared: engines, and the forms of the Triton engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from gpu_cases import SIZES, full_blocks
from gpu_results import Machine
from torch import Tensor

from vidsparse import forms, registry
from vidsparse.kernels.gpu import engine, exact_engine, levels_engine, levels_forward, quant
from vidsparse.kernels.gpu.exact import ExactLists, Question, chosen, triton
from vidsparse.kernels.gpu.exact_lists import pack_exact
from vidsparse.kernels.gpu.operands import Keys, QueryRows, Scales, TileLists, Tiling
from vidsparse.plan import BlockPlan

if TYPE_CHECKING:
    from vidsparse.config import SparseConfig


@dataclass(frozen=True)
class Way:
    """name: such as "triton-tma" or "cudnn"; engine, form: what `kernel` of a config takes."""

    name: str
    engine: str
    form: str

    @property
    def settings(self) -> dict[str, str]:
        """Of `engine.execute`."""
        return {"engine": self.engine, "form": self.form}

    def asked(
        self, device: torch.device, dtype: torch.dtype, depth: int, sizes: tuple[int, int]
    ) -> Question:
        return Question(device, dtype, depth, *sizes, self.form)

    def refusal(
        self,
        machine: Machine,
        dtype: torch.dtype = torch.bfloat16,
        depth: int = 128,
        sizes: tuple[int, int] = SIZES[0],
    ) -> str | None:
        """Why it does not run such calls here, None if it does."""
        one, device = registry.engine(self.engine), machine.device
        why: str | None = one.available(device) or one.refuses(
            self.asked(device, dtype, depth, sizes)
        )
        return why

    def sizes(self, machine: Machine, depth: int = 128) -> list[tuple[int, int]]:
        """Those of SIZES that it takes, in bfloat16."""
        return [s for s in SIZES if self.refusal(machine, depth=depth, sizes=s) is None]

    def absence(self, machine: Machine) -> str | None:
        """Why it runs nothing here: the reason for the presets' blocks."""
        return None if self.sizes(machine) else self.refusal(machine)

    def runs(self, machine: Machine) -> bool:
        """Whether it runs something here; if to ask it fails, its first check says so."""
        try:
            return self.absence(machine) is None
        except Exception:
            return False


def way(name: str) -> Way:
    """By a name of `gpu_start.ways`."""
    engine_name, _, form = name.partition("-")
    return Way(name, engine_name, form or "auto")


def here(machine: Machine) -> list[Way]:
    """Those that run something on this machine, as far as it was asked for."""
    return [one for one in map(way, machine.ways) if one.runs(machine)]


def sound(machine: Machine) -> list[Way]:
    """Those of them that have killed no process."""
    return [one for one in here(machine) if one.name not in machine.broken]


def runs(config: SparseConfig, device: torch.device, depth: int) -> str:
    """The way that calls of a config go, in bfloat16 and query blocks of 128."""
    if max(config.selector.levels) > 0:
        return "triton-levels"
    kernel = config.kernel
    block_q = kernel.block_q if isinstance(kernel.block_q, int) else SIZES[0][0]
    asked = Question(device, torch.bfloat16, depth, block_q, kernel.block_k, kernel.form)
    try:
        one = chosen(kernel.engine, asked)
    except ValueError:  # the call will say why
        return "nothing" if kernel.engine == "auto" else kernel.engine
    return forms.way(triton.form_of(asked)) if one.name == "triton" else one.name


@dataclass(frozen=True)
class Exact:
    """The full blocks of a plan of level 0, ready for an engine; outputs start as NaN.

    plan: what it computes. tiling: of the Triton engine, None: the one that is shipped.
    """

    way: Way
    q: Tensor
    k: Tensor
    v: Tensor
    plan: BlockPlan
    tiling: Tiling | None
    out: Tensor
    lse: Tensor
    lists: ExactLists | None = field(default=None)

    def run(self) -> Tensor:
        """From the plan to (out, lse); with a tiling from packed lists on. Returns out."""
        rows = engine.query_rows(self.plan.q_blocks, self.q.device)
        operands = self.q, self.k, self.v
        if self.tiling is None:
            sizes = self.plan.q_blocks.size, self.plan.k_blocks.size
            asked = self.way.asked(self.q.device, self.q.dtype, self.q.shape[3], sizes)
            one = registry.engine(self.way.engine)
            exact_engine.run(one, asked, *operands, self.plan, rows, None, self.out, self.lse)
        else:
            outputs = rows, self.out, self.lse, self.tiling, self.way.form
            triton.exact_tiles(*operands, self.lists, *outputs)
        return self.out


def exact(
    way: Way, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, tiling: Tiling | None = None
) -> Exact:
    """Of the listed full blocks of a plan."""
    plan, lists = full_blocks(plan), None
    if tiling is not None:
        place = exact_engine.key_place(plan.k_blocks, tiling.block_n, "token", False, q.device)
        lists = ExactLists(
            *pack_exact(plan.levels, place.entry, place.pieces, place.step, place.width)
        )
    return Exact(way, q, k, v, plan, tiling, *nan_outputs(q), lists)


def nan_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """out like q and an LSE, full of NaN."""
    out = torch.full_like(q.transpose(1, 2), float("nan")).transpose(1, 2)
    return out, torch.full(q.shape[:3], float("nan"), device=q.device)


@dataclass(frozen=True)
class Levels:
    """A plan ready for `levels_forward`, and its outputs."""

    q: Tensor
    keys: Keys
    lists: TileLists
    rows: QueryRows
    shape: Tiling
    out: Tensor
    lse: Tensor
    scales: Scales | None

    def run(self) -> Tensor:
        operands: Any = self.q, self.keys, self.lists, self.rows, self.shape, self.out, self.lse
        levels_forward.levels_forward(*operands, self.scales)
        return self.out


def levels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    shape: Tiling | None = None,
    int8: bool = False,
) -> Levels:
    """Of the listed blocks of a plan. shape None: the tiling that is shipped."""
    shape = shape or levels_engine.tiling_for(q, plan)
    layout = levels_engine.layout_for(plan, shape.block_n, q.device)
    keys = levels_engine.fill(k, v, layout)
    lists = levels_engine.lists_for(plan, layout, shape.block_n)
    rows, outputs, scales = engine.query_rows(plan.q_blocks, q.device), nan_outputs(q), None
    if int8:
        q, keys, scales = quant.int8_operands(q, keys, rows, shape)
    return Levels(q, keys, lists, rows, shape, *outputs, scales)
