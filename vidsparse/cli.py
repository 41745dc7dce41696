"""The command `vidsparse`, and those of its commands that are short.

Results go to stdout, everything else to stderr. A user's mistake is one line and exit code 2, an
interrupt exit code 130; a traceback is a defect of ours. torch and diffusers are imported inside
the commands that need them, so that help is instant.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import vidsparse
from vidsparse import interrupts
from vidsparse.batch.command import batch
from vidsparse.benching.command import app as bench
from vidsparse.calibrating.command import calibrate
from vidsparse.capturing.command import capture
from vidsparse.compare.command import compare
from vidsparse.ending import fail, leave
from vidsparse.inspecting.command import inspect
from vidsparse.options import (
    Device,
    Dtype,
    FlowShift,
    Frames,
    Guidance,
    Image,
    Json,
    LastImage,
    Model,
    NegativePrompt,
    Overrides,
    Pipeline,
    Pixels,
    Preset,
    Prompt,
    Seed,
    Steps,
    Ulysses,
    Video,
)
from vidsparse.predict.command import predict
from vidsparse.terminal import printable, quiet_libraries
from vidsparse.vbench.commands import app as vbench


class OneLineErrors(TyperGroup):
    """Says what is wrong with the usage in one line, with exit code 2."""

    def main(self, *args: Any, **options: Any) -> Any:
        """As the base class, in its standalone mode: ends the process."""
        with interrupts.listening():
            try:
                code = super().main(*args, **{**options, "standalone_mode": False})
                interrupts.check()
            except (Exception, KeyboardInterrupt) as error:
                if interrupts.pending():  # libraries turn it into errors of their own
                    leave()
                if not hasattr(error, "format_message"):  # not about the usage, but a defect
                    raise
                fail(error.format_message())
            sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=OneLineErrors,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Training-free block-sparse attention for video diffusion transformers.",
)


app.add_typer(vbench, name="vbench")
app.add_typer(bench, name="bench")


def main() -> None:
    """The command, once its modules are there; `vidsparse.__main__` is the entry point."""
    app(prog_name="vidsparse")


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Training-free block-sparse attention for video diffusion transformers."""
    if version:
        print(f"vidsparse {vidsparse.__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())
    else:
        return
    raise typer.Exit()


@app.command()
def generate(
    model: Model = None,
    prompt: Prompt = None,
    negative_prompt: NegativePrompt = None,
    image: Image = None,
    last_image: LastImage = None,
    video: Video = None,
    pipeline: Pipeline = None,
    preset: Preset = None,
    overrides: Overrides = None,
    height: Pixels = None,
    width: Pixels = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    flow_shift: FlowShift = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    ulysses: Ulysses = 1,
    compare_dense: Annotated[
        bool, typer.Option("--compare-dense", help="Run dense attention too; measure against it.")
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(help="Folder to write to.", show_default="one of its own in outputs/"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another job's files in --out.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a video or an image with sparse attention, and compare it with dense attention.

    From a prompt, and with models for that from an image or a video. Sizes and steps that are left
    out are the model's own, but for the proportions, which are those of a given image.
    """
    asked = dict(locals())
    del asked["as_json"]
    asked["overrides"] = tuple(overrides or ())
    with redirect_stdout(sys.stderr):  # whatever libraries print
        content = _generate(asked)
    if as_json:
        print(json.dumps(content, allow_nan=False))


def _generate(asked: dict[str, Any]) -> dict[str, Any]:
    """Run the request with a display on stderr; returns the figures. Exits on a mistake."""
    from rich.console import Console
    from rich.text import Text

    from vidsparse.generate import ranks
    from vidsparse.generate.job import prepare
    from vidsparse.generate.model_files import InputError
    from vidsparse.generate.request import Request

    ulysses = asked["ulysses"]
    leads = ranks.leads(ulysses)
    console = Console(stderr=True, quiet=not leads)
    quiet_libraries()
    content = None
    try:
        with console.status("importing torch and diffusers") as status:
            ranks.check(ulysses, "generate")
            job = prepare(Request(**asked), lambda text: console.print(Text(printable(text))))
            from vidsparse.generate.display import Display, hide_bars
            from vidsparse.generate.run import execute, follow, load_together

            interrupts.check()
            hide_bars()
            display = Display(console, status)
            with ranks.joined(ulysses, job.device):
                if leads:
                    content = execute(job, display, loading=load_together)
                else:
                    with ranks.following():
                        ranks.tell(ulysses)
                        follow(job)
        if content is None:
            sys.exit(0)
        display.finish(content)
        return content
    except InputError as error:
        if not leads:
            sys.exit(2)  # the first process says it
        if not interrupts.pending():
            fail(str(error))
        leave("; nothing was written")  # a library has made an error of its own of it
    except KeyboardInterrupt as interrupt:
        said = getattr(interrupt, "__notes__", None) or ["nothing was written"]
        if content:
            said = [f"the files are in {content['out']}"]
        leave(f"; {printable('; '.join(said))}")


app.command()(batch)
app.command()(predict)
app.command()(compare)
app.command()(inspect)
app.command()(capture)
app.command()(calibrate)


@app.command()
def presets(as_json: Json = False) -> None:
    """List the presets: name, density of the sparse calls, what it is."""
    from vidsparse.config import presets as shipped
    from vidsparse.plain_values import read_file  # the methods of a SparseConfig import torch

    rows = []
    for name, file in shipped().items():
        content = read_file(file)
        density = content["schedule"]["density"]
        rows.append({"name": name, "density": density, "about": content["about"]})
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['name']:10} {row['density']:<6} {row['about']}")


@app.command()
def models(as_json: Json = False) -> None:
    """List the models: families that can be accelerated, checkpoints that `generate` knows."""
    with redirect_stdout(sys.stderr):
        from vidsparse.models import describe, supported

        quiet_libraries()
        found = supported()
    print(json.dumps(found) if as_json else describe(found))


@app.command()
def doctor(
    as_json: Json = False,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="Time this CPU again, in place of what was kept.")
    ] = False,
) -> None:
    """Say what this machine can run, and what is missing."""
    with redirect_stdout(sys.stderr):
        from vidsparse.doctor import examine, report

        facts = examine(remeasure)
    print(json.dumps(facts) if as_json else report(facts))


if __name__ == "__main__":
    main()
