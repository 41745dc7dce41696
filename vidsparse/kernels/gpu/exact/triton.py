"""The Triton engine: forms of one kernel, tilings for each GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse.forms import FORMS, auto
from vidsparse.kernels.gpu import support
from vidsparse.kernels.gpu.exact import ExactEngine, ExactLists, Question
from vidsparse.kernels.gpu.operands import QueryRows, Tiling, padded_width
from vidsparse.kernels.gpu.operator import operator

POINTER = {
    (8, 64): Tiling(128, 64, 8, 3),
    (8, 128): Tiling(128, 64, 8, 3),
    (9, 64): Tiling(128, 64, 8, 3),
    (9, 128): Tiling(128, 64, 8, 3),
    (10, 64): Tiling(128, 64, 8, 3),
    (10, 128): Tiling(128, 64, 8, 3),
    (12, 64): Tiling(128, 64, 8, 3),
    (12, 128): Tiling(128, 64, 8, 3),
}
"""Major compute capability and padded head dim -> for bfloat16 and float16."""

FLOAT32 = Tiling(32, 32, 8, 1)
"""For float32, whose exact products use no tensor cores and many registers."""

PORTABLE = Tiling(64, 32, 4, 3)
"""Fits a capability that the tables do not know."""

TMA = {
    (9, 64): Tiling(128, 64, 8, 3, 128),
    (9, 128): Tiling(128, 64, 8, 3),
    (10, 64): Tiling(128, 64, 8, 3),
    (10, 128): Tiling(128, 64, 8, 3),
}
"""For blocks of 128 queries. With a limit of 128 registers two programs share a multiprocessor."""

TMA_64 = {9: Tiling(64, 64, 4, 2), 10: Tiling(64, 64, 4, 3)}
"""For blocks of 64 queries."""

DTYPES = (torch.bfloat16, torch.float16)
"""Of the form through TMA."""


class Engine(ExactEngine):
    """Kernels of ours."""

    name = "triton"
    about = "Triton kernels, by pointer or through TMA"
    addresses: ClassVar = "token"

    def available(self, device: torch.device) -> str | None:
        return support.refusal(device)

    def refuses(self, asked: Question) -> str | None:
        try:
            tiling(asked)
        except ValueError as error:
            return str(error)
        return None

    def tile(self, asked: Question) -> int:
        return tiling(asked).block_n

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lists: ExactLists,
        rows: QueryRows,
        out: Tensor,
        lse: Tensor,
        asked: Question,
    ) -> None:
        exact_tiles(q, k, v, lists, rows, out, lse, tiling(asked), form_of(asked))


def form_of(asked: Question) -> str:
    """The form that runs."""
    return _form(asked, support.capability(asked.device))


@lru_cache(maxsize=64)
def _form(asked: Question, capability: tuple[int, int]) -> str:
    if asked.form != "auto":
        return asked.form
    *before, last = auto(capability[0])
    for form in before:
        try:
            _tiling(replace(asked, form=form), capability)
        except ValueError:
            continue
        return form
    return last


def tiling(asked: Question) -> Tiling:
    """Tiling of the form that is asked for.

    An unknown capability takes the portable one, by pointer alone.

    Raises ValueError for what the form cannot do.
    """
    return _tiling(asked, support.capability(asked.device))


@lru_cache(maxsize=64)
def _tiling(asked: Question, capability: tuple[int, int]) -> Tiling:
    padded, form = padded_width(asked.head_dim), _form(asked, capability)
    if form == "pointer":
        return _pointer(asked.dtype, capability, padded).within(asked.block_q, asked.block_k)
    if form not in FORMS:
        raise ValueError(f"form {form!r}: expected one of {', '.join(FORMS)}")
    if asked.dtype not in DTYPES:
        raise ValueError(
            f"{asked.dtype}: form {form!r} computes in bfloat16 or float16; use form 'pointer'"
        )
    if (capability[0], padded) not in TMA:
        raise ValueError(
            f"{support.named(capability)}: form {form!r} was built for NVIDIA's 9.x and 10.x; "
            "use form 'pointer'"
        )
    if asked.head_dim * asked.dtype.itemsize % 16:
        raise ValueError(
            f"head dim {asked.head_dim}: form {form!r} needs a multiple of 8; use form 'pointer'"
        )
    if asked.block_q < 64:
        raise ValueError(
            f"blocks of {asked.block_q} queries: form 'tma' needs at least 64; use 'pointer'"
        )
    shape = TMA_64[capability[0]] if asked.block_q < 128 else TMA[capability[0], padded]
    return shape.within(asked.block_q, asked.block_k)


def _pointer(dtype: torch.dtype, capability: tuple[int, int], padded: int) -> Tiling:
    if dtype == torch.float32:
        return FLOAT32
    return POINTER.get((capability[0], padded), PORTABLE)


def exact_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: ExactLists,
    rows: QueryRows,
    out: Tensor,
    lse: Tensor,
    shape: Tiling,
    form: str,
) -> None:
    """Run a form in a tiling; arguments as for `ExactEngine.run`."""
    exact_tiles_operator(
        *(q, k, v, lists.entry, lists.count),
        *(rows.start, rows.count, rows.size, rows.order, out, lse),
        *(shape.block_m, shape.block_n, shape.warps, shape.stages, shape.registers, form),
    )


@operator("exact_tiles", mutates=("out", "lse"))
def exact_tiles_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    entry: Tensor,
    count: Tensor,
    q_start: Tensor,
    q_count: Tensor,
    block_q: int,
    order: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block_m: int,
    block_n: int,
    warps: int,
    stages: int,
    registers: int | None,
    form: str,
) -> None:
    """`exact_tiles` with the fields of its arguments one by one."""
    from vidsparse.kernels.gpu import exact_hopper, exact_pointer  # need triton

    lists, rows = ExactLists(entry, count), QueryRows(q_start, q_count, block_q, order)
    operands = q, k, v, lists, rows, out, lse
    shape = Tiling(block_m, block_n, warps, stages, registers)
    if form == "pointer":
        exact_pointer.exact_tiles(*operands, shape)
    else:
        exact_hopper.exact_tiles(*operands, shape)


ENGINE = Engine()
