"""What a run did: each self-attention call with its density per head, or why it was dense."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from vidsparse.config import SparseConfig
from vidsparse.decision import Choice
from vidsparse.memory import Memory
from vidsparse.pipelines.guard import Guard, NonFinite
from vidsparse.pipelines.share import Share
from vidsparse.plan import Branch, StepContext
from vidsparse.result import AttentionResult
from vidsparse.versions import versions

SCHEMA = "vidsparse.report/1"


@dataclass(frozen=True)
class Call:
    """One self-attention call.

    head_density: kept fraction of the work per head, in (0, 1], where it was computed: to read it
    is to wait for a GPU. reason: None for a sparse call, else why it was dense: a code of
    `vidsparse.reasons.REASONS`. context_name: of the `cache_context`, None without one. seconds:
    wall-clock per stage of attention, "dense" for a dense call; on a GPU that is launch time.
    executor: of a sparse call, "" of a dense one. ordered: of a sparse call of a layout with orders
    of heads, bool [B, H], which heads have one; else None.
    """

    step: int
    layer: int
    branch: Branch
    transformer: str
    head_density: Tensor
    reason: str | None
    context_name: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    executor: str = ""
    ordered: Tensor | None = None

    @cached_property
    def density(self) -> tuple[float, ...]:
        """The head densities as numbers."""
        return tuple(self.head_density.tolist())

    @property
    def mean_density(self) -> float:
        return fmean(self.density)


@dataclass
class RunReport:
    """The last run of one pipeline; while it runs, what it did so far.

    A run whose attention is not finite ends with a RuntimeError, or warns: see `guard.py`.

    preset: as the user gave it, overrides behind. config: the method in full. steps: of the run.
    calls: in the order of execution. versions: of the packages, where the run was. choices: who
    executes sparse calls and why, with the number of calls that this decided on. share: of this
    process in a run of several, of whose heads the calls tell; None in a run of one.

    Empty (no calls, 0 steps) until the first run. A new run makes a new report, this one stays.
    """

    preset: str
    config: SparseConfig
    steps: int = 0
    calls: list[Call] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: versions())
    choices: dict[Choice, int] = field(default_factory=dict)
    share: Share | None = None

    def __post_init__(self) -> None:
        self.guard, self.memory = Guard(self.preset), Memory()
        self.settle: Callable[[], None] = _nothing  # what is to be done once, when the run ends

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "settle": _nothing}  # it knows of other processes

    @property
    def non_finite(self) -> list[NonFinite]:
        """Sparse calls with numbers that are not finite, the first of each step. To look is to wait
        for a GPU."""
        return self.guard.look()

    def add(self, context: StepContext, result: AttentionResult) -> None:
        """Note a call."""
        self.steps = context.steps
        self.calls.append(
            Call(
                context.step,
                context.layer,
                context.branch,
                context.transformer,
                result.head_density,
                result.reason,
                context.context_name,
                result.seconds,
                "" if result.reason else result.choice.executor,
                result.ordered,
            )
        )
        if result.choice.executor or result.choice.passed:
            self.choices[result.choice] = self.choices.get(result.choice, 0) + 1
        self.guard.note(context, result.finite)

    @property
    def last(self) -> Call | None:
        """The latest call, for progress displays."""
        return self.calls[-1] if self.calls else None

    @property
    def seconds(self) -> dict[str, float]:
        """Of all calls together, per stage."""
        found: dict[str, float] = defaultdict(float)
        for call in self.calls:
            for stage, spent in call.seconds.items():
                found[stage] += spent
        return dict(found)

    @property
    def density(self) -> float:
        """Mean over the sparse calls; 1.0 if there were none."""
        return _mean([call.mean_density for call in self.calls if call.reason is None])

    @property
    def attention_density(self) -> float:
        """Mean over all self-attention calls, dense ones counting 1.0; 1.0 if there were none."""
        return _mean([1.0 if call.reason else call.mean_density for call in self.calls])

    @property
    def ordered(self) -> float | None:
        """Share of the heads of sparse calls that had an order of their own; None if the layout has
        none for heads, or no call was sparse."""
        shares = [float(c.ordered.float().mean()) for c in self.calls if c.ordered is not None]
        return _mean(shares) if shares else None

    @property
    def dense_reasons(self) -> dict[str, int]:
        """Reason code -> number of dense calls, most frequent first."""
        return dict(Counter(call.reason for call in self.calls if call.reason).most_common())

    @property
    def dense_steps(self) -> tuple[int, ...]:
        """Steps, 0-based, of the whole run that the schedule makes dense in all layers."""
        return self.config.dense_steps(self.steps) if self.steps else ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        dense = self.dense_reasons
        return {
            "calls": [
                {
                    "step": call.step,
                    "layer": call.layer,
                    "branch": call.branch,
                    "transformer": call.transformer,
                    "density": list(call.density),
                    "reason": call.reason,
                    "context_name": call.context_name,
                    "seconds": dict(call.seconds),
                    "executor": call.executor,
                    "ordered": None if call.ordered is None else call.ordered.tolist(),
                }
                for call in self.calls
            ],
            "totals": {
                "density": self.density,
                "attention_density": self.attention_density,
                "ordered": self.ordered,
                "sparse_calls": len(self.calls) - sum(dense.values()),
                "dense_calls": sum(dense.values()),
                "dense_reasons": dense,
                "dense_steps": list(self.dense_steps),
                "seconds": self.seconds,
            },
            "non_finite": [asdict(found) for found in self.non_finite],
            "preset": self.preset,
            "config": self.config.to_dict(),
            "steps": self.steps,
            "versions": self.versions,
            "share": None if self.share is None else asdict(self.share),
            "choices": [{**asdict(choice), "calls": n} for choice, n in self.choices.items()],
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write all of it as JSON, to be read by `load`, here or on another machine."""
        from vidsparse.quality.frames import atomic_output  # and with it OpenCV and imageio

        text = json.dumps({"schema": SCHEMA, **self.to_dict()}, allow_nan=False)
        with atomic_output(path) as part:
            part.write_text(text + "\n", encoding="utf-8")
        return Path(path)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the density by step and layer, with the reasons of dense calls; returns the path.

        path: the suffix says the format, .png, .pdf, .svg and what else matplotlib can write.
        Raises ValueError for another suffix and for a report without calls; ImportError without
        matplotlib.
        """
        from vidsparse.pipelines.report_plot import plot  # and with it OpenCV and imageio

        return plot(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RunReport:
        """The report in a file of `save`. Raises OSError, ValueError for another file."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise KeyError(content["schema"])
            report = cls(
                content["preset"],
                SparseConfig.from_dict(content["config"]),
                content["steps"],
                [_call(**call) for call in content["calls"]],
                content["versions"],
                dict(_choice(**choice) for choice in content.get("choices", [])),
                Share(**content["share"]) if content.get("share") else None,
            )
            found = [
                NonFinite(**{**n, "inputs": tuple(n["inputs"])}) for n in content["non_finite"]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no run report of {SCHEMA!r}") from error
        report.guard.found, report.guard.told = found, True
        return report

    def __str__(self) -> str:
        dense = self.dense_reasons
        by_step: dict[int, list[Call]] = defaultdict(list)
        for call in self.calls:
            by_step[call.step].append(call)
        lines = [
            f"{self.preset}: {len(by_step)} of {self.steps} steps, {len(self.calls)} "
            f"self-attention calls, {sum(dense.values())} dense",
            f"density {self.density:.3f} in sparse calls, {self.attention_density:.3f} in all",
        ]
        if not self.calls:
            lines[0] += ": this pipeline has not run yet"
        if self.ordered is not None:
            lines.append(f"{self.ordered:.0%} of heads in an order of their own")
        if self.steps:
            lines.append(f"schedule: {self.config.dense_note(self.steps)}")
        lines += [] if self.share is None else [str(self.share)]
        lines += [f"engine {text}" for text in dict.fromkeys(map(str, self.choices))]
        if self.calls:
            lines.append("step  density  dense calls")
        for step, calls in sorted(by_step.items()):
            reasons = Counter(call.reason for call in calls if call.reason)
            why = ", ".join(f"{n} {code}" for code, n in reasons.most_common()) or "-"
            lines.append(f"{step:4d}  {fmean(call.mean_density for call in calls):7.3f}  {why}")
        if self.seconds:
            spent = ", ".join(f"{stage} {s:.2f}" for stage, s in sorted(self.seconds.items()))
            lines.append(f"seconds: {spent}")
        lines += [f"not finite: {found}" for found in self.non_finite]
        return "\n".join(lines)


def _nothing() -> None:
    return None


def _call(density: list[float], ordered: list[list[bool]] | None = None, **fields: Any) -> Call:
    """A call of a saved report."""
    who = None if ordered is None else torch.tensor(ordered)
    return Call(head_density=torch.tensor(density, dtype=torch.float64), ordered=who, **fields)


def _choice(calls: int, passed: list[list[str]], **fields: Any) -> tuple[Choice, int]:
    """A choice of a saved report, and the number of its calls."""
    return Choice(passed=tuple((name, why) for name, why in passed), **fields), calls


def _mean(values: list[float]) -> float:
    return fmean(values) if values else 1.0
