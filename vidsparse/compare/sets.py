"""Many clips at once: one arm in numbers, two arms against each other, the front of several.

The spread between clips dwarfs the gap between methods, so arms are compared clip by clip: the
differences d_i = m_i(A) - m_i(B) over the clips that both have, and a percentile bootstrap of their
mean, in which several seeds of one prompt are drawn together.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, fsum, isfinite, log
from statistics import fmean, median

import numpy as np

RESAMPLES = 10_000
SEED = 0
LEVEL = 0.95
FEWEST = 5
"""Clips below which no interval is given."""
FEW = 20
"""Clips below which an interval is called wide."""


@dataclass(frozen=True)
class Spread:
    """One measure over the clips of an arm. worst: the lowest; p10: the 10th percentile."""

    n: int
    mean: float
    median: float
    worst: float
    worst_clip: str
    p10: float


@dataclass(frozen=True)
class Pairing:
    """Arm A minus arm B in one measure, over the clips that both have.

    low, high: 95 % interval of the mean difference, None below 5 clips; wide: fewer than 20 clips.
    better: name of the arm whose lead the interval confirms, None if it holds 0 or is missing.
    """

    measure: str
    a: str
    b: str
    n: int
    mean: float
    median: float
    low: float | None
    high: float | None
    wide: bool
    wins: int
    ties: int
    losses: int
    better: str | None


def spread(values: Mapping[str, float]) -> Spread:
    """Of finite numbers by clip name, where more is better. Raises ValueError for none."""
    if not values:
        raise ValueError("expected the values of at least one clip")
    numbers = list(values.values())
    worst = min(values, key=lambda clip: (values[clip], clip))
    p10 = float(np.percentile(numbers, 10))
    return Spread(len(numbers), fmean(numbers), median(numbers), values[worst], worst, p10)


def pairing(
    measure: str,
    a: tuple[str, Mapping[str, float]],
    b: tuple[str, Mapping[str, float]],
    clusters: Mapping[str, Hashable],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Pairing:
    """Two arms (name, values by clip). clusters: what is drawn together, by clip: the prompt.

    Raises ValueError if they share no clip.
    """
    (name_a, values_a), (name_b, values_b) = a, b
    shared = sorted(values_a.keys() & values_b.keys())
    if not shared:
        raise ValueError(f"{name_a} and {name_b} have no clip in common")
    differences = [values_a[clip] - values_b[clip] for clip in shared]
    low, high = interval(
        differences, [clusters.get(clip, clip) for clip in shared], resamples, seed
    )
    better = None
    if low is not None and high is not None and (low > 0 or high < 0):
        better = name_a if low > 0 else name_b
    return Pairing(
        measure=measure,
        a=name_a,
        b=name_b,
        n=len(shared),
        mean=fmean(differences),
        median=median(differences),
        low=low,
        high=high,
        wide=low is not None and len(shared) < FEW,
        wins=sum(d > 0 for d in differences),
        ties=sum(d == 0 for d in differences),
        losses=sum(d < 0 for d in differences),
        better=better,
    )


def interval(
    differences: Sequence[float],
    clusters: Sequence[Hashable],
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> tuple[float | None, float | None]:
    """95 % percentile interval of the mean; (None, None) below 5 clips.

    The clusters are drawn with replacement, `resamples` times, by PCG64 of `seed`; a draw's mean is
    over the clips of the clusters in it.
    """
    if len(differences) < FEWEST:
        return None, None
    names = list(dict.fromkeys(clusters))
    place = {name: n for n, name in enumerate(names)}
    owner = np.array([place[name] for name in clusters])
    sums = np.bincount(owner, weights=differences, minlength=len(names))
    sizes = np.bincount(owner, minlength=len(names))
    draws = np.random.Generator(np.random.PCG64(seed)).integers(
        len(names), size=(resamples, len(names))
    )
    means = sums[draws].sum(1) / sizes[draws].sum(1)
    low, high = np.percentile(means, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def geometric_mean(ratios: Sequence[float]) -> float | None:
    """Of speed-ups; None for none. Raises ValueError for one that is no positive number."""
    if bad := [r for r in ratios if not (isfinite(r) and r > 0)]:
        raise ValueError(f"speed-ups must be positive numbers, got {bad[0]!r}")
    return exp(fsum(map(log, ratios)) / len(ratios)) if ratios else None


def front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Names of the (speed-up, quality) points that no other point beats in both."""

    def beaten(name: str) -> bool:
        x, y = points[name]
        return any(
            u >= x and w >= y and (u > x or w > y)
            for other, (u, w) in points.items()
            if other != name
        )

    return {name for name in points if not beaten(name)}
