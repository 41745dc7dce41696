"""All that was measured, and what follows from it: sets, pairings, the front, thresholds missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isinf
from statistics import fmean

from vidsparse.compare.arms import Arm, ClipFile
from vidsparse.compare.floor import Floor
from vidsparse.compare.measure import Measured, Settings
from vidsparse.compare.sets import Pairing, Spread, front, geometric_mean, pairing, spread
from vidsparse.compare.thresholds import Threshold, missed, upwards
from vidsparse.quality.metrics import PSNR_CAP

RANKED = ("psnr_pool", "psnr_mean", "psnr_y", "ssim", "ssim_y", "tf_diff", "vmaf", "xpsnr", "lpips")
"""Measures of a clip that are summed up over a set."""
PAIRED = ("psnr_pool", "ssim")
"""Measures in which test arms are compared with each other."""


@dataclass(frozen=True)
class Row:
    """One clip of one test arm. floor: of its lossy files, None if all are lossless."""

    arm: str
    reference: ClipFile
    test: ClipFile
    measured: Measured
    floor: Floor | None = None

    @property
    def clip(self) -> str:
        return self.reference.name

    @property
    def lossy(self) -> bool:
        return not (self.reference.clip.lossless and self.test.clip.lossless)

    @property
    def seconds(self) -> tuple[float | None, float | None]:
        """Denoising loops of the reference and of the test.

        Of a job that ran both ways, its own dense arm: the two ran in one process.
        """
        dense = ((self.test.sidecar or {}).get("arms") or {}).get("dense")
        own = float(dense["denoise_seconds"]) if dense and self.test.arm == "sparse" else None
        return own or self.reference.seconds(), self.test.seconds()

    @property
    def speedup(self) -> float | None:
        dense, test = self.seconds
        return dense / test if dense and test else None

    @property
    def density(self) -> float | None:
        """Achieved density of the sparse calls, as the test's sidecar says."""
        found = (self.test.sidecar or {}).get("density")
        return float(found) if found and self.test.arm == "sparse" else None

    @property
    def attention_density(self) -> float | None:
        """Of all self-attention calls, the dense ones counting 1."""
        found = (self.test.sidecar or {}).get("attention_density")
        return float(found) if found and self.test.arm == "sparse" else None

    def value(self, measure: str) -> float | None:
        """A measure, PSNR capped for means over clips; None if it was not taken."""
        value = self.measured.values().get(measure)
        if value is None:
            return None
        return min(float(value), PSNR_CAP) if measure.startswith("psnr") else float(value)


@dataclass(frozen=True)
class Comparison:
    """The rows of all test arms, in the order in which they were asked for.

    unmatched: clips without a counterpart. warnings: for a person. command: that asked for it.
    seed: of the bootstrap.
    """

    reference: Arm
    tests: Sequence[Arm]
    rows: Sequence[Row]
    settings: Settings
    unmatched: Sequence[str] = ()
    warnings: Sequence[str] = ()
    thresholds: Sequence[Threshold] = ()
    allowed: Sequence[str] = field(default_factory=tuple)
    command: str = ""
    seed: int = 0

    def of(self, arm: str) -> list[Row]:
        """The rows of a test arm."""
        return [row for row in self.rows if row.arm == arm]

    def lossy(self, arm: str) -> bool:
        """Whether any clip of the arm was measured on a lossy file; such arms are not ranked."""
        return any(row.lossy for row in self.of(arm))

    def values(self, arm: str, measure: str) -> dict[str, float]:
        """By clip name, of the clips that have the measure."""
        found = ((row.clip, row.value(measure)) for row in self.of(arm))
        return {clip: value for clip, value in found if value is not None}

    def spread(self, arm: str, measure: str) -> Spread | None:
        """Over the arm's clips, more being better; None if no clip has the measure."""
        values = {c: upwards(measure, v) for c, v in self.values(arm, measure).items()}
        return spread(values) if values else None

    def speedup(self, arm: str) -> float | None:
        """Geometric mean over the clips whose times are known."""
        return geometric_mean([row.speedup for row in self.of(arm) if row.speedup])

    def mean(self, arm: str, name: str) -> float | None:
        """Mean of a property of the rows ("density", "attention_density")."""
        found = [value for row in self.of(arm) if (value := getattr(row, name)) is not None]
        return fmean(found) if found else None

    def infinite(self, arm: str) -> int:
        """Number of clips that equal the reference bit for bit."""
        return sum(isinf(row.measured.metrics.psnr_pool) for row in self.of(arm))

    @cached_property
    def pairings(self) -> list[Pairing]:
        """Every two test arms that are lossless and share a clip, in the measures of `PAIRED`."""
        names = [arm.name for arm in self.tests if not self.lossy(arm.name)]
        found = []
        for n, a in enumerate(names):
            for b in names[n + 1 :]:
                for measure in PAIRED:
                    of_a, of_b = self.values(a, measure), self.values(b, measure)
                    if of_a.keys() & of_b.keys():
                        clusters = self._clusters
                        found.append(
                            pairing(measure, (a, of_a), (b, of_b), clusters, seed=self.seed)
                        )
        return found

    @cached_property
    def front(self) -> set[str]:
        """Lossless test arms that none beats in both speed-up and PSNR."""
        points = {}
        for arm in self.tests:
            gain, quality = self.speedup(arm.name), self.spread(arm.name, "psnr_pool")
            if gain is not None and quality is not None and not self.lossy(arm.name):
                points[arm.name] = gain, quality.mean
        return front(points)

    @cached_property
    def misses(self) -> list[str]:
        """What the thresholds demand and an arm does not reach."""
        return [
            f"{arm.name}: {why}"
            for arm in self.tests
            for threshold in self.thresholds
            if (why := missed(threshold, self.spread(arm.name, threshold.measure)))
        ]

    @property
    def _clusters(self) -> Mapping[str, str]:
        """Clips of one prompt are drawn together."""
        return {
            row.clip: str((row.reference.sidecar or {}).get("prompt", row.clip))
            for row in self.rows
        }
