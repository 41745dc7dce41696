"""What a forward of a transformer computes, read off its modules: no weights are needed, meta does.

Which rows a linear layer sees is told by its name and by the attention module that it belongs to;
`tests/test_costs_anatomy.py` holds that against what the forwards of tiny models really compute.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

from torch import nn

from vidsparse.costs.forward import Forward, Linear
from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter

ONE_ROW = re.compile(
    r"norm|time|adaln|modulation|_mod\.|guidance|pooled|embedding_mapping|scale_shift"
)
"""In the names of linear layers that see one row: of a timestep, or of a text as a whole."""

TEXT = re.compile(
    r"context|caption|text|txt|refiner|add_[qkv]_proj|to_add_out|[kv]_img$|image_|audio"
)
"""In the names of those that see the rows of text, or of an image that is given like text."""

KEYS = re.compile(r"\b(to_k|to_v|to_key|to_value|to_kv)$")
QUERIES = ("to_q", "to_query")
SEPARATE = ("add_q_proj", "to_add_out")
"""Layers of attention modules in which text has projections of its own."""


def forward_of(
    transformer: nn.Module, adapter: Adapter, grid: TokenGrid, text: int, dtype: str
) -> Forward:
    """The facts of a forward. grid: of the video, without text; text: its rows, padding included.

    dtype: of the weights, as torch names it.
    """
    attentions = adapter.self_attention(transformer)
    words = 0 if adapter.text == "none" else text
    whole = replace(grid, text_tokens=words, text_first=adapter.text == "first")
    rows = Rows(transformer, adapter, grid, text)
    found = Counter[tuple[int, int, int]]()
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            found[rows.of(name), module.in_features, module.out_features] += 1
    heads, head_dim = _sides(attentions[0])
    return Forward(
        grid=whole,
        layers=len(attentions),
        heads=heads,
        head_dim=head_dim,
        linears=tuple(Linear(*shape, count) for shape, count in found.items()),
        cross=float(grid.other_tokens) * text * len(rows.cross),
        weights=sum(weight.numel() for weight in transformer.parameters()),
        dtype=dtype,
        hoisted=adapter.hoisted,
    )


class Rows:
    """How many rows each linear layer of a transformer sees.

    together: beginnings of the names of those that text and video pass alike. cross: names of the
    modules in which the video attends to the text.
    """

    def __init__(
        self, transformer: nn.Module, adapter: Adapter, grid: TokenGrid, text: int
    ) -> None:
        attentions = adapter.self_attention(transformer)
        names = {id(module): name for name, module in transformer.named_modules()}
        own = [names[id(module)] for module in attentions]
        self.video, self.text = grid.other_tokens, text
        self.together = tuple(
            f"{name.rpartition('.')[0]}."
            for name, module in zip(own, attentions, strict=True)
            if adapter.text != "none"
            and not any(getattr(module, n, None) is not None for n in SEPARATE)
        )
        self.cross = {
            name
            for name, module in transformer.named_modules()
            if name not in own
            and any(isinstance(getattr(module, q, None), nn.Linear) for q in QUERIES)
            and not TEXT.search(name)
        }

    def of(self, name: str) -> int:
        """Of the layer of this name, per sample."""
        block, _, _ = name.rpartition(".")
        if ONE_ROW.search(name):
            return 1
        if TEXT.search(name):
            return self.text
        if block in self.cross and KEYS.search(name):
            return self.text
        if name.startswith(self.together):
            return self.video + self.text
        return self.video


def _sides(attention: Any) -> tuple[int, int]:
    """Heads and channels of a head of an attention module."""
    heads = int(getattr(attention, "heads", 0) or attention.num_heads)
    query = next(
        module
        for name, module in attention.named_modules()
        if isinstance(module, nn.Linear) and name.endswith((*QUERIES, "to_qkv", "qkv"))
    )
    channels = query.out_features // (3 if "qkv" in str(query) else 1)
    return heads, channels // heads
