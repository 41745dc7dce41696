"""`vidsparse bench`: its options, and nothing that takes long to import."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vidsparse import interrupts
from vidsparse.ending import fail, leave
from vidsparse.options import Json, made, path
from vidsparse.terminal import quiet_libraries

if TYPE_CHECKING:
    from vidsparse.benching.methods import Head

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
RANKS = (4, 16, 64)

app = typer.Typer(help="Measure methods without a video.")


@app.callback()
def top() -> None:
    """Measure methods without a video."""


@app.command()
def methods(
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write to.")],
    captures: Annotated[
        str | None,
        typer.Option(
            help="Folder of `vidsparse capture`.", show_default="made-up heads of rank 4, 16, 64"
        ),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(help="Name or .yaml file; again for more.", show_default="all presets"),
    ] = None,
    density: Annotated[
        list[float] | None,
        typer.Option(help="Work kept; again for more.", show_default="0.05 to 0.5"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Error, recall of the true mass and planning time of presets, at equal work, on single heads.

    Writes methods.csv and methods.png. Beside the presets: the best choice of tiles (oracle), and a
    random one.
    """
    with redirect_stdout(sys.stderr):
        content = _methods(out, captures, preset or [], tuple(density or DENSITIES))
    if as_json:
        print(json.dumps(content["rows"]))
    else:
        print(content["table"])


def _methods(
    out: str, captures: str | None, named: list[str], densities: tuple[float, ...]
) -> dict[str, Any]:
    """Measure under a progress bar on stderr. Exits on a mistake."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    quiet_libraries()
    try:
        with console.status("importing torch"):
            from vidsparse.benching.methods import measured
            from vidsparse.benching.results import plot, summary, table, write_csv
            from vidsparse.config import presets, resolve
            from vidsparse.drawing import require_matplotlib
        try:
            for one in densities:
                if not 0 < one < 1:
                    raise ValueError(f"--density {one}: expected a number between 0 and 1")
            require_matplotlib()
            configs = {Path(name).stem: resolve(name) for name in named or presets()}
            if named and len(configs) < len(named):
                raise ValueError(f"--preset {', '.join(named)}: expected presets of unlike names")
            folder, heads = path("--out", out), _heads(captures)
            made("--out", folder)
        except (ValueError, ImportError, OSError) as error:
            fail(str(error))
        rows, said = [], set()

        def refused(name: str, density: float, why: str) -> None:
            if (name, why) not in said:
                said.add((name, why))
                console.print(f"{name}: {why}", markup=False, highlight=False, soft_wrap=True)

        for head in track(heads, "heads", console=console):
            interrupts.check()
            rows += [*measured([head], configs, densities, refused)]
        write_csv(folder / "methods.csv", rows)
        plot(folder / "methods.png", rows)
        console.print(f"{len(rows)} rows in {folder / 'methods.csv'}, picture methods.png beside")
        return {"rows": summary(rows), "table": table(rows)}
    except KeyboardInterrupt:
        leave("; nothing was written")


@app.command()
def patterns(
    captures: Annotated[
        str, typer.Option(help="Folder of `vidsparse capture`, of all layers and heads.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Plan file to write, .yaml.")],
    density: Annotated[float, typer.Option(help="Work kept.")] = 0.3,
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            help="As 'diagonal + stripe 0'; again for more.",
            show_default="those of the preset's pattern",
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="vdit or sta, or a .yaml file of their kind.")
    ] = "vdit",
    bound: Annotated[
        float | None,
        typer.Option(
            help="Relative error that a head may have: of what keeps to it, the least work.",
            show_default="equal work",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Which fixed pattern loses least in each layer and head: a plan for `vdit` or `sta`.

    At equal work, or with --bound the least work that keeps to an error.

    vidsparse generate --preset vdit --set pattern.file=PLAN --set schedule.density=0.3
    """
    with redirect_stdout(sys.stderr):
        content = _patterns(captures, out, density, candidate or [], preset, bound)
    if as_json:
        print(json.dumps(content))
        return
    for name, error in sorted(content["errors"].items(), key=lambda item: item[1]):
        print(f"{error:8.4f}  {name}")
    print(f"{content['file']}: --preset {preset} --set pattern.file={content['file']} "
          f"--set schedule.density={content['density']:g}")  # fmt: skip


def _patterns(
    captures: str, out: str, density: float, named: list[str], preset: str, bound: float | None
) -> dict[str, Any]:
    """Search under a progress bar on stderr. Exits on a mistake."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    quiet_libraries()
    try:
        with console.status("importing torch"):
            from vidsparse.benching.patterns import search
            from vidsparse.capturing import files
            from vidsparse.quality.frames import atomic_output
        try:
            if not 0 < density < 1:
                raise ValueError(f"--density {density}: expected a number between 0 and 1")
            if bound is not None and not 0 < bound < 1:
                raise ValueError(f"--bound {bound}: expected a number between 0 and 1")
            found = [*files.captures(path("--captures", captures))]
            with Progress(console=console) as progress:
                task = progress.add_task("captures", total=len(found))

                def done() -> None:
                    progress.advance(task)
                    interrupts.check()

                plan = search(map(files.read, found), density, named, done, preset, bound)
            file = path("--out", out)
            with atomic_output(file) as part:
                part.write_text(plan.text())
        except (ValueError, OSError) as error:
            fail(str(error))
        return {
            "file": str(file),
            "density": plan.density,
            "patterns": plan.patterns,
            "errors": plan.errors,
        }
    except KeyboardInterrupt:
        leave("; nothing was written")


def _heads(captures: str | None) -> list[Head]:
    """What is measured on. Raises ValueError."""
    from vidsparse.benching.methods import Head
    from vidsparse.benching.synthetic import field
    from vidsparse.capturing import files
    from vidsparse.grid import TokenGrid

    if captures is None:
        grid = TokenGrid(8, 20, 20)
        return [
            Head(f"rank {rank}", f"seed {seed}", grid, *field(grid, rank, 64, seed))
            for rank in RANKS
            for seed in range(2)
        ]
    folder = path("--captures", captures)
    found = []
    for file in files.captures(folder):
        one = files.read(file)
        for n, head in enumerate(one.about.heads):
            name = f"step {one.about.step} layer {one.about.layer} head {head}"
            qkv = (x[n].float() for x in (one.q, one.k, one.v))
            found.append(Head(one.about.model, name, one.grid, *qkv))
    if not found:
        raise ValueError(f"--captures {captures}: no captures there; make some: vidsparse capture")
    return found
