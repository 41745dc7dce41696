"""Nothing: unlisted blocks are dropped."""

from dataclasses import dataclass

from vidsparse.plan import SKIP, BlockPlan


@dataclass(frozen=True)
class Params:
    """No settings."""

    name: str = "none"


def complete(plan: BlockPlan, params: Params) -> BlockPlan:
    """`rest` = SKIP."""
    return plan.with_rest(SKIP)
