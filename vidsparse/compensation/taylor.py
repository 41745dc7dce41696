"""Taylor: the centroid plus the first-order term of exp(s q . k) around it.

scope "block":  F_t = s sum_j exp(a_tj) / n_j (q_t H_j),  H_j = sum_{n in j} (k_n - kbar_j)^T v_n
scope "global": F_t = (s G_t / N_v) (q_t H),  H = sum_j H_j over video blocks, G_t = sum_j exp(a_tj)

with a_tj = s q_t . kbar_j + ln n_j over the unlisted blocks; F_t is added to the numerator, the
denominator has no first-order term. Source: PISA (arXiv 2602.01077). "global" costs one D x D
product per query; on compact blocks it is often no better than the plain centroid.
"""

from dataclasses import dataclass
from typing import ClassVar, cast

from vidsparse.config import require
from vidsparse.draft import Draft
from vidsparse.plan import BlockPlan, FirstOrder


@dataclass(frozen=True)
class Params:
    """scope: global | block ("block" runs on the reference implementation only)."""

    name: str = "taylor"
    scope: str = "global"
    centroids: ClassVar[bool] = True
    spread: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(
            self.scope in ("global", "block"), "compensation.scope", self.scope, "global, block"
        )

    @property
    def first_order(self) -> FirstOrder:
        return cast(FirstOrder, self.scope)


def complete(plan: BlockPlan, draft: Draft, params: Params) -> BlockPlan:
    """`rest` = the centroid level, with the first-order term."""
    return plan.with_rest(plan.k_blocks.levels, params.first_order)
