"""For which transformers a preset was calibrated, and which preset was for those of a pipeline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vidsparse.config import Calibrated, SparseConfig
from vidsparse.grid import TokenGrid
from vidsparse.pipelines.recognition import adapter_for
from vidsparse.shipped import folder

PLACES = (Path("presets"),)
"""Where presets of users are looked for, before the shipped ones."""


def identity(pipe: Any) -> str:
    """16 hex digits that tell the form of a pipeline's transformers: their classes and settings, as
    diffusers keeps them. Weights are no part: a finetune is like its base."""
    facts = {}
    for name, transformer in adapter_for(pipe).transformers(pipe).items():
        settings: Any = transformer.config
        config = {k: v for k, v in dict(settings).items() if not k.startswith("_")}
        facts[name] = type(transformer).__name__, config
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def of_another_model(made: Calibrated, pipe: Any) -> str:
    """What to know of a preset that was calibrated for other transformers; "" if it was not."""
    if not made.transformer or made.transformer == identity(pipe):
        return ""
    return (
        f"its densities were calibrated on {made.model}, and this pipeline has another "
        "transformer: what they keep of the picture here is not known; `vidsparse calibrate` makes "
        "a preset for it"
    )


def of_another_run(made: Calibrated, grid: TokenGrid, steps: int) -> str:
    """The same of a video of another size, or of another number of steps."""
    if not made.id:
        return ""
    size = grid.frames, grid.height, grid.width
    differs = []
    if size != made.tokens:
        differs.append(f"{'x'.join(map(str, made.tokens))} tokens, and these are "
                       f"{'x'.join(map(str, size))}")  # fmt: skip
    if steps != made.steps:
        differs.append(f"{made.steps} steps, and these are {steps}")
    if not differs:
        return ""
    return (
        f"its densities were calibrated on {' and on '.join(differs)}: what they keep of the "
        "picture here is not known; `vidsparse calibrate` makes a preset for this size"
    )


def calibrated_for(pipe: Any, target: str | None) -> Path:
    """The calibrated preset of a pipeline, of the user's or shipped.

    target: "psnr30", "speedup1.8", "error0.05"; None: whichever there is. The user's own go before
    shipped ones. Raises ValueError if there is none, or if several are and none is named.
    """
    mine = identity(pipe)
    fitting = _fitting(_own(), mine, target) or _fitting(_shipped(), mine, target)
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    what = f"for target={target!r}" if target else ""
    if fitting:
        raise ValueError(
            f"preset 'auto': there are presets calibrated for this model with the targets "
            f"{', '.join(sorted(fitting))}: name one, as target={sorted(fitting)[0]!r}"
        )
    raise ValueError(
        f"preset 'auto': no preset is calibrated for this {type(pipe).__name__} {what}".rstrip()
        + f" in {', '.join(map(str, PLACES))}/ or among the shipped ones: make one with "
        "`vidsparse calibrate`, or name a preset"
    )


def _fitting(files: Iterable[Path], transformers: str, target: str | None) -> dict[str, Path]:
    """Of each target the first preset that was calibrated for these transformers."""
    fitting: dict[str, Path] = {}
    for file in files:
        try:
            made = SparseConfig.load(file).calibrated
        except (OSError, ValueError):
            continue  # another program's, or a user's slip: it is none that was found
        if made.transformer == transformers and target in (None, made.target):
            fitting.setdefault(made.target, file)
    return fitting


def _own() -> Iterator[Path]:
    for place in PLACES:
        yield from sorted(place.glob("*.yaml"))


def _shipped() -> list[Path]:
    return sorted(folder("configs/calibrated").glob("*.yaml"))
