"""Constant: the same density in every step and layer."""

from dataclasses import dataclass

from vidsparse.densities import ConstantParams
from vidsparse.plan import StepContext


@dataclass(frozen=True)
class Params(ConstantParams):
    """See `vidsparse.densities.ConstantParams`."""

    name: str = "constant"


def density_at(context: StepContext | None, params: Params) -> tuple[float, str | None]:
    """The configured density."""
    return params.steady()
