"""Nothing: unlisted blocks are dropped."""

from dataclasses import dataclass
from typing import ClassVar

from vidsparse.draft import Draft
from vidsparse.plan import SKIP, BlockPlan, FirstOrder


@dataclass(frozen=True)
class Params:
    """No settings."""

    name: str = "none"
    first_order: ClassVar[FirstOrder] = "none"
    centroids: ClassVar[bool] = False
    spread: ClassVar[bool] = False


def complete(plan: BlockPlan, draft: Draft, params: Params) -> BlockPlan:
    """`rest` = SKIP."""
    return plan.with_rest(SKIP)
