"""Exact engines: lists of full key tiles in, (O, LSE) of these tiles out.

An engine is a file here with one `ENGINE`. The lists are ascending and name every row of a tile, so
it knows neither masks nor biases nor levels: short blocks, centroids and the first-order term are
added to its (O, LSE) by `vidsparse.kernels.gpu.rest_merge`, whatever the engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vidsparse import registry
from vidsparse.kernels.gpu.operands import QueryRows

PREFERRED = ("fa4", "triton")
"""Engines that "auto" asks, in the order of whole calls in kernels/results/gpu_presets.csv."""


@dataclass(frozen=True)
class ExactLists:
    """entry int32 [B, H, nq, W], ascending in each list; count int32 [B, H, nq]: entries in use.

    W is at least count + 1: the entry after the last may be loaded, and is never used.
    """

    entry: Tensor
    count: Tensor


@dataclass(frozen=True)
class Question:
    """What an engine is asked about; block_q, block_k: tokens of a query and of a key block."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_q: int
    block_k: int
    form: str = "auto"


class ExactEngine(ABC):
    """name: what users write in `kernel.engine`; about: one line.

    addresses: what an entry is. "token": the first row of a tile of `tile` keys, anywhere; queries
    and results are read and written by `QueryRows`, order and all. "tile": the number of a tile,
    which begins at row number * tile, as query block i begins at row i * block_q.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    addresses: ClassVar[Literal["token", "tile"]] = "tile"

    @abstractmethod
    def available(self, device: torch.device) -> str | None:
        """Why nothing runs on a device, in one line with the cure; None if it can.

        Never raises, also where what it imports is missing or broken.
        """

    @abstractmethod
    def refuses(self, asked: Question) -> str | None:
        """Why such calls are not executed, in one line with the cure; None if they are."""

    def tile(self, asked: Question) -> int:
        """Keys that an entry stands for, a divisor of block_k."""
        return asked.block_k

    @abstractmethod
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
        """Write out and lse: attention of the queries of each block over the tiles of its list.

        q, out [B, H, Sq, D], k, v [B, H, Sk, D'] with D' >= D, stride 1 in the last axis; columns
        of k past D are zero. lse float32 [B, H, Sq], contiguous, natural log; rows without a tile
        get 0 and -inf. Never another computation than this one: what it cannot do it refuses.
        """


def chosen(name: str, asked: Question) -> ExactEngine:
    """The engine of that name; "auto": the first of `PREFERRED` that takes such calls.

    Raises ValueError with the reason if it, or none of them, does.
    """
    reasons = []
    for each in PREFERRED if name == "auto" else (name,):
        one: ExactEngine = registry.engine(each)
        why = one.available(asked.device) or one.refuses(asked)
        if why is None:
            return one
        reasons.append(f"kernel.engine={each!r}: {why}")
    raise ValueError("; ".join(reasons))
