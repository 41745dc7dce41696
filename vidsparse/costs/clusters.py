"""What it costs to have clusters of heads (`vidsparse.clusters`): to make them, and to choose."""

from __future__ import annotations

from math import ceil

from vidsparse.costs.forward import Forward
from vidsparse.costs.stage import ESTIMATOR, ORDER, Method, Stage
from vidsparse.draft import SCRATCH

TOUCHES, MASSES = 50, 56
"""Operations of what a head's blocks hold of clusters, for scores and for what is touched; and of
scores and choices of all heads together."""

ERRORS_MOVED, ERRORS_WHOLE, ERRORS = 16, 27, 24
"""Of what clusters lose: numbers read and written for each logit; operations of a head, and of each
of its parts."""


def made(forward: Forward, method: Method, first: bool) -> Stage:
    """Orders of a layout that says itself what they cost."""
    sizes = forward.grid.other_tokens, forward.heads, forward.head_dim
    making = method.order.making(*sizes, first)
    return Stage(ORDER, flops=making.flops, bytes=making.bytes, launches=making.launches)


def masses(forward: Forward, method: Method) -> Stage:
    """The mass of pairs of clusters, and the blocks that have it, or are touched, head by head
    (`vidsparse.clusters`): blocks x clusters of queries x clusters of keys x blocks, twice."""
    rows, columns = (-(-forward.tokens // n) for n in (method.block_q, method.block_k))
    sizes = forward.grid.other_tokens, forward.heads, forward.head_dim
    of_q, of_k = method.order.making(*sizes, False).clusters
    pairs = 2.0 * of_q * of_k * forward.head_dim
    spread = 2 * 2.0 * rows * of_k * (of_q + columns)
    moved = 8.0 * (6 * of_q * of_k + 9 * (rows * of_q + columns * of_k) + 2 * rows * of_k)
    launches = TOUCHES * forward.heads + MASSES
    return Stage(ESTIMATOR, forward.heads * (pairs + spread), forward.heads * moved, 0.0, launches)


def errors(forward: Forward, method: Method) -> Stage:
    """What clusters of keys lose as centroids, head by head: logits of every key with the mean of
    every cluster of queries are written, and read and written again by what sums over clusters."""
    tokens, width, heads = float(forward.tokens), forward.width, forward.heads
    sizes = forward.grid.other_tokens, forward.heads, forward.head_dim
    of_q, _ = method.order.making(*sizes, False).clusters
    strips = ceil(tokens * of_q / SCRATCH)
    moved = 4 * tokens * (ERRORS_MOVED * of_q * heads + 6 * width)
    launches = heads * (ERRORS_WHOLE + ERRORS * strips)
    flops = 2 * of_q * tokens * width
    return Stage(ESTIMATOR, flops, moved, of_q * tokens * heads, launches)
