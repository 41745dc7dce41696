"""A goal, and the cheapest table of densities that reaches it: an integer programme.

Every cell (group of steps, layer, head) gets exactly one of the levels. With c the cost and e the
error of a cell at a level, x in {0, 1} its choice:

    min  sum c x  with  sum e x <= budget of error     (cost under an error)
    min  sum e x  with  sum c x <= budget of cost      (error under a cost)

and for each cell sum over levels of x = 1. It is solved by HiGHS to a gap of one in a thousand.
Groups have no weights. What a group at density 0.1 did to a video of the demo model was, first
group to last, 3.1, 1.1 and 13 squared 8-bit steps for one prompt and 103, 16 and 60 for another:
one prompt's weights starve the steps that the next one needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Table = npt.NDArray[np.int64]

GAP = 1e-3
SECONDS = 60.0

Kind = Literal["psnr", "error", "speedup"]
BOUNDS: dict[Kind, tuple[float, float, str]] = {
    "psnr": (10.0, 60.0, "dB against the dense video"),
    "error": (1e-4, 1.0, "relative error of attention"),
    "speedup": (1.0, 20.0, "times as fast as dense"),
}
"""Least and largest target of a kind, and what it is."""


@dataclass(frozen=True)
class Goal:
    """kind: psnr, in dB, of the video against that of dense attention, mean over all prompts like
    those measured, with the confidence of `vidsparse.calibrating.promise`; error, of the outputs of
    attention, root of the mean over groups of steps and layers of their squared relative errors;
    speedup, of the denoising loop. value: at least (error: at most) so much."""

    kind: Kind
    value: float

    def __post_init__(self) -> None:
        least, most, what = BOUNDS[self.kind]
        if not least <= self.value <= most:
            raise ValueError(
                f"--{self.kind} {self.value:g}: expected {least:g} .. {most:g}, {what}"
            )

    def __str__(self) -> str:
        return f"{self.kind}{self.value:g}"

    @property
    def words(self) -> str:
        """For people."""
        return f"{self.kind} {self.value:g}, {BOUNDS[self.kind][2]}"


def cheapest(cost: Array, error: Array, budget: float) -> Table:
    """Level of each cell, int [groups, layers, heads]: least cost with sum of error <= budget.

    cost: [levels]. error: [groups, layers, heads, levels], >= 0. Where no table is
    within the budget, that of least error.
    """
    least = error.min(-1).sum()
    if budget <= least:
        least_error: Table = error.argmin(-1)
        return least_error
    return _solve(np.broadcast_to(cost, error.shape), error, budget)


def most_exact(cost: Array, error: Array, budget: float) -> Table:
    """As `cheapest`: least error with sum of cost <= budget; below all costs, the cheapest."""
    costs = np.broadcast_to(cost, error.shape)
    if budget <= costs.min(-1).sum():
        least_cost: Table = costs.argmin(-1)
        return least_cost
    return _solve(error, costs, budget)


def chosen(values: Array, table: Table) -> Array:
    """Of each cell its value, [groups, layers, heads]; values [.., levels]."""
    return np.take_along_axis(values, table[..., None], -1)[..., 0]


def require_scipy() -> None:
    """Raises ImportError with the cure if it is missing."""
    try:
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        raise ImportError("calibration needs scipy: pip install 'vidsparse[calibrate]'") from error


def _solve(aim: Array, bounded: Array, budget: float) -> Table:
    """Least sum of `aim` with sum of `bounded` <= budget."""
    require_scipy()
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, eye_array, kron, vstack

    cells, levels = aim[..., 0].size, aim.shape[-1]
    one_each = kron(eye_array(cells), np.ones((1, levels)))
    rows = vstack([one_each, csr_array(bounded.reshape(1, -1) / budget)], format="csr")
    found = milp(
        aim.ravel() / max(aim.max(), 1e-300),
        integrality=np.ones(cells * levels),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(rows, np.r_[np.ones(cells), 0.0], np.r_[np.ones(cells), 1.0]),
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if found.x is None:
        raise RuntimeError(f"no table was found: {found.message}")
    table: Table = found.x.reshape(*aim.shape[:-1], levels).argmax(-1)
    return table
