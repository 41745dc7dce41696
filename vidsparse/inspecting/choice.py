"""What is looked at: steps, layers, heads and a query, checked as early as can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vidsparse import registry
from vidsparse.config import SparseConfig
from vidsparse.generate.model_files import InputError
from vidsparse.plan import StepContext

MOST_LAYERS, MOST_HEADS = 3, 4
"""Of which pictures are made if the user has not chosen; the figures cover all of them."""


@dataclass(frozen=True)
class Choice:
    """steps: whose calls are measured, in all layers and heads. layers, heads: of the pictures.

    query: frame, row and column of a token, whose query tile the pictures follow.
    """

    steps: tuple[int, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    query: tuple[int, int, int]


def choose_steps(config: SparseConfig, steps: int, asked: Sequence[int]) -> tuple[int, ...]:
    """The steps asked for; none: the first, the middle and the last that can be sparse.

    Raises InputError for steps that the run does not have, or that its schedule makes dense.
    """
    dense = set(config.dense_steps(steps))
    sparse = [step for step in range(steps) if step not in dense]
    if not sparse:
        raise InputError(
            f"the schedule makes all {steps} steps dense, so there is no plan to look at: take "
            "more --steps, or --set schedule.dense_steps=0 and a schedule.density below 1"
        )
    for step in asked:
        if step not in sparse:
            why = "dense by the schedule" if step in dense else f"not in this run of {steps} steps"
            raise InputError(f"--step {step}: {why}; allowed: {spans(sparse)}")
    if asked:
        return tuple(sorted(set(asked)))
    return tuple(sorted({sparse[0], sparse[len(sparse) // 2], sparse[-1]}))


def choose_parts(
    config: SparseConfig,
    steps: Sequence[int],
    of: int,
    layers: int,
    heads: int,
    asked: tuple[Sequence[int], Sequence[int]],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Layers and heads of the pictures. of: steps of the run; layers, heads: of the model.

    Raises InputError for what the model does not have, and for layers that are dense in all of the
    chosen steps.
    """
    density_at = registry.method("schedule", config.schedule.name).density_at
    sparse = [
        layer
        for layer in range(layers)
        if any(density_at(StepContext(s, of, layer, layers), config.schedule)[1] is None
               for s in steps)
    ]  # fmt: skip
    if not sparse:
        raise InputError(
            f"the schedule makes all {layers} layers dense in step {spans(steps)}: nothing to see; "
            "choose another --step, or --set schedule.dense_layers=[]"
        )
    for layer in asked[0]:
        if layer not in sparse:
            why = "dense by the schedule" if 0 <= layer < layers else f"the model has {layers}"
            raise InputError(f"--layer {layer}: {why}; allowed: {spans(sparse)}")
    for head in asked[1]:
        if not 0 <= head < heads:
            raise InputError(
                f"--head {head}: the model has {heads}; allowed: {spans(range(heads))}"
            )
    return (
        tuple(sorted(set(asked[0]))) or _spread(sparse, MOST_LAYERS),
        tuple(sorted(set(asked[1]))) or _spread(range(heads), MOST_HEADS),
    )


def choose_query(text: str | None, size: tuple[int, int, int]) -> tuple[int, int, int]:
    """A token of the grid (frames, rows, columns) from "frame,row,column"; None: the centre."""
    if text is None:
        frame, row, column = (n // 2 for n in size)
        return frame, row, column
    try:
        frame, row, column = (int(part) for part in text.split(","))
        inside = all(0 <= n < most for n, most in zip((frame, row, column), size, strict=True))
    except ValueError:
        inside = False
    if not inside:
        most = ",".join(str(n - 1) for n in size)
        raise InputError(
            f"--query {text}: expected FRAME,ROW,COLUMN of a token, from 0,0,0 to {most}"
        )
    return frame, row, column


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: 0, 3 .. 7."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} .. {r[-1]}" for r in runs)


def _spread(numbers: Sequence[int], most: int) -> tuple[int, ...]:
    """At most so many of them, evenly spaced, first and last included."""
    if len(numbers) <= most:
        return tuple(numbers)
    return tuple(numbers[round(i * (len(numbers) - 1) / (most - 1))] for i in range(most))
