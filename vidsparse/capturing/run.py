"""One capture: which calls, and a dense run under an observer that ends when all are kept."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from vidsparse.accelerate import accelerate_pipeline, observing, restore_pipeline
from vidsparse.capturing import files
from vidsparse.config import SparseConfig
from vidsparse.generate.clock import Listener
from vidsparse.generate.job import Job, prepare
from vidsparse.generate.model_files import InputError
from vidsparse.generate.request import Request
from vidsparse.generate.run import load, run_arm, threads
from vidsparse.generate.sizes import read_grid
from vidsparse.interrupts import held, interruptible
from vidsparse.options import made
from vidsparse.pipelines.observation import ObservedCall
from vidsparse.pipelines.recognition import adapter_for

DENSE = SparseConfig.from_dict(
    {"layout": {"name": "raster"}, "schedule": {"name": "constant", "density": 1.0}}
)
"""All calls as the stock pipeline makes them, tokens in raster order."""

MOST_STEPS, MOST_LAYERS, MOST_HEADS = 3, 4, 4
"""What is kept if the user has not chosen."""


@dataclass(frozen=True)
class Wanted:
    """steps, layers, heads, from 0; empty: a choice is made, spread evenly."""

    steps: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()


class _Complete(Exception):
    """Everything that was wanted is on disk."""


def capture(
    request: Request, wanted: Wanted, out: Path, listener: Listener | None = None
) -> dict[str, Any]:
    """Run the pipeline densely and keep q, k, v of the wanted calls in `out`, a file each.

    What is there already is not made again, and a run ends when the last one is there. Returns
    "out", "files", "made", "bytes". Raises InputError for what cannot be.
    """
    listener = listener or Listener()
    job = prepare(request, listener.say)
    steps = chosen("--step", wanted.steps, job.steps, MOST_STEPS, skip=1)
    with threads(job):
        pipe = load(job, listener)
        adapter = adapter_for(pipe)
        modules = adapter.self_attention(next(iter(adapter.transformers(pipe).values())))
        layers = chosen("--layer", wanted.layers, len(modules), MOST_LAYERS)
        heads = chosen("--head", wanted.heads, modules[0].heads, MOST_HEADS)
        run = replace(job, config=DENSE, preset="dense", overrides=()).id
        try:
            lacking = files.missing(made("--out", out), run, steps, layers, heads)
        except (OSError, ValueError) as error:
            raise InputError(str(error)) from error
        if lacking:
            _check_room(job, out, len(lacking) * len(heads))
            recorder = Recorder(job, run, out, set(lacking), heads)
            _run(pipe, job, recorder, listener)
            if recorder.lacking:
                left = ", ".join(f"step {s} layer {n}" for s, n in sorted(recorder.lacking)[:4])
                raise InputError(f"the pipeline made no such call: {left}; captured all others")
    found = [files.file_of(out, step, layer) for step in steps for layer in layers]
    return {
        "out": str(out.resolve()),
        "files": [path.name for path in found],
        "made": len(lacking),
        "bytes": sum(path.stat().st_size for path in found),
    }


def chosen(
    option: str, asked: tuple[int, ...], of: int, most: int, skip: int = 0
) -> tuple[int, ...]:
    """What was asked for, or at most so many of them, evenly spread behind the first `skip`.

    Raises InputError for what there is not.
    """
    for one in asked:
        if not 0 <= one < of:
            raise InputError(f"{option} {one}: there are {of}; allowed: 0 .. {of - 1}")
    if asked:
        return tuple(sorted(set(asked)))
    first = min(skip, of - 1)
    count = min(most, of - first)
    return tuple(
        sorted({first + round((n + 0.5) * (of - first) / count - 0.5) for n in range(count)})
    )


class Recorder:
    """An observer that writes the calls that are lacking, and ends the run after the last one.

    Of guidance it keeps the branch with the prompt: of a batch with both, the last item.
    """

    def __init__(
        self, job: Job, run: str, out: Path, lacking: set[tuple[int, int]], heads: tuple[int, ...]
    ) -> None:
        self.job, self.run, self.out = job, run, out
        self.lacking, self.heads = lacking, heads

    def __call__(self, call: ObservedCall) -> None:
        at = call.context
        if at.branch == "uncond" or (at.step, at.layer) not in self.lacking:
            return
        item = call.q.shape[0] - 1
        about = files.About(
            self.run, self.job.model.name, self.job.prompt, at.step, at.steps, at.layer, at.layers,
            self.heads, asdict(call.grid),
        )  # fmt: skip
        parts = (x[item, :, [*self.heads]].transpose(0, 1) for x in (call.q, call.k, call.v))
        files.write(self.out, about, *parts)
        self.lacking.discard((at.step, at.layer))
        if not self.lacking:
            raise _Complete


def _run(pipe: Any, job: Job, recorder: Recorder, listener: Listener) -> None:
    """The pipeline is afterwards what it was before."""
    with held():
        try:
            with interruptible():
                try:
                    accelerate_pipeline(pipe, DENSE)
                except (ValueError, TypeError) as error:
                    raise InputError(str(error)) from error
                with observing(pipe, recorder):
                    run_arm(pipe, job, "dense", listener, accelerated=True)
        except _Complete:
            listener.end()
        finally:
            restore_pipeline(pipe)


def _check_room(job: Job, out: Path, heads: int) -> None:
    """Raises InputError if the disk is too full for so many heads."""
    height, width, frames = job.size
    tokens = prod(read_grid(job.model).tokens(frames, height, width))
    depth = job.model.head_dim(next(iter(job.model.transformers))) or 128
    need = 3 * 2 * heads * tokens * depth
    free = shutil.disk_usage(out).free
    if need > free:
        raise InputError(
            f"--out {out}: {need / 2**30:.1f} GiB are needed and {free / 2**30:.1f} free: choose "
            "fewer with --step, --layer and --head"
        )
