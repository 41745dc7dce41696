"""Call: one self-attention call of a running forward, sparse or stock, and noted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vidsparse.attention import attend, decision_for
from vidsparse.config import SparseConfig
from vidsparse.grid import TokenGrid
from vidsparse.pipelines import private
from vidsparse.pipelines.adapter import Adapter
from vidsparse.pipelines.expectation import Expectation
from vidsparse.pipelines.forward import Forward, RealRows
from vidsparse.pipelines.observation import ObservedCall, Observer
from vidsparse.pipelines.report import RunReport
from vidsparse.plan import StepContext
from vidsparse.result import AttentionResult, full_density


@dataclass(frozen=True)
class Link:
    """What ties a processor to an accelerated pipeline.

    forward: of its transformer. layer: index of its module, 0-based. module, transformer: weak
    references to the attention module and to what it is part of. observers: are shown every call,
    see `observation.py`. expectation: is told of every call, see `expectation.py`.
    """

    forward: Forward
    layer: int
    config: SparseConfig
    module: weakref.ref[nn.Module]
    transformer: weakref.ref[nn.Module]
    adapter: Adapter
    observers: Sequence[Observer] = ()
    expectation: Expectation | None = None


@dataclass(frozen=True)
class Call:
    """One self-attention call. dense: (q, k, v) -> out, the stock call with its mask."""

    link: Link
    report: RunReport
    grid: TokenGrid
    context: StepContext
    dense: Callable[[Tensor, Tensor, Tensor], Tensor]

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        real: tuple[RealRows, ...] | None,
    ) -> Tensor:
        """q, k, v, out [B, tokens, H, D]. real: text rows of each sample that are no padding."""
        module, words = self.link.module(), self.grid.text_tokens
        if module is not None and private.skips_scores(module):
            return self.stock(q, k, v, "layer-skip")
        if mask is None:
            return self.whole(q, k, v)
        if real is None or len(real) != q.shape[0] or not all(rows.fit(words) for rows in real):
            return self.stock(q, k, v, "masked")
        if all(rows.count == words for rows in real):
            return self.whole(q, k, v)
        return self.without_padding(q, k, v, real)

    def stock(self, q: Tensor, k: Tensor, v: Tensor, reason: str) -> Tensor:
        """Dense, as the stock code does it."""
        density = full_density(q.shape[2])
        result = AttentionResult(self.dense(q, k, v), None, None, density, reason)
        return self._noted(self.grid, q, k, v, result)

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All rows are real."""
        return self._noted(self.grid, q, k, v, self._attend(self.grid, q, k, v, self.dense))

    def without_padding(
        self, q: Tensor, k: Tensor, v: Tensor, real: tuple[RealRows, ...]
    ) -> Tensor:
        """Only some text rows of each sample are real: padding is cut out, and its rows are 0.

        Samples of one length are one call. A dense call keeps its mask and all rows.
        """
        config, grid = self.link.config, self.grid
        decision = decision_for(
            q, grid=grid, config=config, context=self.context, hoisted=self.link.adapter.hoisted
        )
        if decision.reason is not None:
            return self.whole(q, k, v)
        out = torch.zeros_like(q)
        alike = len({rows.count for rows in real}) == 1 and all(r.index is None for r in real)
        for sample, rows in enumerate(real[:1] if alike else real):
            of = slice(None) if alike else slice(sample, sample + 1)
            short = replace(grid, text_tokens=rows.count)
            parts = (_cut(x[of], grid, rows) for x in (q, k, v))
            _uncut(out[of], grid, rows, self.whole_of(short, sample, *parts))
        return out

    def whole_of(self, grid: TokenGrid, sample: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All rows of these are real. sample: the first one that they are of."""
        return self._noted(grid, q, k, v, self._attend(grid, q, k, v, None, sample))

    def _attend(
        self, grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor, dense: Any, sample: int = 0
    ) -> AttentionResult:
        return attend(
            q,
            k,
            v,
            grid=grid,
            config=self.link.config,
            context=self.context,
            hoisted=self.link.adapter.hoisted,
            watch=True,
            dense_path=dense,
            recall=self.report.memory.of(self.context.step, self.context.stream, sample),
        )

    def _noted(
        self, grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor, result: AttentionResult
    ) -> Tensor:
        """The output of a call that the report and the observers have been told of."""
        self.report.add(self.context, result)
        if self.link.expectation is not None:
            self.link.expectation.meet(grid, self.context, q, result, self.link.adapter.hoisted)
        for observer in tuple(self.link.observers):
            observer(ObservedCall(self.context, grid, q, k, v, result))
        return result.out


def _parts(x: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
    """Text and the rest of x [B, tokens, H, D]; views."""
    if grid.text_first:
        return x[:, : grid.text_tokens], x[:, grid.text_tokens :]
    return x[:, grid.other_tokens :], x[:, : grid.other_tokens]


def _cut(x: Tensor, grid: TokenGrid, rows: RealRows) -> Tensor:
    """x [B, tokens, H, D] without the padding of its text."""
    if rows.index is None and not grid.text_first:
        return x[:, : grid.other_tokens + rows.count]
    text, rest = _parts(x, grid)
    text = text[:, : rows.count] if rows.index is None else text.index_select(1, rows.index)
    return torch.cat([text, rest] if grid.text_first else [rest, text], 1)


def _uncut(out: Tensor, grid: TokenGrid, rows: RealRows, short: Tensor) -> None:
    """Write what `_cut` has left to its place in `out`."""
    text, rest = _parts(out, grid)
    real, others = _parts(short, replace(grid, text_tokens=rows.count))
    rest.copy_(others)
    if rows.index is None:
        text[:, : rows.count] = real
    else:
        text.index_copy_(1, rows.index, real)
