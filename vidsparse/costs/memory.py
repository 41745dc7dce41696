"""Memory of a forward: what is counted, and no more."""

from __future__ import annotations

from vidsparse.costs import sharing
from vidsparse.costs.forward import Forward
from vidsparse.costs.stage import Method

COUNTED = (
    "weights of the transformers, activations of one forward, buffers of sparse attention, orders "
    "of heads, what is kept from step to step; "
    "not the text encoder, the VAE, or what its decoding needs"
)


def memory(
    forward: Forward, method: Method | None, weights: int, devices: int = 1, branches: int = 1
) -> dict[str, float]:
    """Bytes by kind, on each of the devices that share a forward. method: None for a dense run.
    weights: numbers in all transformers, which each of them holds. branches: forwards a step, each
    of which keeps orders of its own for heads that have any: two int32 a token and head, in every
    layer.

    Activations: the residual twice, as an operation makes a new one, and the largest of: queries,
    keys, values, output and what the rotary embedding makes of two of them; twice the widest result
    of a linear layer, before and after its activation; a norm in float32. What is exchanged of
    queries, keys and values is there twice, to be sent and received.
    """
    own, inner = sharing.outside(forward, devices), sharing.inside(forward, devices)
    passed = float(own.tokens) * own.width * own.bytes
    inside = max(
        6 * passed + (6 * passed if devices > 1 else 0.0),
        2.0 * own.widest * own.bytes,
        8.0 * own.tokens * own.width,
    )
    found = {
        "weights": float(weights) * forward.bytes,
        "activations": 2 * passed + inside,
        "sparse buffers": 0.0,
        "orders of heads": 0.0,
    }
    if method is not None:
        rows, columns = (-(-inner.tokens // n) for n in (method.block_q, method.block_k))
        cells = float(inner.heads) * rows * columns
        # scores float32, levels int8, lists int32, what unlisted blocks weigh float32, and a bias
        # of them and weights of their moments; copies of keys and values in another order
        copies = 0 if forward.hoisted else 2 * passed
        extras = 4 * (method.centroids + method.spread + method.row_moments)
        found["sparse buffers"] = copies + (4 + 1 + 4 + extras) * cells
        layers = forward.layers * branches
        if method.refresh:
            found["orders of heads"] = 2.0 * 4 * inner.tokens * inner.heads * layers
        if method.order:
            sizes = inner.grid.other_tokens, inner.heads, inner.head_dim
            found["clusters"] = method.order.making(*sizes, False).kept * layers
        found |= {name: size * layers for name, size in kept(inner, method, cells).items()}
    return found


def kept(forward: Forward, method: Method, cells: float) -> dict[str, float]:
    """Bytes that a layer and branch keeps beside orders; cells: blocks of all heads."""
    keep, found = method.keep, {}
    if keep.plans > 1 or keep.tail > 1:
        found["blocks"] = cells
    out = float(forward.tokens) * forward.width * forward.bytes
    if keep.residual:
        found["residual"] = out
    if keep.tail > 1:
        found["tail"] = out + 4.0 * forward.tokens * forward.heads
    return found
