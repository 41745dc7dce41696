"""What the stages speak of: scores of blocks, the plan, and where in a generation a call stands.

Shapes: B batch, H heads, S tokens, D head dim, nq / nk numbers of query / key blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from typing import Literal

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.clusters import ClusterScores

SKIP = -1
"""Level code of a block that is not read at all."""

ScoreKind = Literal["logit", "mass", "rank"]


@dataclass(frozen=True)
class Scores:
    """Block scores. value: float32 [B, H, nq, nk].

    kind: "logit"; "mass", rows sum to 1; or "rank", which only compares inside a row.
    What else an estimator may find: exact, bool that broadcasts to value, blocks that are exact
    whatever their score; coarsest, int8 [B, H, nk], the last level at which a key block may be
    read; logits, what gives those of block means, like value, beside scores that only rank;
    clusters, the scores of clusters of which value is what their blocks have.
    """

    value: Tensor
    kind: ScoreKind
    exact: Tensor | None = None
    coarsest: Tensor | None = None
    logits: Callable[[], Tensor] | None = None
    clusters: ClusterScores | None = None

    def of_heads(self, heads: Tensor) -> Scores:
        """Those of some heads, int64 [n] on the device, for a selector: what is exact is forced."""
        logits, clusters = self.logits, self.clusters
        return Scores(
            self.value.index_select(1, heads),
            self.kind,
            coarsest=None if self.coarsest is None else self.coarsest.index_select(1, heads),
            logits=None if logits is None else lambda: logits().index_select(1, heads),
            clusters=None if clusters is None else clusters.of_heads(heads),
        )

    def ranked(self, first: Tensor) -> Tensor:
        """int64 [B, H, nq, nk]: block ids, `first` in front, by falling score, ties by index."""
        value = self.value.nan_to_num(nan=float("inf"))
        best = torch.where(first, 0, 1).expand(value.shape)
        by_score = torch.argsort(value, dim=-1, descending=True, stable=True)
        return by_score.gather(-1, torch.argsort(best.gather(-1, by_score), dim=-1, stable=True))

    def touched(self, chosen: Tensor, forced: Tensor, least: int, most: int) -> Tensor:
        """bool [B, H, nq, nk]: the blocks that pairs of clusters touch, by falling score.

        chosen: bool [B, H, Cq, Ck], the pairs. least, most: blocks of a row, `forced` in front.
        """
        assert self.clusters is not None, "asked of scores of clusters alone"
        touched = self.clusters.touched(chosen)
        value = self.value.masked_fill(touched.logical_not(), float("-inf"))
        ranked = replace(self, value=value).ranked(forced)
        rank = torch.arange(ranked.shape[-1], device=ranked.device)
        wanted = (rank < least) | (touched.gather(-1, ranked) & (rank < most))
        return torch.zeros_like(wanted).scatter_(-1, ranked, wanted)

    def mass(self, k_blocks: Blocks) -> Tensor:
        """Row-stochastic mass; logits are normalised as softmax_j(value + ln n_j).

        Raises ValueError for scores that only rank.
        """
        weighted = self.weighted(k_blocks)
        return weighted.value if self.kind == "mass" else torch.softmax(weighted.value, -1)

    def weighted(self, k_blocks: Blocks) -> Scores:
        """What orders blocks by their mass: logits get + ln n_j, so a short block comes later.

        Raises ValueError for scores that only rank.
        """
        if self.kind == "mass":
            return self
        if self.kind == "rank":
            raise ValueError("scores of kind 'rank' have no mass: use selector topk")
        count = k_blocks.on(self.value.device).count
        return replace(self, value=self.value + count.to(self.value).log())


FirstOrder = Literal["none", "block", "global", "row"]


@dataclass(frozen=True)
class BlockPlan:
    """At which resolution every query block reads every key block.

    levels: int8 [B, H, nq, nk], on any device: l = 0 .. log2(block_k) reads the means of 2^l
        consecutive tokens (0: the tokens themselves, the last: the centroid), SKIP: not listed.
    q_blocks, k_blocks: the cuts that it refers to.
    listed: the levels that may occur in `levels`, ascending: what an executor prepares for without
        reading the map back from a GPU.
    rest: level of every key block that a row does not list: SKIP, or the centroid level.
    first_order: Taylor term for the `rest` blocks: "none", per "block", "global" (one moment per
        head) or "row" (one per query block); formulas in `vidsparse.kernels`.
    rest_bias: float32 [B, H, nq, nk] on the device of `levels`, or None: added to the log weight of
        a `rest` block; finite, or -inf for a block that is not read at all. Listed blocks do not
        see it.
    blend: share float32 [B, H, nq], > 0, and offset float32 [B, H, nq, D], on the device of
        `levels`, or None: where the listed and `rest` blocks of row i give O and LSE, it gives
        share_i O + offset_i and LSE - ln share_i. `sparse_attention` does that for all executors.
    order_q, order_k: int64 [B, H, S] on the device of `levels`, or None: position t of the query
        blocks is token order_q[b, h, t] of q, out and LSE, position t of the key blocks is token
        order_k[b, h, t] of k and v; None: token t. Positions of text blocks name text tokens.
    """

    levels: Tensor
    q_blocks: Blocks
    k_blocks: Blocks
    listed: tuple[int, ...]
    rest: int = SKIP
    first_order: FirstOrder = "none"
    rest_bias: Tensor | None = None
    blend: tuple[Tensor, Tensor] | None = None
    order_q: Tensor | None = None
    order_k: Tensor | None = None

    @classmethod
    def from_levels(
        cls,
        levels: Tensor,
        q_blocks: Blocks,
        k_blocks: Blocks,
        listed: tuple[int, ...] | None = None,
    ) -> BlockPlan:
        """Plan from a level map, int8 [B, H, nq, nk]; listed None: the levels found in it.

        Raises ValueError for a map of another size and, without `listed`, for levels that do not
        exist.
        """
        nq, nk = levels.shape[2:]
        if (nq, nk) != (len(q_blocks), len(k_blocks)):
            raise ValueError(
                f"level map of {nq} x {nk} blocks, expected {len(q_blocks)} x {len(k_blocks)}"
            )
        if listed is None:
            found = tuple(levels.unique().tolist())
            top = k_blocks.levels
            if found and not (found[0] >= SKIP and found[-1] <= top):
                raise ValueError(
                    f"levels {found[0]} .. {found[-1]}: allowed {SKIP} .. {top} "
                    f"for blocks of {k_blocks.size} keys"
                )
            listed = tuple(level for level in found if level != SKIP)
        return cls(levels, q_blocks, k_blocks, listed)

    def with_rest(
        self, rest: int, first_order: FirstOrder = "none", rest_bias: Tensor | None = None
    ) -> BlockPlan:
        """The same map with another treatment of the blocks that it leaves out.

        Raises ValueError for a bias of another form, or of nothing.
        """
        if rest_bias is not None:
            self._check_form("rest_bias", rest_bias, torch.float32, *self.levels.shape[2:])
            if rest == SKIP:
                raise ValueError(
                    f"rest_bias with rest={SKIP} (skip): there is nothing that it could weigh; use "
                    f"rest={self.k_blocks.levels} (centroid) or no bias"
                )
        return replace(self, rest=rest, first_order=first_order, rest_bias=rest_bias)

    def with_orders(self, order_q: Tensor | None, order_k: Tensor | None) -> BlockPlan:
        """The same plan on tokens that stand in an order of each head.

        Raises ValueError for orders of another form and, on a CPU, for what names a token twice.
        """
        for name, order, blocks in (
            ("order_q", order_q, self.q_blocks),
            ("order_k", order_k, self.k_blocks),
        ):
            if order is None:
                continue
            self._check_form(name, order, torch.int64, blocks.tokens)
            if order.device.type != "cpu":  # to look would be to wait
                continue
            named = torch.zeros(order.shape, dtype=torch.bool, device="cpu")
            inside = bool(((order >= 0) & (order < blocks.tokens)).all())
            if not inside or not bool(named.scatter_(-1, order, True).all()):
                raise ValueError(
                    f"{name} is no order: expected every token, 0 .. {blocks.tokens - 1}, once in "
                    "every head"
                )
        return replace(self, order_q=order_q, order_k=order_k)

    def with_blend(self, share: Tensor, offset: Tensor) -> BlockPlan:
        """The same plan with a blend. Raises ValueError for one of another form."""
        rows = self.levels.shape[2]
        self._check_form("share of blend", share, torch.float32, rows)
        self._check_form("offset of blend", offset, torch.float32, rows, offset.shape[-1])
        return replace(self, blend=(share, offset))

    def blended(
        self, out: Tensor, lse: Tensor | None, inverse: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What `blend` makes of O [B, H, S, D] and LSE [B, H, S], rows in the order of q.

        inverse: int64 [S], the position in the plan of each row, where a token order of all heads
        was executed.
        """
        if self.blend is None:
            return out, lse
        row = self.q_blocks.on(out.device).owner
        row = row if inverse is None else row.index_select(0, inverse)
        row = row.expand(out.shape[:3])
        if self.order_q is not None:
            row = torch.empty_like(self.order_q).scatter_(-1, self.order_q, row)
        share, offset = self.blend
        share = share.gather(2, row)
        wide = out.to(torch.promote_types(out.dtype, torch.float32)) * share.unsqueeze(-1)
        offset = offset.gather(2, row.unsqueeze(-1).expand(*row.shape, offset.shape[-1]))
        blended = (wide + offset).to(out.dtype)
        return blended, None if lse is None else lse - share.log().to(lse)

    def _check_form(self, name: str, x: Tensor, dtype: torch.dtype, *sizes: int) -> None:
        expected = dtype, (*self.levels.shape[:2], *sizes), self.levels.device
        given = x.dtype, tuple(x.shape), x.device
        if given != expected:
            raise ValueError(
                f"{name} is {given[0]} {given[1]} on {given[2]}: expected {expected[0]} "
                f"{expected[1]} on {expected[2]}"
            )

    @cached_property
    def counts(self) -> Tensor:
        """int64 [B, H, nq, log2(block_k) + 1], number of listed key blocks per row and level."""
        shape = (*self.levels.shape[:3], self.k_blocks.levels + 1)
        counts = self.levels.new_zeros(shape, dtype=torch.int64)
        for level in self.listed:
            counts[..., level] = (self.levels == level).sum(-1)
        return counts

    @cached_property
    def starts(self) -> Tensor:
        """int64 [B, H, nq, log2(block_k) + 2]: where the lists of a row stand in `index`.

        Row (b, h, i) reads index[starts[.., l] : starts[.., l + 1]] at level l.
        """
        ends = self.counts.flatten().cumsum(0).view(self.counts.shape)
        return torch.cat([ends[..., :1] - self.counts[..., :1], ends], -1)

    @cached_property
    def index(self) -> Tensor:
        """int64 [entries], ids of the listed key blocks, row after row, ascending in each level."""
        if self.listed == (0,):
            return (self.levels == 0).flatten(0, 2).nonzero()[:, 1]
        flat = self.levels.flatten(0, 2)
        last = torch.where(flat == SKIP, self.k_blocks.levels + 1, flat).to(torch.int8)
        ranked = torch.argsort(last, dim=-1, stable=True)
        places = torch.arange(flat.shape[1], device=flat.device)
        return ranked[places < self.counts.sum(-1).flatten()[:, None]]

    def level_map(self) -> Tensor:
        """int8 [B, H, nq, nk]: the level at which every block is read, listed or as `rest`."""
        if self.rest == SKIP:
            return self.levels
        return torch.where(self.read_as_rest(), self.rest, self.levels)

    def read_as_rest(self) -> Tensor:
        """bool [B, H, nq, nk]: the blocks that are read without being listed."""
        unlisted = self.levels == SKIP
        if self.rest == SKIP:
            return torch.zeros_like(unlisted)
        return unlisted if self.rest_bias is None else unlisted & (self.rest_bias != -inf)

    @cached_property
    def density(self) -> Tensor:
        """float64 [B, H]: (query, key group) pairs that are computed / all (query, key) pairs.

        For full blocks this is sum_j 2^-level(i, j) / nk averaged over the rows; `rest` counts too,
        whatever its bias.
        """
        q_count = self.q_blocks.on(self.levels.device).count.double()
        k_count, size = self.k_blocks.count, self.k_blocks.size
        short = (k_count < size).nonzero().flatten().tolist()
        work = self.levels.new_zeros(self.levels.shape[:3], dtype=torch.float64)
        codes = {level: level for level in self.listed} | {SKIP: self.rest}
        for code, level in codes.items():
            if level == SKIP:
                continue
            kept, groups = self.levels == code, -(-size // 2**level)
            work += kept.sum(-1) * groups
            for j in short:  # fewer tokens, fewer groups
                work -= kept.select(-1, j) * (groups - -(-int(k_count[j]) // 2**level))
        return (work @ q_count) / (q_count.sum() * int(k_count.sum()))


Branch = Literal["cond", "uncond", "both", "single"]


@dataclass(frozen=True)
class StepContext:
    """Where in a generation an attention call stands.

    step: index of the denoising step, 0-based; steps: their number (>= 1).
    layer: index of the self-attention layer, 0-based; layers: their number.
    branch: guidance branch; "both" = one batch with both, "single" = the pipeline names none.
    transformer: name of the pipeline's component ("transformer", "transformer_2").
    context_name: of the `cache_context`, as the pipeline gave it: branches that guidance adds to
        "cond" and "uncond" differ by it alone. None if there is none.
    forward: number of the forward of this transformer within its step, 0-based: what tells branches
        apart where nothing names them.
    """

    step: int
    steps: int
    layer: int = 0
    layers: int = 1
    branch: Branch = "single"
    transformer: str = "transformer"
    context_name: str | None = None
    forward: int = 0

    @property
    def stream(self) -> tuple[str, str | int, int]:
        """What a state that is kept from step to step belongs to."""
        name = self.forward if self.context_name is None else self.context_name
        return self.transformer, name, self.layer
