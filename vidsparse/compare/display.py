"""What a person sees of a comparison: a bar over clips and frames, a table at the end."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from rich.table import Table

from vidsparse.clip_bar import ClipBar
from vidsparse.compare.comparison import Comparison
from vidsparse.compare.files import FILES
from vidsparse.compare.run import Listener
from vidsparse.compare.summary import number
from vidsparse.terminal import printable


class Display(ClipBar, Listener):
    """A bar, and at the end the figures."""

    def pair(self, arm: str, clip: str) -> None:
        self.next(arm, clip)

    def frame(self, done: int) -> None:
        self.detail(f"frame {done}")

    def finish(self, comparison: Comparison, out: Path) -> None:
        """Figures, warnings and files."""
        self.console.print(table(comparison))
        if comparison.settings.compat:
            self.console.print(conventions(comparison))
        for warning in comparison.warnings:
            self.say(f"note: {warning}")
        for why in comparison.misses:
            self.say(f"missed: {why}")
        self.say(f"{out}/")
        for name, about in FILES.items():
            self.say(f"  {name:13} {about}")


def table(comparison: Comparison) -> Table:
    """A line per arm."""
    found = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    columns = ("arm", "clips", "speed-up", "PSNR dB", "worst", "SSIM", "worst", "density")
    for column in columns:
        found.add_column(column, justify="left" if column == "arm" else "right")
    for arm in comparison.tests:
        psnr, ssim = comparison.spread(arm.name, "psnr_pool"), comparison.spread(arm.name, "ssim")
        rows = comparison.of(arm.name)
        found.add_row(
            printable(arm.name, 40) + (" (lossy)" if comparison.lossy(arm.name) else ""),
            str(len(rows)),
            number(comparison.speedup(arm.name), ".2f", "x"),
            number(psnr.mean if psnr else None, ".2f"),
            number(psnr.worst if psnr else None, ".2f"),
            number(ssim.mean if ssim else None, ".4f"),
            number(ssim.worst if ssim else None, ".4f"),
            number(comparison.mean(arm.name, "density"), ".3f"),
        )
    return found


def conventions(comparison: Comparison) -> Table:
    """A line per arm and convention of another project, means over clips."""
    found = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("arm", "as measured by", "PSNR dB", "SSIM"):
        found.add_column(column, justify="right" if column in ("PSNR dB", "SSIM") else "left")
    for arm in comparison.tests:
        for name in comparison.settings.compat:
            both = [row.measured.compat[name] for row in comparison.of(arm.name)]
            psnr, ssim = (fmean(one[measure] for one in both) for measure in ("psnr", "ssim"))
            found.add_row(printable(arm.name, 40), name, number(psnr, ".2f"), number(ssim, ".4f"))
    return found
