"""`vidsparse batch`: its options, and nothing that takes long to import."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer

from vidsparse import interrupts, registry
from vidsparse.ending import fail, leave
from vidsparse.generate import ranks
from vidsparse.generate.model_files import InputError, named
from vidsparse.options import (
    Device,
    Dtype,
    FlowShift,
    Frames,
    Guidance,
    Json,
    Model,
    NegativePrompt,
    Overrides,
    Pipeline,
    Pixels,
    Steps,
    Ulysses,
)
from vidsparse.terminal import printable, quiet_libraries

MOST_WORKERS, MOST_RETRIES = 4096, 100
OF_THE_BATCH = (
    "prompts", "out", "preset", "seeds", "compare_dense", "engine", "workers", "gpus_per_worker",
    "ray_address", "retries", "dry_run",
)  # fmt: skip
"""Options that are none of a `Request`."""


def batch(
    prompts: Annotated[
        str,
        typer.Argument(
            help="Text, a prompt a line; .jsonl with prompt, seed, width, height, frames, preset, "
            "overrides, image, last_image; - is stdin."
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder of the batch.")],
    model: Model = None,
    negative_prompt: NegativePrompt = None,
    pipeline: Pipeline = None,
    preset: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Methods.", show_default="the model's or balanced"),
    ] = None,
    overrides: Overrides = None,
    seeds: Annotated[str, typer.Option(metavar="0-3,7", help="For every prompt.")] = "0",
    height: Pixels = None,
    width: Pixels = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    flow_shift: FlowShift = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Of torch on a CPU; a part of the job.", show_default="the machine's"),
    ] = None,
    ulysses: Ulysses = 1,
    compare_dense: Annotated[
        bool, typer.Option("--compare-dense", help="With the first preset run dense attention too.")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="local: this process; torchrun, ray: one for each GPU.")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Processes.", show_default="one for each GPU")
    ] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(help="With ray; 0.5: two share one.", show_default="1")
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Of a Ray cluster.", show_default="one here"),
    ] = None,
    retries: Annotated[int, typer.Option(help="Of a job that failed.")] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace other files in the folders of jobs.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, make nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make the videos of many prompts, seeds and presets in one folder; what is there stays.

    The same command again makes what is missing, whatever broke it off. Exits with 1 if a job
    failed.
    """
    asked = dict(locals())
    del asked["as_json"]
    options = {name: asked.pop(name) for name in OF_THE_BATCH}
    asked["overrides"] = tuple(overrides or ())
    with redirect_stdout(sys.stderr):  # whatever libraries print
        content, complete = _batch(asked, options)
    if as_json:
        print(json.dumps(content, allow_nan=False))
    if not complete:
        raise typer.Exit(1)


def _batch(asked: dict[str, Any], options: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Plan and run with a display on stderr; returns figures, and whether all is done. Exits on a
    mistake."""
    from rich.console import Console

    quiet_libraries()
    home = options["out"]
    ulysses = asked["ulysses"]
    try:
        leads = ranks.leads(ulysses)
        engine = _engine(options, ulysses)
        quiet = not leads or getattr(engine, "follows", lambda: False)()
        console = Console(stderr=True, quiet=quiet)
        with console.status("importing torch and diffusers"):
            from vidsparse.batch.display import Display, plan_table
            from vidsparse.batch.making import Pipeline, Shared, follow
            from vidsparse.batch.plan import Batch, make_plan, read_seeds
            from vidsparse.batch.run import run
            from vidsparse.batch.task import Resources
            from vidsparse.generate.job import device_of
            from vidsparse.generate.prompts import WHOLE, read_prompts
            from vidsparse.generate.request import Request

            file, out = named("PROMPTS", options["prompts"]), named("--out", home)
            read = read_prompts(file, "PROMPTS", WHOLE)
            seeds, presets = read_seeds(options["seeds"]), _words(options["preset"])
            device = device_of(asked["device"])
            base = Request(**{**asked, "device": device})
            if not leads:
                if not options["dry_run"]:
                    follow(ulysses, ranks.place(ulysses, device))
                sys.exit(0)
        display = Display(console)
        with console.status("planning"):
            batch = Batch(base, read, presets, seeds, out, file, options["compare_dense"])
            plan = make_plan(batch, display.say)
        home = plan.home
        display.plan(plan)
        if options["dry_run"]:
            console.print(plan_table(plan))
            counts = {"jobs": len(plan.tasks), "done": len(plan.done), "missing": len(plan.missing)}
            return {"out": str(home), **counts}, True
        interrupts.check()
        resources = Resources(
            device, options["workers"], options["gpus_per_worker"], options["ray_address"]
        )
        with ranks.joined(ulysses, ranks.place(ulysses, device)):
            maker = Pipeline() if ulysses == 1 else Shared(ulysses=ulysses)
            report = run(plan, maker, engine, resources, display, retries=options["retries"])
            ranks.tell(ulysses)  # that there is no more
        display.finish(report)
        return {"out": str(home), "jobs": list(report.rows)}, report.complete
    except InputError as error:
        if not leads:
            sys.exit(2)  # the first process says it
        if not interrupts.pending():
            fail(str(error))
    except KeyboardInterrupt:
        pass
    leave(f"; what is made is in {printable(str(home))}, the same command goes on from there")


def _engine(options: dict[str, Any], ulysses: int) -> Any:
    """The module of the engine. Raises InputError for options that no run takes."""
    ranks.check(ulysses, "batch")
    if ulysses > 1 and options["engine"] != "local":
        raise InputError(
            f"--ulysses {ulysses}: all processes make one video after the other, so leave out "
            f"--engine {options['engine']}"
        )
    try:
        engine = registry.batch_engine(options["engine"])
    except ValueError as error:
        raise InputError(str(error)) from error
    for name, least, most in (("workers", 1, MOST_WORKERS), ("retries", 0, MOST_RETRIES)):
        value = options[name]
        if value is not None and not least <= value <= most:
            raise InputError(f"--{name} {value}: expected {least} .. {most}")
    gpus = options["gpus_per_worker"]
    if gpus is not None and not (0 < gpus < 1 or (gpus >= 1 and gpus == int(gpus))):
        raise InputError(
            f"--gpus-per-worker {gpus:g}: expected a share of one, as 0.5, or a whole number"
        )
    if options["engine"] != "ray":
        for name in ("gpus_per_worker", "ray_address"):
            if options[name] is not None:
                flag = name.replace("_", "-")
                raise InputError(
                    f"--{flag}: --engine {options['engine']} has none; add --engine ray"
                )
    return engine


def _words(text: str | None) -> tuple[str, ...]:
    """Names of presets. Raises InputError for none."""
    if text is None:
        return ()
    words = tuple(word.strip() for word in text.split(","))
    if not all(words):
        raise InputError(f"--preset {text!r}: expected names, as balanced,fast")
    return words
