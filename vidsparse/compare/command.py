"""`vidsparse compare`: its options, and nothing that takes long to import."""

from __future__ import annotations

import json
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vidsparse.ending import fail, leave
from vidsparse.options import Json, path


class Align(StrEnum):
    """How `compare` pairs clips."""

    auto = "auto"
    name = "name"
    manifest = "manifest"


def compare(
    reference: Annotated[
        str,
        typer.Option(
            "--ref", metavar="PATH", help="Clip, folder of clips or of `vidsparse generate`."
        ),
    ],
    tests: Annotated[
        list[str],
        typer.Option(
            "--test",
            metavar="[NAME=]PATH",
            help="What is measured against it; again for more arms.",
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="PATH", help="Folder to write to.")],
    align: Annotated[
        Align, typer.Option(help="How clips find each other: by file name or by what sidecars say.")
    ] = Align.auto,
    trim: Annotated[
        bool, typer.Option("--trim", help="Compare as far as the shorter clip.")
    ] = False,
    fps: Annotated[
        float | None,
        typer.Option(help="Frames per second.", show_default="what the files say"),
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="Of psnr, ssim, flicker (always), vmaf, xpsnr, lpips.")
    ] = "psnr,ssim,flicker",
    compat: Annotated[
        str | None, typer.Option(help="Print these conventions beside ours: svg, teacache, ...")
    ] = None,
    fail_under: Annotated[
        str | None,
        typer.Option(
            metavar="PSNR=25,...", help="Exit with 1 below, as psnr=25,psnr.worst=20,ssim=.85."
        ),
    ] = None,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Let --fail-under judge lossy files.")
    ] = False,
    allow_mismatch: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="Compare though this field of the sidecars differs."),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Threads.", show_default="all cores")] = None,
    report_mb: Annotated[float, typer.Option(help="Upper bound of report.html.")] = 15,
    as_json: Json = False,
) -> None:
    """Measure videos against a reference: PSNR, SSIM, flicker, where, and at what speed-up."""
    from rich.console import Console

    from vidsparse.compare.display import Display
    from vidsparse.compare.files import metrics as content
    from vidsparse.compare.measure import CORE, Settings
    from vidsparse.compare.run import Request, cores
    from vidsparse.compare.run import compare as run
    from vidsparse.compare.thresholds import parse

    console = Console(stderr=True)
    names = tuple(dict.fromkeys(_words(metrics)))
    try:
        request = Request(
            reference=path("--ref", reference),
            tests=[_named(text) for text in tests],
            out=path("--out", out),
            align=align.value,
            settings=Settings(
                tuple(name for name in names if name not in CORE),
                tuple(_words(compat)),
                trim,
                cores() if workers is None else workers,
                fps,
            ),
            thresholds=parse(fail_under) if fail_under is not None else (),
            allow_lossy=allow_lossy,
            allow_mismatch=tuple(allow_mismatch or ()),
            report_mb=report_mb,
            command=shlex.join(["vidsparse", *sys.argv[1:]]),
        )
        display = Display(console)
        comparison = run(request, display)
    except ValueError as error:
        fail(str(error))
    except KeyboardInterrupt:
        leave(f"; what was measured is kept in {out}, the same command goes on from there")
    display.finish(comparison, request.out)
    if as_json:
        print(json.dumps(content(comparison), allow_nan=False))
    if comparison.misses:
        raise typer.Exit(1)


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _named(text: str) -> tuple[str | None, Path]:
    """NAME=PATH; a path that exists is no name, whatever it contains."""
    name, equals, rest = text.partition("=")
    if not equals or (text and Path(text).expanduser().exists()) or not name:
        return None, path("--test", text)
    return name, path("--test", rest)
