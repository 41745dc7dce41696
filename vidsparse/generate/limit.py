"""What sparse attention can make of a loop at most: Amdahl's law, from the calls of one run."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from vidsparse.pipelines.report import RunReport


def limit(dense_seconds: float, report: RunReport | None, device: str) -> dict[str, Any] | None:
    """The bound on the speed-up of a denoising loop if a sparse call cost its share of the work.

    dense_seconds: of the loop of the dense run. Its self-attention takes, in the calls that are
    sparse in the other run, n times the mean time a of that run's dense calls; with T the seconds
    of the loop and d the density of those calls

        share = n a / T        speedup = T / (T - n a (1 - d))

    None: without dense and sparse calls, and on a GPU, where the time of a call is not known.
    """
    if report is None or not device.startswith("cpu"):
        return None
    dense = [call.seconds["dense"] for call in report.calls if "dense" in call.seconds]
    sparse = [call for call in report.calls if call.reason is None]
    if not dense or not sparse:
        return None
    spent = min(len(sparse) * fmean(dense), dense_seconds)
    left = dense_seconds - spent * (1 - fmean(call.mean_density for call in sparse))
    return {"share": spent / dense_seconds, "speedup": dense_seconds / left}
