"""The facts of one forward of a transformer that its cost depends on."""

from __future__ import annotations

from dataclasses import dataclass

from vidsparse.grid import TokenGrid

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Dtype, as torch names it -> bytes of a number."""


@dataclass(frozen=True)
class Linear:
    """Linear layers of one shape. rows: of their input, per sample; count: how many there are."""

    rows: int
    inputs: int
    outputs: int
    count: int = 1

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inputs * self.outputs * self.count


@dataclass(frozen=True)
class Forward:
    """One forward of one sample.

    grid: of its self-attention, with the text that is in the sequence. layers: of self-attention,
    each with so many heads of so many channels. linears: all linear layers. cross: pairs of a query
    and a key in cross-attention, over all layers. inner: rows of the widest intermediate result
    x its channels. weights: numbers in the transformer. dtype: as torch names it. hoisted: the
    order of the tokens is changed once a forward and not around each call.
    """

    grid: TokenGrid
    layers: int
    heads: int
    head_dim: int
    linears: tuple[Linear, ...]
    cross: float
    weights: int
    dtype: str
    hoisted: bool = True

    @property
    def tokens(self) -> int:
        return self.grid.tokens

    @property
    def width(self) -> int:
        """Channels of queries, keys and values."""
        return self.heads * self.head_dim

    @property
    def bytes(self) -> int:
        """Of a number."""
        return BYTES[self.dtype]

    @property
    def widest(self) -> int:
        """Numbers in the largest result of a linear layer."""
        return max((one.rows * one.outputs for one in self.linears), default=0)
