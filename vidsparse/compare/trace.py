"""What the report page shows of attention: density and reasons by step and layer, time by stage."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from vidsparse.compare.comparison import Row
from vidsparse.jobs.layout import read_report
from vidsparse.reasons import REASONS

NO_CALL = 255
"""Code of a step and layer in which attention was not called: a step cache, for example."""


def trace(row: Row) -> dict[str, Any] | None:
    """Steps, layers, and by transformer and guidance branch the densities and reasons of all calls.

    density: uint8 [steps, layers, heads], times 255; reason: uint8 [steps, layers], a place in
    `reasons` (0: sparse) or `NO_CALL`; both as base64. None where no report lies beside the clip.
    """
    report = _report(row)
    if report is None or not report["calls"]:
        return None
    calls = report["calls"]
    steps = 1 + max(call["step"] for call in calls)
    layers = 1 + max(call["layer"] for call in calls)
    codes = list(dict.fromkeys(call["reason"] for call in calls if call["reason"]))
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for call in calls:
        groups[f"{call['transformer']}, {call['branch']}"].append(call)
    return {
        "steps": steps,
        "layers": layers,
        "reasons": ["sparse", *(REASONS.get(code, code) for code in codes)],
        "groups": [
            {"name": name, **_packed(found, steps, layers, codes)} for name, found in groups.items()
        ],
    }


def _packed(
    calls: list[Mapping[str, Any]], steps: int, layers: int, codes: list[str]
) -> dict[str, Any]:
    heads = max(len(call["density"]) for call in calls)
    density = np.zeros((steps, layers, heads), np.uint8)
    reason = np.full((steps, layers), NO_CALL, np.uint8)
    for call in calls:
        at = call["step"], call["layer"]
        density[at] = np.rint(255 * np.array(call["density"]))
        reason[at] = 1 + codes.index(call["reason"]) if call["reason"] else 0
    return {"heads": heads, "density": _text(density), "reason": _text(reason)}


def times(row: Row) -> dict[str, Any] | None:
    """Seconds of every step by stage of attention, and the reference's, predicted and measured sum.

    With T the reference's time, R what is not attention in the test and d the density of all its
    self-attention calls: predicted = R + (T - R) d. None where the sidecar has no steps.
    """
    arm = (((row.test.sidecar or {}).get("arms") or {}).get(row.test.arm)) or {}
    steps = arm.get("step_seconds")
    if not steps:
        return None
    stages = _stages(row, len(steps))
    spent = [sum(stage[n] for stage in stages.values()) for n in range(len(steps))]
    rest = [max(0.0, whole - part) for whole, part in zip(steps, spent, strict=True)]
    reference, measured = row.seconds
    predicted = None
    if reference and stages and row.attention_density:
        predicted = sum(rest) + max(0.0, reference - sum(rest)) * row.attention_density
    return {
        "stages": [
            *({"name": name, "seconds": seconds} for name, seconds in stages.items()),
            {"name": "everything else" if stages else "whole step", "seconds": rest},
        ],
        "reference": reference,
        "predicted": predicted,
        "measured": measured,
    }


def _stages(row: Row, steps: int) -> dict[str, list[float]]:
    """Stage of attention -> seconds in every step; empty where nobody knows."""
    found: dict[str, list[float]] = {}
    for call in (_report(row) or {}).get("calls", ()):
        for stage, seconds in (call.get("seconds") or {}).items():
            if call["step"] < steps:
                found.setdefault(stage, [0.0] * steps)[call["step"]] += seconds
    return found


def _report(row: Row) -> dict[str, Any] | None:
    """The run report of the job that made the test clip."""
    if row.test.sidecar is None or row.test.arm != "sparse":
        return None
    return read_report(row.test.clip.path.parent)


def _text(array: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")
