"""A prediction as figures ready for JSON, and as a table that fits 80 columns."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from vidsparse.costs import sharing
from vidsparse.costs.clock import ERRORS, constant
from vidsparse.costs.machine import in_words
from vidsparse.costs.memory import COUNTED, memory
from vidsparse.costs.run import Prediction
from vidsparse.costs.stage import (
    AROUND,
    CROSS,
    DENSE,
    ELEMENTWISE,
    EXACT,
    EXCHANGE,
    KEPT,
    LINEAR,
)
from vidsparse.predict.subject import Subject

WIDTH = 80
ORDER = (LINEAR, CROSS, ELEMENTWISE, DENSE, EXACT, *AROUND, KEPT, EXCHANGE)

LOOP = "denoising loop; without text encoder and VAE"


def figures(subject: Subject, found: Prediction) -> dict[str, Any]:
    """Seconds, bytes, densities in (0, 1]; errors are standard errors, relative."""
    plan, machine = found.plan, found.machine
    height, width, frames = subject.size
    dense, sparse = found.dense_step, found.sparse_step
    stages = {}
    for name in ORDER:
        taken = [step.stages.get(name, 0.0) for step in (dense, sparse)]
        step = sparse if taken[1] else dense
        if any(taken):
            limit = step.limit(name)
            source = constant(name, limit, machine).source
            stages[name] = {"dense": taken[0], "sparse": taken[1], "limit": limit, "source": source}
    constants = {**machine.constants, **{f"{n}, whole": c for n, c in machine.slower.items()}}
    return {
        "model": subject.model.name,
        "height": height,
        "width": width,
        "frames": frames,
        "steps": plan.steps,
        "tokens": plan.forward.tokens,
        "forwards_per_step": plan.branches,
        "ulysses": plan.devices,
        "sent_per_step": sharing.sent(plan.forward, plan.devices)
        * plan.forward.layers
        * plan.branches,
        "dtype": plan.forward.dtype,
        "preset": subject.preset,
        "dense_steps": found.dense_steps,
        "density": found.density,
        "spends_budget": plan.config.selector.spends_budget,
        "keep_gigabytes": plan.config.keep.gigabytes,
        "gpu": machine.is_gpu,
        "machine": {"name": machine.name, "about": machine.about, "sources": machine.sources()},
        "constants": {
            name: {"value": c.value, "error": c.error, "source": c.source, "from": c.origin}
            for name, c in constants.items()
        },
        "stages": stages,
        "step_seconds": {"dense": dense.seconds, "sparse": sparse.seconds},
        "run_seconds": {"dense": found.dense_run.seconds, "sparse": found.sparse_run.seconds},
        "covers": LOOP,
        "speedup": found.speedup,
        "errors": found.errors,
        "crossover_density": found.balance,
        "dense_above": found.crossover,
        "memory": {
            "dense": memory(plan.forward, None, subject.weights, plan.devices),
            "sparse": memory(
                plan.forward, found.method, subject.weights, plan.devices, plan.branches
            ),
            "available": machine.constants["memory"].value,
            "counted": COUNTED,
        },
    }


def shown(content: dict[str, Any]) -> str:
    """The figures as text."""
    console = Console(width=WIDTH, no_color=True, highlight=False)
    with console.capture() as capture:
        for line in _head(content):
            console.print(line, markup=False)
        console.print(_table(content))
        for line in _foot(content):
            console.print(line, markup=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def duration(seconds: float) -> str:
    """As a person says it."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds:,.0f} s" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _head(content: dict[str, Any]) -> list[str]:
    still = content["frames"] == 1
    length = "" if still else f"{content['frames']} frames, "
    forwards = content["forwards_per_step"]
    machine = content["machine"]
    return [
        f"{content['model']}: {content['width']}x{content['height']}, {length}"
        f"{content['steps']} steps, {content['tokens']:,} tokens, {content['dtype']}, "
        f"{forwards} forward{'s' * (forwards > 1)} a step",
        f"preset {content['preset']}: {content['dense_steps']} of {content['steps']} steps dense, "
        f"density {content['density']:.2f} in the others",
        f"{machine['about']}: {in_words(machine['sources'])} figures",
        *_together(content),
        "",
    ]


def _together(content: dict[str, Any]) -> list[str]:
    if content["ulysses"] == 1:
        return []
    sent = _size(content["sent_per_step"])
    return [f"{content['ulysses']} of them share each video; each sends {sent} a step"]


def _table(content: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("one step")
    for name in ("dense", "sparse"):
        table.add_column(name, justify="right")
    table.add_column("limited by")
    for name, one in content["stages"].items():
        cells = [duration(one[arm]) if one[arm] else "-" for arm in ("dense", "sparse")]
        table.add_row(name, *cells, f"{one['limit']}, {one['source']}")
    for title, key in (("step", "step_seconds"), ("run", "run_seconds")):
        arms = content[key]
        gain = f"{arms['dense'] / arms['sparse']:.2f}x as fast"
        if key == "run_seconds":
            low, high = (
                content["speedup"] * (1 + sign * ERRORS * content["errors"]["speedup"])
                for sign in (-1, 1)
            )
            gain += f" ({max(low, 0):.2f} .. {high:.2f})"
        table.add_row(title, *(duration(arms[arm]) for arm in ("dense", "sparse")), gain)
    errors = [f"+- {ERRORS * content['errors'][arm]:.0%}" for arm in ("dense", "sparse")]
    table.add_row("error bar, 95 %", *errors, "")
    memory = content["memory"]
    totals = [sum(memory[arm].values()) for arm in ("dense", "sparse")]
    table.add_row("memory", *map(_size, totals), f"of {_size(memory['available'])}")
    return table


def _size(count: float) -> str:
    """Bytes as a person says them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _foot(content: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"Sparse attention is as fast as dense at density {content['crossover_density']:.2f}.",
        f"Seconds are of the {content['covers']}. Memory: {content['memory']['counted']}.",
    ]
    if content["dense_above"] < 1:
        lines.insert(2, f"Calls above density {content['dense_above']:.2f} run dense here.")
    memory = content["memory"]
    if sum(memory["sparse"].values()) > memory["available"]:
        lines.append("It does not fit as a whole: seconds are without what offloading adds.")
    large = sum(memory["sparse"].get(name, 0.0) for name in ("residual", "tail"))
    if large > content["keep_gigabytes"] * 1e9:
        lines.append(
            f"What is kept takes {_size(large)}, keep.gigabytes={content['keep_gigabytes']:g}: "
            "runs refuse that; raise it."
        )
    if not content["spends_budget"]:
        lines.append("The density of this method follows the data: it is a guess here.")
    if content["constants"]["dense"]["source"] == "measured" and content["gpu"]:
        lines.append(
            "Dense attention is the fastest of torch's, by cuDNN: a pipeline takes it after "
            'set_attention_backend("_native_cudnn").'
        )
    if content["constants"]["sparse"]["source"] == "assumed" and content["gpu"]:
        lines.append("No kernel of vidsparse has run on such a GPU: its rate is assumed.")
    return lines
