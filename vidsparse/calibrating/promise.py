"""What the videos of a few prompts say of those of others, and how exact a table must be for it.

Prompts are unlike: with one table their PSNRs lie many dB apart, so that the mean over a few says
little of the mean over all. `--psnr X` therefore holds the mean over all prompts like those that
were measured, with a confidence: Student's bound, one-sided,

    mean - t(CONFIDENCE, n - 1) s / sqrt(n) >= X

with s the standard deviation over n prompts. Between tables a prompt moves with their exactness,
-10 log10 of the summed squared errors of heads: PSNR = exactness + offset of the prompt, which is
what it means that errors add up in the video, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, log10, sqrt
from statistics import fmean, stdev

CONFIDENCE = 0.9
"""Of ten calibrations nine hold what they promise, if prompts are drawn alike."""

SPREAD = 4.5
"""Standard deviation over prompts that is taken while fewer than 3 are seen, dB, as measured on the
demo model. It decides with which tables prompts are run, never what is promised."""


@dataclass(frozen=True)
class Seen:
    """A video of a prompt. exact: exactness of its table, dB; inf: all heads are dense. psnr: of
    the video against the dense one, dB."""

    exact: float
    psnr: float

    def at(self, exact: float) -> float:
        """PSNR that its prompt has with a table of another exactness."""
        return self.psnr if exact == self.exact else self.psnr + exact - self.exact


def exactness(error: float) -> float:
    """Of a table, dB. error: sum of the squared errors of its heads."""
    return -10 * log10(error) if error > 0 else inf


def margin(psnr: Sequence[float], prompts: int | None = None) -> float:
    """dB between the mean over prompts and what is promised; 0 of one, whose spread is unknown.

    prompts: how many there will be, with the spread of these, or `SPREAD` if these are too few to
    tell; None: these.
    """
    n = prompts or len(psnr)
    if n < 2:
        return 0.0
    from scipy.special import stdtrit

    spread = SPREAD if len(psnr) < min(3, n) else stdev(psnr)
    return float(stdtrit(n - 1, CONFIDENCE)) * spread / sqrt(n)


def needed(target: float, seen: Sequence[Seen], prompts: int) -> float:
    """Exactness of the table with which the promise of `target` dB holds, were `prompts` seen.

    Videos of dense tables say nothing; without any other it is inf.
    """
    offsets = [one.at(0.0) for one in seen if isfinite(one.exact)]
    if not offsets:
        return inf
    return target + margin(offsets, prompts) - fmean(offsets)
