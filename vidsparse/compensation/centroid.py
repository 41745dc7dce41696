"""Centroid: an unlisted block of n keys gives exp(s q . kbar + ln n) with value vbar.

Source: zeroth order of PISA (arXiv 2602.01077), SVG-EAR (arXiv 2603.08982). By Jensen the centroid
never overstates the true mass of the block.
"""

from dataclasses import dataclass
from typing import ClassVar

from vidsparse.draft import Draft
from vidsparse.plan import BlockPlan, FirstOrder


@dataclass(frozen=True)
class Params:
    """No settings."""

    name: str = "centroid"
    first_order: ClassVar[FirstOrder] = "none"
    centroids: ClassVar[bool] = True
    spread: ClassVar[bool] = False


def complete(plan: BlockPlan, draft: Draft, params: Params) -> BlockPlan:
    """`rest` = the centroid level."""
    return plan.with_rest(plan.k_blocks.levels)
