"""`--fail-under psnr=25,psnr.worst=20,ssim=.85`: what a comparison must reach, for use in CI."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from vidsparse.compare.sets import Spread

MEASURES = {
    "psnr": "psnr_pool",
    "psnr_y": "psnr_y",
    "psnr_mean": "psnr_mean",
    "ssim": "ssim",
    "ssim_y": "ssim_y",
    "vmaf": "vmaf",
    "xpsnr": "xpsnr",
    "lpips": "lpips",
    "tf_drop": "tf_diff",
}
"""Name in a threshold -> the measure of a clip; tf_drop is what temporal flickering loses."""

AT_MOST = ("lpips", "tf_drop")
"""Of these a threshold is the most that is allowed, of all others the least."""
PARTS = ("mean", "worst")


@dataclass(frozen=True)
class Threshold:
    """`value` that `part` ("mean" over the clips, or the "worst" clip) of a measure must reach."""

    name: str
    part: str
    value: float

    @property
    def measure(self) -> str:
        """The measure of a clip that is tested."""
        return MEASURES[self.name]

    def __str__(self) -> str:
        part = "" if self.part == "mean" else f".{self.part}"
        return f"{self.name}{part} {'<=' if self.name in AT_MOST else '>='} {self.value:g}"


def parse(text: str) -> tuple[Threshold, ...]:
    """From `name[.mean|.worst]=number,...`. Raises ValueError that names the bad part."""
    found: dict[tuple[str, str], Threshold] = {}
    for item in text.split(","):
        key, equals, number = (piece.strip() for piece in item.partition("="))
        name, _, part = key.partition(".")
        part = part or "mean"
        if not equals or name not in MEASURES or part not in PARTS:
            raise ValueError(
                f"--fail-under {item.strip()!r}: expected name=number or name.worst=number with "
                f"a name of {', '.join(MEASURES)}"
            )
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not isfinite(value):
            raise ValueError(f"--fail-under {item.strip()!r}: {number!r} is no number")
        if (name, part) in found:
            raise ValueError(f"--fail-under names {key} twice")
        found[name, part] = Threshold(name, part, value)
    return tuple(found.values())


def missed(threshold: Threshold, reached: Spread | None) -> str | None:
    """Why an arm misses a threshold, None if it reaches it.

    reached: the spread of `upwards` of the measure. None: it was not measured, which is a miss too.
    """
    if reached is None:
        return f"{threshold}: not measured"
    sign = -1 if threshold.name in AT_MOST else 1
    value = sign * (reached.mean if threshold.part == "mean" else reached.worst)
    if sign * value >= sign * threshold.value:
        return None
    where = f" ({reached.worst_clip})" if threshold.part == "worst" else ""
    return f"{threshold}: it is {value:.4g}{where}"


def upwards(measure: str, value: float) -> float:
    """A value of a measure so that more is better: of LPIPS less is."""
    return -value if measure == "lpips" else value
