"""What a forward computes, by stage: dense, or sparse at a density."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from vidsparse.costs.forward import Forward

Unit = Literal["matmul", "dense", "sparse"]
"""Which rate its FLOPs run at: of linear layers, of dense attention, of listed tiles."""

LINEAR = "projections and MLP"
CROSS = "cross-attention"
ELEMENTWISE = "elementwise"
DENSE = "self-attention, dense"
PERMUTATION = "permutation"
ESTIMATOR = "estimator"
SELECTOR = "selector and lists"
EXACT = "exact tiles"
REST = "rest"

AROUND = (PERMUTATION, ESTIMATOR, SELECTOR, REST)
"""Stages of a sparse call whose cost does not depend on its density."""

TOUCHED = 340
"""Bytes that norms, modulation, rotary embedding, activation and residuals read and write, per row,
channel and layer: counted over the operations of a block of Wan in diffusers 0.42, in bfloat16 and
in float32, which differ by 3 %, as most of them compute in float32."""

OPERATIONS = 80
"""Such operations in a layer, of the same block."""


@dataclass(frozen=True)
class Stage:
    """Work of one stage. exps: exponentials. launches: operations that the host starts."""

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    exps: float = 0.0
    launches: float = 0.0
    unit: Unit = "matmul"

    def times(self, count: float) -> Stage:
        """So many of it."""
        return replace(
            self,
            flops=self.flops * count,
            bytes=self.bytes * count,
            exps=self.exps * count,
            launches=self.launches * count,
        )


@dataclass(frozen=True)
class Method:
    """What the cost of a sparse call depends on beside its density.

    block_q, block_k: tokens. centroids: blocks that are not listed give theirs. first_order: they
    give the first-order term, too.
    """

    block_q: int
    block_k: int
    centroids: bool = True
    first_order: bool = False


def around_attention(forward: Forward) -> list[Stage]:
    """All of a forward but its self-attention."""
    size = forward.bytes
    moved = sum(
        one.count * size * (one.rows * (one.inputs + one.outputs) + one.inputs * one.outputs)
        for one in forward.linears
    )
    return [
        Stage(
            LINEAR,
            flops=sum(one.flops for one in forward.linears),
            bytes=moved,
            launches=sum(one.count for one in forward.linears),
        ),
        Stage(
            CROSS,
            flops=4 * forward.cross * forward.width,
            bytes=2 * forward.layers * forward.tokens * forward.width * size * bool(forward.cross),
            exps=forward.cross * forward.heads,
            launches=forward.layers * bool(forward.cross),
            unit="dense",
        ),
        Stage(
            ELEMENTWISE,
            bytes=TOUCHED * forward.layers * forward.tokens * forward.width,
            launches=OPERATIONS * forward.layers,
        ),
    ]


def dense_layer(forward: Forward) -> list[Stage]:
    """Self-attention of one layer, dense."""
    pairs = float(forward.tokens) ** 2
    return [
        Stage(
            DENSE,
            flops=4 * pairs * forward.width,
            bytes=4 * forward.tokens * forward.width * forward.bytes,
            exps=pairs * forward.heads,
            launches=1,
            unit="dense",
        )
    ]


def sparse_layer(forward: Forward, method: Method, density: float) -> list[Stage]:
    """Self-attention of one layer at a density, every stage of it.

    Bytes and launches are those of the kernels of the executor for GPUs, which reads keys and
    values where they stand (`tests/test_fake_gpu.py` counts its launches).
    """
    tokens, width, heads = forward.tokens, forward.width, forward.heads
    passed = tokens * width * forward.bytes  # one reading of queries, keys, values or the output
    rows, columns = -(-tokens // method.block_q), -(-tokens // method.block_k)
    cells = float(heads) * rows * columns
    pairs = density * float(tokens) ** 2
    stages = [
        Stage(
            PERMUTATION,
            bytes=0 if forward.hoisted else 4 * passed,  # copies of keys and values
            launches=0 if forward.hoisted else 2,
        ),
        Stage(
            ESTIMATOR,
            flops=2.0 * rows * columns * width,
            bytes=(3 if method.centroids else 2) * passed + 4 * cells,  # values for their means
            launches=4 if method.first_order else 3,
        ),
        Stage(SELECTOR, bytes=(4 + 1 + 2 + 4 * density) * cells, launches=4),
        Stage(
            EXACT,
            flops=4 * pairs * width,
            bytes=4 * passed,
            exps=pairs * heads,
            launches=1,
            unit="sparse",
        ),
    ]
    if method.centroids:
        means = float(tokens) * columns
        state = 4.0 * tokens * width * forward.head_dim if method.first_order else 0.0
        stages.append(
            Stage(
                REST,
                flops=4 * means * width + state,
                bytes=3 * passed,  # the queries, and the output read and written again
                exps=means * heads,
                launches=1,
                unit="sparse",
            )
        )
    return stages


def once(forward: Forward) -> Stage:
    """The permutation of a forward that changes the order of its tokens once."""
    moved = 4 * forward.tokens * forward.width * forward.bytes * forward.hoisted
    return Stage(PERMUTATION, bytes=moved, launches=4 * forward.hoisted)
