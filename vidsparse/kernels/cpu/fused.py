"""Rows of the CPU engine by torch's own attention: what a row lists, gathered, with a mask.

Scores, softmax and sums stay in the caches of one kernel of torch, in the units that it uses for
the dtype of the input. A centroid column has the mask ln n_j with the bias of the plan, or -inf
where the row lists the block; a pooled group that of its number of tokens. The weights are not seen
from outside: what the first-order term takes of them comes from a second, small attention over the
centroids.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from vidsparse.kernels.cpu.call import NEG_INF, Call
from vidsparse.kernels.cpu.keys import Head
from vidsparse.kernels.cpu.rows import Columns, Worker
from vidsparse.kernels.cpu.step import attend_rows, compiled
from vidsparse.kernels.cpu.stretch import Stretch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATOR = "_scaled_dot_product_flash_attention_for_cpu"
"""Of torch; not one that it promises to keep."""


class FusedWorker(Worker):
    """Scratch memory of one thread: the workspace alone, in the dtype of the input."""

    def __init__(self, call: Call) -> None:
        self.call = call
        empty = partial(torch.empty, dtype=call.q.dtype, device="cpu")
        self.k, self.v = empty(call.rows, call.depth), empty(call.rows, call.depth)
        self.none = torch.empty(0, dtype=call.bias_dtype, device="cpu")
        self.stage = None
        self.columns = {}
        self.masks: dict[int, Tensor] = {}

    def _run(
        self,
        columns: Columns,
        head: Head,
        stretch: Stretch,
        rows: list[int],
        bounds: list[list[int]],
        whole: int,
        rest: int = 0,
    ) -> None:
        """All queries of every row at once."""
        call = self.call
        spans, tables, targets = columns.gathered(head, rows, bounds)
        mask = self._mask(columns)
        bias, moments = self._of_rows(columns, head, stretch, rows)
        if bias and head.moment is not None:
            moments = [head.moment] * len(rows)
        starts = [call.first_q[row] - stretch.origin for row in rows]
        compiled(attend_rows)(
            stretch.q, stretch.out, stretch.lse, starts, whole * columns.queries + rest,
            call.scale, call.index, spans, tables, targets, columns.spare, columns.keys.T,
            columns.values, mask, mask[: columns.far], bias, moments,
        )  # fmt: skip

    def _mask(self, columns: Columns) -> Tensor:
        """What is added to the scores of a workspace; centroids get theirs row by row."""
        if id(columns) not in self.masks:
            mask = torch.zeros(columns.width, dtype=self.call.bias_dtype, device="cpu")
            mask[slice(*columns.pooled)] = columns.pooled_bias
            for first, end in columns.dead:
                mask[first:end] = NEG_INF
            self.masks[id(columns)] = mask
        return self.masks[id(columns)]
