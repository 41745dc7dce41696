"""Numbers that are not finite, noticed while a run goes on and never by waiting for the device.

A sparse call leaves a flag for each of q, k, v and its output on the device. The flags of a step
are copied to the host in one piece when the next step starts, and looked at when the copy is seen
to have arrived, a step later as a rule, or at the end of the run.

What it means is told apart. From finite q, k and v to an output that is not finite is our fault, or
the range of the dtype: the run is lost (the next layers spread it over all tokens, and the video
would be black), so it stops with a RuntimeError. q, k or v that are not finite come from the model,
which does the same without vidsparse: that is a RuntimeWarning, and the run goes on as it would.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidsparse.plan import Branch, StepContext

WATCHED = ("q", "k", "v", "output")


@dataclass(frozen=True)
class NonFinite:
    """The first call of a step with numbers that are not finite.

    inputs: which of q, k and v were not finite before attention; empty: only its output was not.
    """

    step: int
    layer: int
    branch: Branch
    transformer: str
    inputs: tuple[str, ...]

    def __str__(self) -> str:
        what = ", ".join(self.inputs) or "output"
        where = f"step {self.step}, layer {self.layer} of {self.transformer} ({self.branch})"
        return f"{what} of attention at {where}"


class Guard:
    """Watches one run. settings: what it runs with, for the message."""

    def __init__(self, settings: str) -> None:
        self.settings = settings
        self.found: list[NonFinite] = []
        self.step = 0
        self.told = False
        self._noted: dict[torch.device, list[tuple[StepContext, Tensor]]] = {}
        self._copied: list[tuple[list[StepContext], Tensor, Any]] = []

    def note(self, context: StepContext, finite: Tensor | None) -> None:
        """A call: finite, bool [4], says of each of `WATCHED` whether all of it is; None: it is."""
        if finite is None:
            return
        if finite.device.type == "cpu":
            self._see([context], finite[None])
            self.tell()
        else:
            self._noted.setdefault(finite.device, []).append((context, finite))

    def at(self, step: int) -> None:
        """A forward of this step starts. Raises the RuntimeError of a step before it."""
        if step != self.step:
            self.step = step
            self._copy()
        copied, self._copied = self._copied, []
        for contexts, finite, event in copied:
            if event.query():
                self._see(contexts, finite)
            else:
                self._copied.append((contexts, finite, event))
        self.tell()

    def look(self) -> list[NonFinite]:
        """All that was found so far; waits for the device."""
        self._copy()
        copied, self._copied = self._copied, []
        for contexts, finite, event in copied:
            event.synchronize()
            self._see(contexts, finite)
        return self.found

    def tell(self, lost: bool = False) -> None:
        """Warn or raise, once in a run. lost: it is over, and only a warning is of use."""
        if self.told or not self.found:
            return
        self.told, first = True, self.found[0]
        if first.inputs:
            message = (
                f"not finite: {first}. The model itself has left the range of its dtype, and does "
                "so without vidsparse: the video will be black or noise; load the transformer in "
                "bfloat16 or float32"
            )
        else:
            message = (
                f"not finite: {first}, from finite q, k and v, with the settings "
                f"{self.settings!r}. The video would be black; load the transformer in bfloat16 if "
                f"it is float16, keep layer {first.layer} dense (schedule.dense_layers) or call "
                "restore_pipeline"
            )
        if not first.inputs and not lost:
            raise RuntimeError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        self.look()  # events cannot be pickled
        return self.__dict__

    def _copy(self) -> None:
        """Send what was noted to the host, without waiting for it."""
        noted, self._noted = self._noted, {}
        for device, calls in noted.items():
            finite = torch.stack([flags for _, flags in calls]).to("cpu", non_blocking=True)
            event = torch.Event(device)
            event.record()
            self._copied.append(([context for context, _ in calls], finite, event))

    def _see(self, contexts: list[StepContext], finite: Tensor) -> None:
        """Flags, bool [calls, 4], that are on the host now."""
        for context, flags in zip(contexts, finite.tolist(), strict=True):
            if all(flags) or any(context.step == found.step for found in self.found):
                continue
            bad = [name for name, fine in zip(WATCHED, flags, strict=True) if not fine]
            inputs = tuple(name for name in bad if name != "output")
            at = context
            self.found.append(NonFinite(at.step, at.layer, at.branch, at.transformer, inputs))
