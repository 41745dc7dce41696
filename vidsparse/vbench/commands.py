"""`vidsparse vbench export | run | import`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from vidsparse.ending import fail
from vidsparse.options import path

app = typer.Typer(
    no_args_is_help=True,
    help="VBench: lay videos out as it reads them, run it, take its results into a comparison.",
)


@contextmanager
def mistakes() -> Iterator[None]:
    """A ValueError, or a file that cannot be read or written, is a mistake of the user."""
    try:
        yield
    except ValueError as error:
        fail(str(error))
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        fail(f"{what}{error.strerror or error}")


@app.command()
def export(
    sources: Annotated[
        list[str],
        typer.Option(
            "--from",
            metavar="FOLDER[=NAME]",
            help="Folder of clips or of `vidsparse generate`; again for more arms.",
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="PATH", help="Folder to write to.")],
    version: Annotated[int, typer.Option(help="1: VBench 0.1.5; 2: VBench-2.0.")] = 1,
    custom: Annotated[
        bool, typer.Option("--custom", help="For clips of any prompt: VBench's custom input.")
    ] = False,
    dimension: Annotated[
        list[str] | None,
        typer.Option(help="VBench-2.0: dimension that the clips are for; again for more."),
    ] = None,
    full_info: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="VBench's list of prompts, to check against."),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames per second of clips that do not say.")
    ] = None,
) -> None:
    """Lay out clips as VBench reads them: names, folders, prompts and a manifest."""
    from rich.console import Console

    from vidsparse.vbench.display import Display
    from vidsparse.vbench.export import Request
    from vidsparse.vbench.export import export as run

    display = Display(Console(stderr=True))
    with mistakes():
        request = Request(
            [_named(text) for text in sources],
            path("--out", out),
            version,
            custom,
            fps,
            full_info.expanduser() if full_info else None,
            tuple(dict.fromkeys(dimension or ())),
        )
        manifest = run(request, display)
    display.say(f"{out}/  {len(manifest['clips'])} clips; README.txt says how to go on")


@app.command()
def run(
    python: Annotated[Path, typer.Option(help="Python of the environment with VBench.")],
    videos: Annotated[
        str, typer.Option(metavar="PATH", help="Export, an arm of it, or a folder of clips.")
    ],
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="PATH", help="Folder for the results.")
    ],
    dimension: Annotated[
        list[str] | None,
        typer.Option(help="Of VBench; again for more.", show_default="all that apply"),
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    custom: Annotated[
        bool | None,
        typer.Option(
            "--custom/--standard",
            help="Clips of any prompt, or of VBench's own.",
            show_default="as exported",
        ),
    ] = None,
    full_info: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="VBench's list of prompts.", show_default="its own"),
    ] = None,
) -> None:
    """Run an installed VBench 0.1.5 in its own environment; its output goes to stderr."""
    from rich.console import Console

    from vidsparse.vbench.display import Display
    from vidsparse.vbench.run import Request
    from vidsparse.vbench.run import run as work

    display = Display(Console(stderr=True))
    with mistakes():
        request = Request(
            python,
            path("--videos", videos),
            path("--out", out),
            tuple(dimension or ()),
            device,
            custom,
            full_info.expanduser() if full_info else None,
        )
        results = work(request, display.say)
    for file in results:
        print(file)


@app.command("import")
def import_(
    results: Annotated[list[Path], typer.Argument(help="Files *_eval_results.json of VBench.")],
    into: Annotated[Path, typer.Option(help="Folder that `vidsparse compare` wrote.")],
    manifest: Annotated[
        Path | None,
        typer.Option(help="manifest.json of the export.", show_default="found by the paths"),
    ] = None,
) -> None:
    """Merge VBench's results into metrics.json, summary.md and report.html of a comparison."""
    from rich.console import Console

    from vidsparse.vbench.display import Display, table
    from vidsparse.vbench.importing import merge

    console = Console(stderr=True)
    display = Display(console)
    with mistakes():
        added, notes = merge([file.expanduser() for file in results], into.expanduser(), manifest)
    console.print(table(added))
    for note in notes:
        display.say(f"note: {note}")
    display.say(f"{into}/  metrics.json, summary.md, report.html")


def _named(text: str) -> tuple[Path, str | None]:
    """FOLDER=NAME; a path that exists has no name, whatever it contains."""
    folder, equals, name = text.rpartition("=")
    if not equals or Path(text).expanduser().exists() or not name:
        return path("--from", text), None
    return path("--from", folder), name
