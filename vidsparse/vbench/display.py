"""What a person sees of it: a bar over the clips, a table of the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from vidsparse.clip_bar import ClipBar
from vidsparse.vbench.export import Listener
from vidsparse.vbench.importing import tabular


class Display(ClipBar, Listener):
    """A bar over the clips that are written."""

    def clip(self, arm: str, name: str) -> None:
        self.next(arm, name)


def table(added: Mapping[str, Any]) -> Table:
    """A line per dimension and score, a column per arm. added: what `importing.merge` returned."""
    header, rows = tabular(added)
    found = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    found.add_column("")
    for cells in rows:
        found.add_column(cells[0], justify="right")
    for n, title in enumerate(header[1:], 1):
        found.add_row(title, *(cells[n] for cells in rows))
    return found
