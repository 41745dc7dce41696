"""Clusters: tokens that an order of heads has put together, in runs of any length.

Blocks are cut over the runs, so that a block holds tokens of one cluster or of a few. With n_ia the
tokens of query block i in query cluster a, n_jb those of key block j in key cluster b, n a sum,

    touched_ij = any pair (a, b) that is chosen with n_ia > 0 and n_jb > 0
    mass_ij    = sum_ab (n_ia / n_i) m_ab (n_jb / n_b)

A cluster that is padded to whole tiles computes the pairs of blocks that it touches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidsparse.blocks import Blocks


@dataclass(frozen=True)
class Clusters:
    """Of the queries, or of the keys, of every head.

    count: int64 [B, H, C], the tokens of each, 0 of an empty one; they are the next so many
    positions of the head's order, those of the first begin at position `first`, `tokens` in all.
    centroid: float [B, H, C, D], their mean. Text is in none.
    """

    count: Tensor
    centroid: Tensor
    first: int
    tokens: int

    def within(self, blocks: Blocks, b: int, h: int) -> Tensor:
        """float [n, C]: tokens of each block in each cluster of a head."""
        count, cut = self.count.select(0, b).select(0, h), blocks.on(self.count.device)
        end = count.cumsum(0) + self.first
        last = torch.minimum((cut.start + cut.count).unsqueeze(1), end)
        begin = torch.maximum(cut.start.unsqueeze(1), end - count)
        return (last - begin).clamp(min=0).to(self.centroid.dtype)

    def of_heads(self, heads: Tensor) -> Clusters:
        """Those of some heads, int64 [n] on the device."""
        count, centroid = (x.index_select(1, heads) for x in (self.count, self.centroid))
        return replace(self, count=count, centroid=centroid)


@dataclass(frozen=True)
class ClusterScores:
    """mass: float [B, H, Cq, Ck] of pairs of clusters, rows sum to 1, 0 of empty key clusters.
    q, k: the clusters; q_blocks, k_blocks: the blocks cut over them. worth: like mass, what orders
    the pairs of a row if that is not their mass, or None."""

    mass: Tensor
    q: Clusters
    k: Clusters
    q_blocks: Blocks
    k_blocks: Blocks
    worth: Tensor | None = None

    @classmethod
    def by_centroids(
        cls, q: Clusters, k: Clusters, q_blocks: Blocks, k_blocks: Blocks, scale: float
    ) -> ClusterScores:
        """m_ab = softmax_b(scale qbar_a . kbar_b + ln n_b)."""
        logits = torch.matmul(q.centroid * scale, k.centroid.mT)
        mass = torch.softmax(logits + k.count.to(logits).log().unsqueeze(-2), -1)
        return cls(mass, q, k, q_blocks, k_blocks)

    @property
    def text(self) -> Tensor:
        """bool [nq, nk]: blocks of text, on either side."""
        of_q, of_k = (x.on(self.mass.device).text for x in (self.q_blocks, self.k_blocks))
        return of_q.unsqueeze(1) | of_k

    def on_blocks(self) -> Tensor:
        """float32 [B, H, nq, nk], mass_ij of the module docstring; 0 of blocks of text."""

        def one(b: int, h: int) -> Tensor:
            of_q, of_k = self._within(b, h)
            of_q = of_q / self.q_blocks.on(of_q.device).count.to(of_q).unsqueeze(1)
            of_k = of_k / self.k.count.select(0, b).select(0, h).clamp(min=1)
            return (of_q @ self.mass.select(0, b).select(0, h).to(of_q) @ of_k.mT).float()

        return self._by_head(one)

    def touched(self, chosen: Tensor) -> Tensor:
        """bool [B, H, nq, nk], touched_ij of the module docstring. chosen: bool [B, H, Cq, Ck]."""

        def one(b: int, h: int) -> Tensor:
            of_q, of_k = ((x > 0).float() for x in self._within(b, h))
            return of_q @ chosen.select(0, b).select(0, h).float() @ of_k.mT > 0

        return self._by_head(one)

    def of_heads(self, heads: Tensor) -> ClusterScores:
        """Those of some heads, int64 [n] on the device."""
        of_q, of_k = self.q.of_heads(heads), self.k.of_heads(heads)
        worth = None if self.worth is None else self.worth.index_select(1, heads)
        return replace(self, mass=self.mass.index_select(1, heads), q=of_q, k=of_k, worth=worth)

    def _within(self, b: int, h: int) -> tuple[Tensor, Tensor]:
        return self.q.within(self.q_blocks, b, h), self.k.within(self.k_blocks, b, h)

    def _by_head(self, one: Callable[[int, int], Tensor]) -> Tensor:
        batch, heads = self.mass.shape[:2]
        every = torch.stack([one(b, h) for b in range(batch) for h in range(heads)])
        found: Tensor = every.unflatten(0, (batch, heads))
        return found
