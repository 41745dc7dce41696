"""What a calibration reached, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vidsparse.calibrating.goal import Goal
from vidsparse.calibrating.promise import CONFIDENCE
from vidsparse.generate.job import Job


def reached(content: dict[str, Any]) -> str:
    """The figures of a result, in words."""
    parts = [f"density {content['density']:.3f}", f"error {content['error']:.3f}"]
    parts.append(f"{content['speedup']:.2f}x as fast by the costs of calls")
    if content["psnr"] is not None:
        parts.append(_promised(content))
    if content["held_out_psnr"]:
        parts.append(f"held-out prompts {_list(content['held_out_psnr'])} dB")
    return ", ".join(parts)


def _promised(content: dict[str, Any]) -> str:
    """What the PSNRs of prompts say of others, in words."""
    each, mean = content["prompt_psnr"], content["psnr"]
    if len(each) == 1:
        return f"{mean:.1f} dB on one prompt, which says nothing of others"
    near = f", run with tables within {content['moved']:.1f} dB of it" if content["moved"] else ""
    return (
        f"mean {mean:.1f} dB on {len(each)} prompts ({_list(each)}{near}), so at least "
        f"{mean - content['margin']:.1f} dB in the mean over such prompts at "
        f"{CONFIDENCE * 100:.0f} % confidence"
    )


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{one:.1f}" for one in values)


def about(job: Job, goal: Goal, content: dict[str, Any]) -> str:
    height, width, frames = job.size
    return (
        f"Calibrated on {job.model.name}, {width}x{height}, {frames} frames, {job.steps} steps, "
        f"for {goal.words}: {content['reached']}."
    )
