"""One video on several devices by Ulysses: what each computes, and what they send each other.

A device holds 1 / n of the tokens. Whatever works token by token is shared: linear layers over
rows of the video, elementwise operations, the queries of cross-attention. Whatever reads the text
or a timestep alone, each device does by itself, as it brings all tokens into their order before
they are split. Self-attention is of all tokens and 1 / n of the heads. Around it, each of q, k, v
and the output is sent once, but for the part that stays:

    bytes sent by a device = 4 (n - 1) / n^2 S H D b    for each self-attention of S tokens

Before and after each exchange diffusers copies what is sent into another order, and models with
text in the sequence have their tokens sorted besides. Sending does not overlap with anything.
"""

from __future__ import annotations

from dataclasses import replace

from vidsparse.costs.forward import Forward
from vidsparse.costs.stage import EXCHANGE, Stage
from vidsparse.grid import TokenGrid

TENSORS = 4
"""q, k, v and the output."""


def outside(forward: Forward, devices: int) -> Forward:
    """What one of them does of a forward beside its self-attention."""
    if devices == 1:
        return forward
    rows = {forward.tokens, forward.grid.other_tokens}
    linears = tuple(
        replace(one, rows=-(-one.rows // devices)) if one.rows in rows else one
        for one in forward.linears
    )
    own = TokenGrid(1, 1, -(-forward.tokens // devices))
    return replace(forward, grid=own, linears=linears, cross=forward.cross / devices)


def inside(forward: Forward, devices: int) -> Forward:
    """What one of them does of self-attention: all tokens, some heads."""
    return replace(forward, heads=forward.heads // devices)


def sent(forward: Forward, devices: int) -> float:
    """Bytes that one of them sends for the self-attention of one layer."""
    passed = float(forward.tokens) * forward.width * forward.bytes
    return TENSORS * passed * (devices - 1) / devices**2


def exchange(forward: Forward, devices: int) -> list[Stage]:
    """Of the self-attention of one layer, on one of them."""
    if devices == 1:
        return []
    own = float(forward.tokens) * forward.width * forward.bytes / devices
    copies = 4.0 + 2.0 * bool(forward.grid.text_tokens)  # reading and writing, before and after
    return [
        Stage(EXCHANGE, sent=sent(forward, devices), launches=TENSORS),
        Stage(EXCHANGE, bytes=TENSORS * copies * own, launches=2 * TENSORS),
    ]
