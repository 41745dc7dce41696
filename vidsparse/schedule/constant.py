"""Constant: the same density in every step and layer."""

from dataclasses import dataclass

from vidsparse.plan import StepContext
from vidsparse.schedule import ConstantParams


@dataclass(frozen=True)
class Params(ConstantParams):
    """See `vidsparse.schedule.ConstantParams`."""

    name: str = "constant"


def density_at(context: StepContext | None, params: Params) -> tuple[float, str | None]:
    """The configured density."""
    return params.steady()
