"""Which pattern loses least in each layer and head: the search of Sparse-vDiT (arXiv 2506.03065).

Every candidate gets the width with which it costs the density that is asked for, so that all are
compared at equal work; one that costs more at its least is left out. Of each head the one with the
least squared error of the output, summed over the captures of its layer, goes into the plan file
(`vidsparse.pattern.heads`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import yaml
from torch.nn import functional

from vidsparse import registry
from vidsparse.attention import attend
from vidsparse.capturing.files import Capture
from vidsparse.config import SparseConfig
from vidsparse.geometry import fitted, plan_geometry
from vidsparse.grid import TokenGrid
from vidsparse.places import Places

METHOD = "vdit"
CANDIDATES = ("diagonal", "multi-diagonal", "diagonal + stripe 0", "multi-diagonal + stripe 0")


@dataclass(frozen=True)
class Plan:
    """patterns: of each layer, one for each head. errors: relative L2 of all outputs of a candidate
    in all heads, and of the plan. grid: that the widths are for."""

    grid: TokenGrid
    density: float
    patterns: list[list[str]]
    errors: dict[str, float]

    def text(self) -> str:
        """The plan file."""
        size = f"{self.grid.frames} x {self.grid.height} x {self.grid.width}"
        about = f"# for {size} tokens at density {self.density:g}: vidsparse bench patterns\n"
        content = {"heads": len(self.patterns[0]), "layers": self.patterns}
        return about + yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=100)


def filled(grid: TokenGrid, candidate: str, density: float) -> str | None:
    """A candidate with the width that costs the density on a grid; None: it costs more at least."""
    config = at(candidate, density)
    sizes = int(config.kernel.block_q), config.kernel.block_k
    known = plan_geometry(grid, config.layout, config.force, *sizes, torch.device("cpu"))
    places = Places(grid, known.order, known.q_blocks, known.k_blocks)
    found, blocks = fitted(places, known.forced, config.pattern, density, 0, True)
    return str(found.patterns[0]) if places.share(blocks) <= density else None


def at(candidate: str, density: float) -> SparseConfig:
    """The method with one pattern for all heads, always sparse."""
    config = SparseConfig.load(METHOD, ["schedule.name=constant", "schedule.min_tokens=0"])
    config = config.override(f"schedule.density={density}", "kernel.crossover=1")
    return replace(config, pattern=replace(config.pattern, patterns=(candidate,)))


def named_at(grid: TokenGrid, candidates: Sequence[str], density: float) -> dict[str, str]:
    """Candidate -> it with its width, those that do not cost more. Raises ValueError if all do."""
    found = {name: filled(grid, name, density) for name in candidates}
    named = {name: width for name, width in found.items() if width is not None}
    if not named:
        size = f"{grid.frames} x {grid.height} x {grid.width}"
        raise ValueError(
            f"--density {density:g}: every candidate reads more of {size} tokens, at least; ask "
            "for a higher density"
        )
    return named


def search(
    captures: Iterable[Capture],
    density: float,
    candidates: Sequence[str] = CANDIDATES,
    done: Callable[[], None] = lambda: None,
) -> Plan:
    """The plan for all layers and heads of the model that the captures are of.

    done: is told after each capture. Raises ValueError for candidates that are no patterns, layers
    or heads without a capture, and captures of unlike grids.
    """
    pattern = registry.method("pattern", "heads")
    for candidate in candidates:
        if not pattern.parts(candidate):
            raise ValueError(f"--candidate {candidate!r}: expected {pattern.ALLOWED}")
    lost: dict[tuple[int, int], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    norms: dict[tuple[int, int], float] = defaultdict(float)
    named: dict[str, str] = {}
    grid, layers = None, 0
    for one in captures:
        if grid is None:
            grid, layers = one.grid, one.about.layers
            named = named_at(grid, candidates, density)
        if one.grid != grid or one.about.layers != layers:
            raise ValueError(f"captures of unlike runs: {grid} and {one.grid}")
        heads_first = [x.float().unsqueeze(0) for x in (one.q, one.k, one.v)]
        q, k, v = (x.transpose(1, 2) for x in heads_first)
        x, y, z = heads_first
        dense = functional.scaled_dot_product_attention(x, y, z).transpose(1, 2)
        for n, head in enumerate(one.about.heads):
            norms[one.about.layer, head] += float(dense[:, :, n].square().sum())
        for name in named:
            out = attend(q, k, v, grid=grid, config=at(name, density)).out
            for n, head in enumerate(one.about.heads):
                off = (out[:, :, n] - dense[:, :, n]).square().sum()
                lost[one.about.layer, head][named[name]] += float(off)
        done()
    if grid is None:
        raise ValueError("no captures there; make some: vidsparse capture")
    heads = 1 + max(head for _, head in lost)
    missing = [(n, h) for n in range(layers) for h in range(heads) if (n, h) not in lost]
    if missing:
        layer, head = missing[0]
        raise ValueError(
            f"no capture of layer {layer} head {head}, and {len(missing) - 1} more: a plan is for "
            "all layers and heads; capture them all"
        )
    best = {place: min(found, key=found.__getitem__) for place, found in lost.items()}
    whole = sum(norms.values())
    errors = {name: (sum(one[name] for one in lost.values()) / whole) ** 0.5
              for name in named.values()}  # fmt: skip
    errors["plan"] = (sum(lost[place][name] for place, name in best.items()) / whole) ** 0.5
    patterns = [[best[n, h] for h in range(heads)] for n in range(layers)]
    return Plan(grid, density, patterns, errors)
