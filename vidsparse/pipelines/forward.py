"""The running forward of a transformer: written by hooks, read by its processors."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from torch import Tensor

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Site
from vidsparse.pipelines.order import Order
from vidsparse.pipelines.parallel import Ulysses
from vidsparse.pipelines.report import RunReport
from vidsparse.plan import StepContext


@dataclass(frozen=True)
class RealRows:
    """The text rows of one sample that are no padding.

    count: how many. index: int64 [count], which; None: the first ones. of: among how many rows of
    text, None if that is not known.
    """

    count: int
    index: Tensor | None = None
    of: int | None = None

    def fit(self, rows: int) -> bool:
        """Whether they can be those of a text with so many rows."""
        return self.count <= rows and self.of in (None, rows)


def real_rows(rows: Tensor) -> tuple[RealRows, ...]:
    """What `RealText.rows` gives, for each sample; waits for the device."""
    if rows.ndim == 1:
        return tuple(RealRows(count) for count in rows.tolist())
    found = []
    for real, first in zip(rows, rows.cpu(), strict=True):
        count = int(first.sum())
        index = None if first[:count].all() else real.nonzero().flatten()
        found.append(RealRows(count, index, len(first)))
    return tuple(found)


class Forward(threading.local):
    """grid, order, context, report: of this thread's running forward; all None outside of one.

    report: where its calls are noted. ulysses: how its tokens are split between processes, None if
    they are not. real_text: of each sample, None if that is not known.
    entries: submodules that must bring tokens or positions into the order; missing: those that have
    not run since the exit, arrived: those that have. entered, left: whether one of them has run at
    all, and the exit since.

    What wraps `module.forward` may run it several times: on halves of a batch, or again after an
    error.
    """

    def __init__(self) -> None:
        self.grid: TokenGrid | None = None
        self.order: Order | None = None
        self.context: StepContext | None = None
        self.report: RunReport | None = None
        self.ulysses: Ulysses | None = None
        self.real_text: tuple[RealRows, ...] | None = None
        self.entries: tuple[str, ...] = ()
        self.missing: set[str] = set()
        self.arrived: set[str] = set()
        self.entered = self.left = False

    def begin(self, order: Order, entries: tuple[str, ...]) -> None:
        """A forward starts, whatever became of the one before."""
        self.grid, self.order, self.context, self.report = order.grid, order, None, None
        self.ulysses = self.real_text = None
        self.entries, self.missing, self.arrived = entries, set(entries), set()
        self.entered = self.left = False

    def arrive(self, name: str) -> None:
        """What passes at an entry is in the order."""
        self.missing.discard(name)
        self.arrived.add(name)
        self.entered, self.left = True, False

    def leave(self) -> None:
        """Tokens are in raster order again."""
        self.missing, self.arrived, self.left = set(self.entries), set(), True

    def require_entries(self) -> None:
        """Raise RuntimeError if tokens and positions are not all in the order, where they must."""
        if self.order is not None and self.missing:
            raise RuntimeError(_around(self.missing, "so tokens and positions do not match"))

    def clear(self) -> None:
        """No forward is running."""
        self.grid = self.order = self.context = self.report = None
        self.ulysses = self.real_text = None

    def end(self, exit: Site | None) -> None:
        """The forward has come to its end. Raise RuntimeError if it left the exit out.

        A forward in which no hooked module ran is whole: a program that was exported with the
        hooks in it, or an output that someone kept.
        """
        self.clear()
        if exit is not None and self.entered and not self.left:
            raise RuntimeError(_around({exit.name}, "so its output is not in raster order"))


def _around(names: set[str], so: str) -> str:
    return (
        f"the vidsparse hook on {', '.join(sorted(names))} did not run in this forward, {so}: the "
        "forward of the transformer must call its submodules (module(x), not module.forward(x)); "
        "if it cannot, restore_pipeline first"
    )
