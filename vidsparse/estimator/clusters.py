"""Clusters: the mass of pairs of clusters, by their centroids.

    m_ab = softmax_b( s qbar_a . kbar_b + ln n_b )

over the clusters that the layout has made of queries and of keys; n_b = 0 gives 0. Selector topp
chooses among them, and reads the blocks that they touch (`vidsparse.clusters`); other selectors see
the mass that a block has if that of a cluster lies evenly on its tokens. Text is in no cluster, and
exact both ways. Source: SVG2 (arXiv 2505.18875).
"""

from dataclasses import dataclass
from typing import ClassVar

from vidsparse.clusters import ClusterScores
from vidsparse.draft import Draft
from vidsparse.plan import ScoreKind, Scores


@dataclass(frozen=True)
class Params:
    """No settings."""

    name: str = "clusters"
    kind: ClassVar[ScoreKind] = "mass"
    spread: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = False
    of_clusters: ClassVar[bool] = True


def estimate(draft: Draft, params: Params) -> Scores:
    """Mass float32 [B, H, nq, nk], 0 in rows of text, and that of the clusters."""
    assert draft.clusters is not None, "checked by SparseConfig"
    found = ClusterScores.by_centroids(*draft.clusters, draft.q_blocks, draft.k_blocks, draft.scale)
    return Scores(found.on_blocks(), params.kind, exact=found.text, clusters=found)
