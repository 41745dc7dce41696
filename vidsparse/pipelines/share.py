"""Share: the part of a run that one of several processes computes, and how evenly heads fell.

Diffusers gives each process the same number of heads, the same ones in every call. Where a
selector follows the data more than a budget (topp), heads cost differently, and a call takes as
long as the process with the dearest ones. To give them out by cost is not possible inside of that
scheme: which heads a process gets follows from its rank, and the all-to-all takes equal numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Share:
    """rank: of the process. degree: how many there are. imbalance: see `imbalance_of`; None while
    the run goes on, or if no call was sparse."""

    rank: int
    degree: int
    imbalance: float | None = None

    def __str__(self) -> str:
        text = f"share {self.rank + 1} of {self.degree} of the heads"
        if self.imbalance is None:
            return text
        return f"{text}; the dearest computes {self.imbalance:.2f} times the mean of all"


def imbalance_of(density: Tensor) -> float | None:
    """Work of the dearest process in every sparse call, over the mean of all: 1 is even.

    density: [processes, calls], each the mean of the heads there, 1.0 for a dense call.
    """
    sparse = density[:, (density < 1).any(0)]
    if not sparse.shape[1]:
        return None
    return float(sparse.amax(0).sum() / sparse.mean(0).sum())
