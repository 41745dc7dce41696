"""Results of VBench into the folder of a comparison: metrics.json, summary.md, report.html.

A clip is found again by where it lay in its export, as the manifest says; it must be the very file
that was compared. `vidsparse compare` writes its folder anew and knows nothing of VBench: import
again after it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment

from vidsparse.compare.files import SCHEMA as COMPARISON
from vidsparse.compare.sets import pairing
from vidsparse.compare.summary import row, safe
from vidsparse.quality.frames import atomic_output
from vidsparse.terminal import printable
from vidsparse.vbench.dimensions import DIMENSIONS, FLICKERING
from vidsparse.vbench.export import MANIFEST, read_manifest
from vidsparse.vbench.scores import Judged, read_results, scores

BEGIN, END = "<!-- vbench -->", "<!-- /vbench -->"
"""What stands between them in summary.md and report.html is ours."""
JOINED = ("arm", "clip", "sha256_test", "sha256_reference", "tf_test", "tf_ref")
"""What of a compared clip is read."""
APART = 1e-3
"""Averages that differ by more than this from VBench's are told."""
NOTE = (
    "Means over clips, on the mp4 files that VBench has read; the codec moves temporal flickering, "
    "so that of the files that were compared stands beside it."
)
PARTIAL = (
    "Quality, Semantic and Total need all of their dimensions, and are VBench's only if every "
    "prompt of its list has all of its samples."
)


def merge(
    results: Sequence[Path], into: Path, manifest: Path | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Read results, join them, write; returns what was added and what the user should know.

    manifest: of the export, None: found beside the results or above the videos. Raises ValueError
    for a user's mistake; then nothing is written.
    """
    if not results:
        raise ValueError("name at least one result file of VBench")
    metrics = _comparison(into / "metrics.json")
    found: dict[str, dict[str, dict[str, float]]] = {}
    reported: dict[str, dict[str, tuple[int, float]]] = {}
    exports = set()
    for file in results:
        judged = read_results(file)
        place = manifest or _find_manifest(file, judged)
        exports.add(place.resolve())
        export = read_manifest(place)
        for dimension, one in judged.items():
            for arm, clips in _by_arm(file, one, export).items():
                _add(found.setdefault(arm, {}).setdefault(dimension, {}), clips, file, dimension)
                if len(clips) == len(one.clips):  # else it is an average over several arms
                    reported.setdefault(arm, {})[dimension] = len(clips), one.reported
    lines = [line for file in exports for line in read_manifest(file)["clips"].values()]
    compared = _compared(lines, metrics, found)
    added = _content(found, reported, {line["clip"]: line["prompt"] for line in lines}, compared)
    notes = list(_notes(added))
    metrics["vbench"] = added
    text = json.dumps(metrics, indent=1, allow_nan=False) + "\n"
    for name, write in (("summary.md", _markdown), ("report.html", _html)):
        file = into / name
        if file.is_file():
            before = file.read_text(encoding="utf-8")
            _write(file, _between(before, write(added), "</main>" if name[-4:] == "html" else ""))
    _write(into / "metrics.json", text)
    return added, notes


def _comparison(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        known = content["schema"] == COMPARISON
        known &= all(key in clip for clip in content["clips"] for key in JOINED)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        raise ValueError(f"--into {file.parent} is no folder that `vidsparse compare` wrote")
    return dict(content)


def _find_manifest(file: Path, judged: Mapping[str, Judged]) -> Path:
    paths = [Path(path) for one in judged.values() for path in one.clips]
    for folder in (*file.resolve().parents, *paths[0].parents):
        if (folder / MANIFEST).is_file():
            return folder / MANIFEST
    raise ValueError(
        f"{file}: no manifest.json of an export beside it or above {paths[0]}: name it with "
        "--manifest"
    )


def _by_arm(file: Path, judged: Judged, export: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Arm -> clip -> value. Raises ValueError for a video that the export does not hold."""
    by_name: dict[str, list[str]] = {}
    for place in export["clips"]:
        by_name.setdefault(place.rpartition("/")[2], []).append(place)
    found: dict[str, dict[str, float]] = {}
    for path, value in judged.clips.items():
        parts = path.split("/")
        same = by_name.get(parts[-1], [])
        exact = [place for place in same if parts[-place.count("/") - 1 :] == place.split("/")]
        if len(exact or same) != 1:
            why = "is in several arms of the export" if same else "is no clip of the export"
            raise ValueError(f"{file}: {path} {why}")
        line = export["clips"][(exact or same)[0]]
        clips = found.setdefault(line["arm"], {})
        if clips.setdefault(line["clip"], value) != value:
            raise ValueError(f"{file}: {path}: two results that differ for one clip")
    return found


def _add(known: dict[str, float], clips: Mapping[str, float], file: Path, dimension: str) -> None:
    for clip, value in clips.items():
        if known.setdefault(clip, value) != value:
            raise ValueError(f"{file}: {dimension} of {clip} has another value in another file")


def _compared(
    lines: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], found: Mapping[str, Any]
) -> dict[str, dict[str, float | None]]:
    """Arm -> clip -> temporal flickering of the file that was compared.

    Raises ValueError if none was, or another one than was exported.
    """
    tests = {(c["arm"], c["clip"]): c for c in metrics["clips"]}
    references = {c["sha256_reference"]: c for c in metrics["clips"]}
    values: dict[str, dict[str, float | None]] = {}
    for line in lines:
        arm, clip = line["arm"], line["clip"]
        if arm not in found:
            continue
        if (test := tests.get((arm, clip))) is not None:
            if test["sha256_test"] != line["sha256"]:
                raise ValueError(f"{clip} of {arm} was exported from another file than compared")
            values.setdefault(arm, {})[clip] = test["tf_test"]
        elif (reference := references.get(line["sha256"])) is not None:
            values.setdefault(arm, {})[clip] = reference["tf_ref"]
    if not values:
        names = ", ".join(sorted({c["arm"] for c in metrics["clips"]}))
        raise ValueError(
            f"no clip of {', '.join(found)} was compared there; the comparison's arms are {names}"
        )
    return values


def _content(
    found: Mapping[str, Mapping[str, Mapping[str, float]]],
    reported: Mapping[str, Mapping[str, tuple[int, float]]],
    prompts: Mapping[str, str],
    compared: Mapping[str, Mapping[str, float | None]],
) -> dict[str, Any]:
    """What metrics.json holds under "vbench"."""
    arms: dict[str, Any] = {}
    for arm, judged in found.items():
        dimensions: dict[str, Any] = {}
        for name in (name for name in DIMENSIONS if name in judged):
            count, told = reported.get(arm, {}).get(name, (0, None))
            dimensions[name] = {
                "average": fmean(judged[name].values()),
                "reported": told if count == len(judged[name]) else None,
                "clips": dict(judged[name]),
            }
        own = [v for v in compared.get(arm, {}).values() if v is not None]
        arms[arm] = {
            "dimensions": dimensions,
            "scores": asdict(scores({name: one["average"] for name, one in dimensions.items()})),
            "clips_compared": sorted(compared.get(arm, {})),
            "temporal_flickering_compared": fmean(own) if own else None,
        }
    pairs = [
        asdict(pairing(name, (a, found[a][name]), (b, found[b][name]), prompts))
        for name in DIMENSIONS
        for a, b in combinations(found, 2)
        if found[a].get(name, {}).keys() & found[b].get(name, {}).keys()
    ]
    return {"vbench": "0.1.5", "arms": arms, "pairs": pairs}


def _notes(added: Mapping[str, Any]) -> Iterator[str]:
    arms = added["arms"]
    for name in DIMENSIONS:
        having = [arm for arm, one in arms.items() if name in one["dimensions"]]
        if having and len(having) < len(arms):
            yield f"{name}: only {', '.join(having)} was judged in it"
    for arm, one in arms.items():
        compared = set(one["clips_compared"])
        for name, judged in one["dimensions"].items():
            if absent := len(compared - judged["clips"].keys()):
                yield f"{arm}: {name}: VBench gave no value for {absent} of {len(compared)} clips"
            told = judged["reported"]
            if told is not None and abs(told - judged["average"]) > APART:
                yield (
                    f"{arm}: {name}: VBench's own average is {told:.6g}, over clips it is "
                    f"{judged['average']:.6g}"
                )


def tabular(added: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: an arm each."""
    arms = added["arms"]
    names = [n for n in DIMENSIONS if any(n in one["dimensions"] for one in arms.values())]
    kept = [
        s for s in ("quality", "semantic", "total") if any(a["scores"][s] for a in arms.values())
    ]

    def cells(one: Mapping[str, Any]) -> list[str]:
        judged = [one["dimensions"].get(name) for name in names]
        figures = [f["average"] if f else None for f in judged] + [one["scores"][s] for s in kept]
        if FLICKERING in names:
            figures.append(one["temporal_flickering_compared"])
        return ["-" if figure is None else f"{figure:.4f}" for figure in figures]

    titles = [name.replace("_", " ") for name in names] + [name.capitalize() for name in kept]
    titles += ["temporal flickering, compared files"] if FLICKERING in names else []
    return ["arm", *titles], [[printable(arm), *cells(one)] for arm, one in arms.items()]


def _markdown(added: Mapping[str, Any]) -> str:
    header, rows = tabular(added)
    lines = [row(*header), f"|{'---|' * len(header)}"]
    lines += [row(safe(cells[0]), *cells[1:]) for cells in rows]
    return "\n".join(["", "## VBench", "", *lines, "", f"{NOTE} {PARTIAL}", ""])


_SECTION = """
<section aria-labelledby="h-vbench">
  <h2 id="h-vbench">VBench</h2>
  <div class="scroll" tabindex="0"><table id="vbench">
    <thead><tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
    <tbody>{% for cells in rows %}
      <tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
    </tbody>
  </table></div>
  <p class="note">{{ note }}</p>
</section>
"""


def _html(added: Mapping[str, Any]) -> str:
    header, rows = tabular(added)
    template = Environment(autoescape=True).from_string(_SECTION)
    return template.render(header=header, rows=rows, note=f"{NOTE} {PARTIAL}")


def _between(text: str, ours: str, before: str) -> str:
    """Put `ours` between our marks, which are set in front of `before`, or at the end, at first."""
    begin, end = text.rfind(BEGIN), text.rfind(END)
    if 0 <= begin < end:
        return f"{text[:begin]}{BEGIN}{ours}{text[end:]}"
    at = text.rfind(before) if before else len(text)
    if at < 0:
        raise ValueError("report.html is not as `vidsparse compare` wrote it: compare again")
    return f"{text[:at]}{BEGIN}{ours}{END}\n{text[at:]}"


def _write(file: Path, text: str) -> None:
    with atomic_output(file) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
