"""Which pattern loses least in each layer and head: a plan file (`vidsparse.head_plans`).

At equal work, the search of Sparse-vDiT (arXiv 2506.03065): every candidate gets the width with
which it costs the density that is asked for; one that costs more at its least is left out. Of each
head the one with the least squared error of the output, summed over the captures of its layer, goes
into the plan.

Under a bound, as Sliding Tile Attention (arXiv 2502.04507) spends less on heads that need less: of
the candidates whose relative error of a head's output is at most the bound the one that costs
least, whatever that is; of a head without one that with the least error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
import yaml
from torch.nn import functional

from vidsparse import registry
from vidsparse.attention import attend
from vidsparse.capturing.files import Capture
from vidsparse.config import SparseConfig
from vidsparse.geometry import WHOLE, fitted, plan_geometry
from vidsparse.grid import TokenGrid
from vidsparse.places import Places

PRESET = "vdit"


@dataclass(frozen=True)
class Plan:
    """patterns: of each layer, one for each head. errors: relative L2 of all outputs of a candidate
    in all heads, and of the plan. grid: that the widths are for. density: that
    `schedule.density` must be, of the layer that reads most where there was a bound."""

    preset: str
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


def filled(
    grid: TokenGrid, candidate: str, density: float, preset: str = PRESET, bound: bool = False
) -> tuple[str, float] | None:
    """A candidate with the width that costs the density on a grid, and what it costs; None: it
    costs more at least, and there is no bound."""
    config = at(candidate, density, preset)
    sizes = int(config.kernel.block_q), config.kernel.block_k
    known = plan_geometry(grid, config.layout, config.force, *sizes, torch.device("cpu"))
    places = Places(grid, known.order, known.q_blocks, known.k_blocks)
    found, blocks = fitted(places, known.forced, config.pattern, density, 0, True)
    share = places.share(blocks)
    if share > density and not bound:
        return None
    return registry.method("pattern", config.pattern.name).name_of(found), share


def at(candidate: str, density: float, preset: str = PRESET) -> SparseConfig:
    """A preset with one pattern for all heads, always sparse. Raises ValueError."""
    config = SparseConfig.load(preset, ["schedule.name=constant", "schedule.min_tokens=0"])
    config = config.override(f"schedule.density={min(density, WHOLE)}", "kernel.crossover=1")
    pattern = plannable(config)
    return replace(config, pattern=pattern.named(candidate, config.pattern))


def plannable(config: SparseConfig) -> Any:
    """The pattern of a preset, of which there can be a plan. Raises ValueError."""
    pattern = registry.method("pattern", config.pattern.name)
    if not hasattr(pattern, "named"):
        raise ValueError(
            f"pattern.name={config.pattern.name!r} has no plan files: take preset vdit or sta"
        )
    return pattern


def named_at(
    grid: TokenGrid,
    candidates: Sequence[str],
    density: float,
    preset: str = PRESET,
    bound: bool = False,
) -> dict[str, tuple[str, float]]:
    """Candidate -> it with its width, and what it costs, of those that do not cost more, or of all
    where there is a bound. Raises ValueError if all do."""
    found = {name: filled(grid, name, density, preset, bound) for name in candidates}
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
    candidates: Sequence[str] = (),
    done: Callable[[], None] = lambda: None,
    preset: str = PRESET,
    bound: float | None = None,
) -> Plan:
    """The plan for all layers and heads of the model that the captures are of.

    candidates: empty: those of the preset's pattern. done: is told after each capture. bound:
    relative error that a head may have, in (0, 1); None: all at equal work. Raises ValueError for
    candidates that are no patterns, layers or heads without a capture, and captures of unlike
    grids.
    """
    candidates = _checked(candidates, preset)
    lost: dict[tuple[int, int], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    norms: dict[tuple[int, int], float] = defaultdict(float)
    named: dict[str, tuple[str, float]] = {}
    grid, layers = None, 0
    for one in captures:
        if grid is None:
            grid, layers = one.grid, one.about.layers
            named = named_at(grid, candidates, density, preset, bound is not None)
        if one.grid != grid or one.about.layers != layers:
            raise ValueError(f"captures of unlike runs: {grid} and {one.grid}")
        heads_first = [x.float().unsqueeze(0) for x in (one.q, one.k, one.v)]
        q, k, v = (x.transpose(1, 2) for x in heads_first)
        x, y, z = heads_first
        dense = functional.scaled_dot_product_attention(x, y, z).transpose(1, 2)
        for n, head in enumerate(one.about.heads):
            norms[one.about.layer, head] += float(dense[:, :, n].square().sum())
        for name, (whole_name, share) in named.items():
            config = at(name if share <= density else whole_name, max(density, share), preset)
            out = attend(q, k, v, grid=grid, config=config).out
            for n, head in enumerate(one.about.heads):
                off = (out[:, :, n] - dense[:, :, n]).square().sum()
                lost[one.about.layer, head][whole_name] += float(off)
        done()
    if grid is None:
        raise ValueError("no captures there; make some: vidsparse capture")
    heads = _all_heads(lost, layers)
    costs = dict(named.values())
    best = {place: _best(found, costs, norms[place], bound) for place, found in lost.items()}
    whole = sum(norms.values())
    errors = {name: (sum(one[name] for one in lost.values()) / whole) ** 0.5 for name in costs}
    errors["plan"] = (sum(lost[place][name] for place, name in best.items()) / whole) ** 0.5
    patterns = [[best[n, h] for h in range(heads)] for n in range(layers)]
    if bound is not None:
        most = max(sum(costs[name] for name in layer) / heads for layer in patterns)
        density = min(WHOLE, ceil(1000 * most) / 1000)
    return Plan(preset, grid, density, patterns, errors)


def _checked(candidates: Sequence[str], preset: str) -> tuple[str, ...]:
    """What is chosen among. Raises ValueError."""
    config = SparseConfig.load(preset)
    pattern = plannable(config)
    for candidate in candidates:
        try:
            pattern.named(candidate, config.pattern)
        except ValueError:
            raise ValueError(f"--candidate {candidate!r}: expected {pattern.ALLOWED}") from None
    return tuple(candidates) or tuple(pattern.CANDIDATES)


def _all_heads(lost: Mapping[tuple[int, int], object], layers: int) -> int:
    """How many heads each layer has. Raises ValueError unless all of them are there."""
    heads = 1 + max(head for _, head in lost)
    missing = [(n, h) for n in range(layers) for h in range(heads) if (n, h) not in lost]
    if missing:
        layer, head = missing[0]
        raise ValueError(
            f"no capture of layer {layer} head {head}, and {len(missing) - 1} more: a plan is for "
            "all layers and heads; capture them all"
        )
    return heads


def _best(
    lost: Mapping[str, float], costs: Mapping[str, float], norm: float, bound: float | None
) -> str:
    """The candidate of a head; lost: its squared errors."""
    if bound is not None:
        good = [name for name in lost if lost[name] <= bound**2 * norm]
        if good:
            return min(good, key=lambda name: (costs[name], lost[name]))
    return min(lost, key=lost.__getitem__)
