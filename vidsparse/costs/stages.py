"""What a forward computes, by stage: dense, or sparse at a density."""

from __future__ import annotations

from math import ceil, log2

from vidsparse.costs import clusters
from vidsparse.costs.forward import Forward
from vidsparse.costs.stage import (
    ALONE,
    CROSS,
    DENSE,
    ELEMENTWISE,
    ESTIMATOR,
    EXACT,
    KEPT,
    LINEAR,
    ORDER,
    PERMUTATION,
    REST,
    SELECTOR,
    Carried,
    Method,
    Stage,
)
from vidsparse.draft import SCRATCH
from vidsparse.kernels.gpu.support import MOMENT_BYTES

TOUCHED = 340
"""Bytes that norms, modulation, rotary embedding, activation and residuals read and write, per row,
channel and layer: counted over the operations of a block of Wan in diffusers 0.42, in bfloat16 and
in float32, which differ by 3 %, as most of them compute in float32."""

OPERATIONS = 80
"""Such operations in a layer, of the same block."""


PARTS = 18
"""Operations of one pass of a bisection in torch: parts come in three lengths at most, each takes
six."""

AXES = 60
"""Operations of an order of heads beside its cuts: what axes follow from, the gate, the choice."""

TILE_ROWS = 64
"""Rows of blocks for which one launch reads every key and value once."""

JOINED = 16
"""Operations that merge a tail, `vidsparse.carried.merged`, beside a cast to a shorter dtype."""

MERGES = 4
"""Operations for the heads whose moments of blocks are in memory at a time."""


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


def sparse_layer(
    forward: Forward, method: Method, density: float, carried: Carried = ALONE
) -> list[Stage]:
    """Self-attention of one layer at a density, every stage of it.

    Bytes and launches are those of the kernels of the executor for GPUs, which reads keys and
    values where they stand (`tests/test_fake_gpu.py` counts its launches).
    """
    tokens, width, heads = forward.tokens, forward.width, forward.heads
    passed = tokens * width * forward.bytes  # one reading of queries, keys, values or the output
    rows, columns = -(-tokens // method.block_q), -(-tokens // method.block_k)
    cells = float(heads) * rows * columns
    pairs = density * float(tokens) ** 2
    chooses = carried.chooses
    stages = [
        Stage(
            PERMUTATION,
            bytes=0 if forward.hoisted else 4 * passed,  # copies of keys and values
            launches=0 if forward.hoisted else 2,
        ),
        *_estimated(forward, method, carried),
        Stage(
            SELECTOR,
            bytes=(5 * chooses + 2 + 4 * density) * cells,
            launches=3 + chooses,
        ),
        Stage(
            EXACT,
            flops=4 * pairs * width,
            bytes=4 * passed,
            exps=pairs * heads,
            launches=1,
            unit="sparse",
        ),
    ]
    stages += _drafted(forward, method, carried)
    if method.centroids:
        means = float(tokens) * columns
        state = 4.0 * tokens * width * forward.head_dim if method.first_order else 0.0
        stages.append(
            Stage(
                REST,
                flops=4 * means * width + state,
                bytes=3 * passed + 9 * cells,  # queries, output again; weights of unlisted blocks
                exps=means * heads,
                launches=2,
                unit="sparse",
            )
        )
    return stages + _carried(forward, method, density, carried)


def _estimated(forward: Forward, method: Method, carried: Carried) -> list[Stage]:
    """The draft of block means, and the summary of keys and values that centroids are read from."""
    passed = forward.tokens * forward.width * forward.bytes
    rows, columns = (-(-forward.tokens // n) for n in (method.block_q, method.block_k))
    if not carried.chooses:
        summary = Stage(ESTIMATOR, bytes=2.0 * passed, launches=1 + method.first_order)
        return [summary] * method.centroids
    if method.of_clusters:
        return [clusters.masses(forward, method)]
    return [
        Stage(
            ESTIMATOR,
            flops=2.0 * rows * columns * forward.width,
            # values for their means
            bytes=(3 if method.centroids else 2) * passed + 4.0 * forward.heads * rows * columns,
            launches=4 if method.first_order else 3,
        )
    ]


def _carried(forward: Forward, method: Method, density: float, carried: Carried) -> list[Stage]:
    """What is computed to be kept, and what adds or merges it."""
    tokens, width, size = float(forward.tokens), forward.width, forward.bytes
    found = []
    if carried.residual:
        found.append(difference(forward))
    if carried.tail == "made":  # a call more, of all that is not listed
        cells = forward.heads * tokens / method.block_q * tokens / method.block_k
        pairs = (1 - density) * tokens**2
        moved = 4 * tokens * width * size
        work = Stage(EXACT, 4 * pairs * width, moved, pairs * forward.heads, 1, "sparse")
        turned = 21 + 4 * (1 - density)  # of blocks, in torch; then their lists
        found += [work, Stage(SELECTOR, bytes=turned * cells, launches=6)]
    if carried.tail:
        narrow = size < 4  # outputs are weighed in float32, added, and cast back
        moved = (2 * (size + 4) + 12 + narrow * (4 + size)) * tokens * width
        moved += 12 * JOINED * tokens * forward.heads  # of their LSE
        found.append(Stage(KEPT, bytes=moved, launches=JOINED + narrow))
    return found


def difference(forward: Forward) -> Stage:
    """A residual is added, or made: two outputs are read, one is written."""
    return Stage(KEPT, bytes=3.0 * forward.tokens * forward.width * forward.bytes, launches=1)


def _drafted(forward: Forward, method: Method, carried: Carried) -> list[Stage]:
    """What some methods compute before they select, beside the draft of block means."""
    tokens, width, heads = float(forward.tokens), forward.width, forward.heads
    passed = tokens * width * forward.bytes
    rows, columns = tokens / method.block_q, tokens / method.block_k
    found = []
    if method.refresh and carried.tail != "merged":
        levels = log2(max(2.0, columns))
        moved = 4.0 * 2 * tokens * heads * (3 * method.axes + 7)  # read, compared, moved by a cut
        strips = max(1.0, tokens * width / SCRATCH)
        cuts = levels  # of queries and of keys in one launch
        local = 4 * levels * tokens * width * forward.head_dim
        if not method.axes:  # in torch, all numbers of the rows of a few heads at a time
            moved, cuts = 6 * 4.0 * 2 * tokens * width, 2 * levels * PARTS * strips
        whole = (
            clusters.made(forward, method, carried.first)
            if method.order
            else Stage(
                ORDER,
                flops=(
                    4 * tokens * width * (forward.head_dim + method.axes)
                    + local * (method.axes == 0)
                    + 8 * rows * columns * width
                ),
                bytes=8 * passed
                + levels * moved
                + 32 * rows * columns * heads,  # both orders drafted
                launches=cuts + AXES,
            )
        )
        once = method.order and carried.first
        found.append(whole if once else whole.times(1 / method.refresh))
        kept = 4.0 * 2 * tokens * heads  # of the orders; they are read, made wider and read again
        found.append(Stage(PERMUTATION, bytes=5 * kept, launches=2))
    if method.spread and (carried.chooses or method.rest_spread):
        cells = rows * columns
        found.append(
            Stage(
                ESTIMATOR,
                flops=4 * cells * width,
                bytes=2 * passed + 8 * cells * heads,  # keys and values again; a bias and its use
                launches=3,
            )
        )
    share, depth = method.products
    if carried.chooses and method.of_clusters and method.reads_tokens:
        found.append(clusters.errors(forward, method))
    elif carried.chooses and (method.reads_tokens or share):
        weights = share * tokens**2 * heads
        moved, launches = 4 * passed + 5 * 4 * weights, 8.0 * heads  # normalised, summed twice
        if method.one_launch:
            moved, launches = 2 * passed * ceil(rows / TILE_ROWS) + 4 * rows * columns * heads, 1.0
        found.append(
            Stage(
                ESTIMATOR,
                flops=2 * share * depth * tokens**2 * width,
                bytes=moved,
                exps=weights,
                launches=launches,
            )
        )
    if method.blend:
        found.append(Stage(REST, bytes=5 * passed, launches=8.0 * heads))
    if method.row_moments:
        moments = columns * width * forward.head_dim
        found.append(
            Stage(
                REST,
                flops=2 * tokens * width * forward.head_dim + 2 * rows * moments,
                bytes=2 * passed + 2 * forward.bytes * moments + 12 * rows * columns * heads,
                launches=3 + MERGES * ceil(forward.bytes * moments / MOMENT_BYTES),
            )
        )
    return found


def once(forward: Forward) -> Stage:
    """The permutation of a forward that changes the order of its tokens once."""
    moved = 4 * forward.tokens * forward.width * forward.bytes * forward.hoisted
    return Stage(PERMUTATION, bytes=moved, launches=4 * forward.hoisted)
