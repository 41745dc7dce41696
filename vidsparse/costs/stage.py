"""Work of one stage of a forward, and what it depends on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vidsparse.config import Keep

Unit = Literal["matmul", "dense", "sparse"]
"""Which rate its FLOPs run at: of linear layers, of dense attention, of listed tiles."""

Tail = Literal["", "made", "merged"]
"""What a call does about a tail."""

LINEAR = "projections and MLP"
CROSS = "cross-attention"
ELEMENTWISE = "elementwise"
DENSE = "self-attention, dense"
PERMUTATION = "permutation"
ORDER = "orders of heads"
ESTIMATOR = "estimator"
SELECTOR = "selector and lists"
EXACT = "exact tiles"
REST = "rest"
KEPT = "residual or tail"
EXCHANGE = "exchange between devices"

AROUND = (PERMUTATION, ORDER, ESTIMATOR, SELECTOR, REST)
"""Stages of a sparse call whose cost does not depend on its density."""


@dataclass(frozen=True)
class Stage:
    """Work of one stage. exps: exponentials. launches: operations that the host starts. sent: bytes
    to other devices."""

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    exps: float = 0.0
    launches: float = 0.0
    unit: Unit = "matmul"
    sent: float = 0.0

    def times(self, count: float) -> Stage:
        """So many of it."""
        return replace(
            self,
            flops=self.flops * count,
            bytes=self.bytes * count,
            exps=self.exps * count,
            launches=self.launches * count,
            sent=self.sent * count,
        )


@dataclass(frozen=True)
class Method:
    """What the cost of a sparse call depends on beside its density.

    block_q, block_k: tokens. centroids: blocks that are not listed give theirs. first_order: they
    give the first-order term, too, and it is made for each query block if row_moments. spread: the
    variance inside blocks is drafted. reads_tokens: the draft is of every key and value. products:
    which share of the pairs of all queries and keys it scores, and numbers in each of these
    products, by head dim; one_launch: none of them reaches memory. blend: what is left out gives
    something of its own to each row of the output. rest_spread: what is left out needs the
    spread in every call, also where its blocks are those of an earlier step. refresh: steps for
    which heads keep an order of their own, 0 if they have none; axes: what it compares; order: the
    settings of a layout that says itself what making them costs. of_clusters: scores are of its
    clusters. keep: what calls carry from step to step.
    """

    block_q: int
    block_k: int
    centroids: bool = True
    first_order: bool = False
    row_moments: bool = False
    spread: bool = False
    reads_tokens: bool = False
    products: tuple[float, float] = (0.0, 1.0)
    one_launch: bool = False
    blend: bool = False
    rest_spread: bool = False
    refresh: int = 0
    axes: int = 0
    order: Any = None
    of_clusters: bool = False
    keep: Keep = field(default_factory=Keep)


@dataclass(frozen=True)
class Carried:
    """What a sparse call takes over from earlier steps (`vidsparse.config.Keep`).

    first: no sparse call of the layer was before it. chooses: it drafts and selects its blocks, and
    does not read those of an earlier step again. residual: it adds one. tail: it computes what its
    blocks leave out, too, and keeps that, "made"; or it merges what an earlier step has kept of it,
    "merged"; "": neither.
    """

    chooses: bool = True
    residual: bool = False
    tail: Tail = ""
    first: bool = False


ALONE = Carried()
"""Of a call that keeps nothing."""
