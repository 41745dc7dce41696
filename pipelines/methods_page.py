"""Writes docs/methods.md: the presets, what each loses at equal work, the methods of every stage.

    python pipelines/methods_page.py
    python pipelines/methods_page.py --measured DIR

Everything but the errors comes from the presets and the methods themselves. DIR: of `vidsparse
bench methods --out DIR`; its rows are summed up in pipelines/results/methods.csv, in place of those
of the same sources, from which the page takes them; the picture of captured heads goes with the
page. `--check` writes nothing, and ends with 1 if the page is not what it would be.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import sys
from pathlib import Path

from vidsparse import registry
from vidsparse.benching.methods import Row
from vidsparse.benching.results import summary
from vidsparse.config import SparseConfig, presets
from vidsparse.quality.frames import atomic_output
from vidsparse.refused import ELSEWHERE, REFUSED

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "methods.md"
MEASURED = ROOT / "pipelines" / "results" / "methods.csv"
PICTURE = ROOT / "docs" / "pictures" / "methods.png"
BOUNDS = {"oracle": "the best choice of blocks on tiles", "random": "blocks by chance, on tiles"}
DEMO = "demo-wan"

HEAD = """# Methods

Written by `python pipelines/methods_page.py`.

A preset is a YAML file in `configs/methods/` that names a method for every stage; any key can be
changed, `--set selector.name=topp --set schedule.density=0.15`, and a file of yours is a preset,
too.

## Presets, at equal work

Error of the attention output, relative L2 against dense, geometric mean over {heads} heads of the
demo model (three steps, every second layer, fp32); every method pays the same true density,
centroids counted, whatever its own schedule says. Presets whose work follows the data are given the
density as a cap. From `pipelines/results/methods.csv`, where recall of the true mass stands too;
the demo model's keys have few dimensions (participation rank 2 to 14 of 64), which flatters methods
that order tokens by content.

![Error against density](pictures/methods.png)

"""

MADE_UP = """
## On heads that are made up

The same at density {density}, over {heads} heads for each rank: queries and keys that are smooth
over the video, as mixtures of so many maps (`vidsparse bench methods` without captures). The fewer
maps, the more an order by content gains; with 64, all that a head has room for, the sampled scores
of `psa` find more.

"""
MIDDLE = "0.2"


def main() -> int:
    options = arguments()
    if options.measured:
        sum_up(options.measured)
    text = page()
    if options.check:
        same = PAGE.exists() and PAGE.read_text() == text
        if not same:
            print(f"{PAGE} is not what it should be: python pipelines/methods_page.py")
        return 0 if same else 1
    with atomic_output(PAGE) as part:
        part.write_text(text)
    print(PAGE)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--measured", type=Path)
    parser.add_argument("--check", action="store_true")
    return parser.parse_args()


def sum_up(folder: Path) -> None:
    """The rows of a bench, a line for each source, method and density, and its picture."""
    kinds = Row.__annotations__
    with (folder / "methods.csv").open() as file:
        rows = [
            Row(**{k: v if kinds[k] in (str, "str") else float(v) for k, v in row.items()})
            for row in csv.DictReader(file)
        ]
    timed = ("planning_ms", "call_ms")  # of a machine, which is not named here
    lines = [{k: v for k, v in line.items() if k not in timed} for line in summary(rows)]
    made = {str(line["source"]) for line in lines}
    kept = [row for row in measured() if row["source"] not in made]
    lines = sorted([*kept, *lines], key=lambda line: str(line["source"]))
    with atomic_output(MEASURED) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        for line in lines:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items()})
    if DEMO in made:
        PICTURE.parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / "methods.png", PICTURE)


def page() -> str:
    """The text of it."""
    every = measured()
    rows = [row for row in every if row["source"] == DEMO]
    parts = [HEAD.format(heads=rows[0]["heads"] if rows else "-"), errors(rows)]
    parts += [made_up([row for row in every if row["source"].startswith("rank ")])]
    parts += ["\n## What they are\n\n| preset | |\n|---|---|\n"]
    parts += [f"| `{name}` | {SparseConfig.load(name).about} |\n" for name in presets()]
    parts += ["\n## Methods of the stages\n"]
    for stage in registry.STAGES:
        parts += [f"\n### {stage}\n\n| | |\n|---|---|\n"]
        parts += [f"| `{name}` | {first(stage, name)} |\n" for name in registry.methods(stage)]
    parts += ["\n## Not here\n\nAsked for as presets, these are refused with the reason.\n\n"]
    parts += ["| method | why |\n|---|---|\n"]
    parts += [f"| {name} | {why} |\n" for name, why in sorted(REFUSED.items())]
    parts += ["\n## Published names\n\n| method | preset |\n|---|---|\n"]
    parts += [f"| {name} | `{preset}` |\n" for name, preset in sorted(ELSEWHERE.items())]
    return "".join(parts)


def measured() -> list[dict[str, str]]:
    if not MEASURED.exists():
        return []
    with MEASURED.open() as file:
        return list(csv.DictReader(file))


def errors(rows: list[dict[str, str]]) -> str:
    """A line for each preset, the least error first, behind them those that read more or less."""
    densities = sorted({row["asked"] for row in rows}, key=float)
    found = {name: {r["asked"]: r for r in rows if r["method"] == name} for name in presets()}
    found |= {name: {r["asked"]: r for r in rows if r["method"] == name} for name in BOUNDS}
    text = f"| | {' | '.join(densities)} |\n|---{'|---' * len(densities)}|\n"
    middle = "0.2" if "0.2" in densities else densities[-1] if densities else ""

    def place(name: str) -> tuple[bool, float]:
        row = found[name].get(middle)
        return (not near(row), float(row["error"])) if row else (True, float("inf"))

    for name in sorted((n for n in found if found[n]), key=place):
        cells = [told(found[name].get(density)) for density in densities]
        label = f"{BOUNDS[name]}" if name in BOUNDS else f"`{name}`"
        text += f"| {label} | {' | '.join(cells)} |\n"
    return text


def made_up(rows: list[dict[str, str]]) -> str:
    """The table of heads that are made up, at one density, in the order of the first ranks."""
    own = [row for row in rows if row["asked"] == MIDDLE]
    if not own:
        return ""
    ranks = sorted({row["source"] for row in own}, key=lambda name: int(name.split()[1]))
    text = MADE_UP.format(density=MIDDLE, heads=own[0]["heads"])
    text += f"| | {' | '.join(ranks)} |\n|---{'|---' * len(ranks)}|\n"
    found = {(row["method"], row["source"]): row for row in own}

    def place(name: str) -> tuple[bool, float]:
        first = found[name, ranks[0]]
        return not near(first), float(first["error"])

    for name in sorted(dict.fromkeys(row["method"] for row in own), key=place):
        label = BOUNDS.get(name, f"`{name}`")
        text += f"| {label} | {' | '.join(told(found.get((name, r))) for r in ranks)} |\n"
    return text


def told(row: dict[str, str] | None) -> str:
    """An error; with the density that was met, where that is another one."""
    if row is None:
        return "-"
    return f"{float(row['error']):.3f}" + (
        "" if near(row) else f" (at {float(row['density']):.2f})"
    )


def near(row: dict[str, str]) -> bool:
    """Whether about as much was read as was asked for."""
    return abs(float(row["density"]) - float(row["asked"])) <= 0.1 * float(row["asked"])


def first(stage: str, name: str) -> str:
    """The first sentence of a method's docstring, without its name."""
    text = (registry.method(stage, name).__doc__ or "").strip().split("\n\n")[0]
    text = re.sub(r"\s+", " ", text.replace("|", "\\|"))
    return text.split(": ", 1)[-1] if ": " in text[:40] else text


if __name__ == "__main__":
    sys.exit(main())
