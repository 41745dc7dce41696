"""What a run of the GPU suite found, as text to paste. Imports nothing heavy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_decide import SHAPE, decision
from gpu_rows import Check, Result, Tried, load
from gpu_tables import background, speeds, stages
from gpu_units import LEDGER
from gpu_watch import Watched

DRY = "tiny"
"""Shape of a dry run, which stands for that of the targets."""

MOST = 40
"""Lines of a list that are shown; the rest is counted."""


def report(folder: Path, seen: Watched, unmet: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Lines about all that is known of these sources on this machine, from the CSVs.

    The last ones are what to decide by. seen: of this run. unmet: part -> modules that it lacked.
    """
    facts = seen.facts
    if facts:
        yield (f"{facts['gpu']}, torch {facts['torch']}, CUDA {facts['cuda']}, triton "
               f"{facts['triton']}, commit {facts['commit']}, sources {facts['source']}, "
               f"{facts['date']}")  # fmt: skip

    def own(name: str, kind: type) -> list[Any]:
        rows = load(folder / f"{name}.csv", kind)
        same = ("source", "gpu", "torch", "triton")
        return [r for r in rows if all(getattr(r, n) == facts.get(n) for n in same)]

    checks = own("gpu_checks", Check)
    if checks:
        yield from ("", "Correct against float64:", *table(verdicts(checks)))
    bench = own("gpu_bench", Result)
    if lines := speeds(bench):
        yield from ("", "Speed:", *table(lines), *background(bench))
    if lines := stages(bench):
        yield from ("", "Stages, ms and as part of the exact tiles:", *table(lines))
    names = (
        "shape",
        "density",
        "impl",
        "stage",
        "blocks",
        "ms_p50",
        "tflops",
        "speedup_vs_dense",
        "rel_l2",
    )
    for name in ("gpu_presets", "gpu_forms", "gpu_model", "gpu_tune"):
        rows = [row for row in own(name, Result) if row.ms_p50 is not None]
        if rows:
            lines = [{column: getattr(row, column) for column in names} for row in rows]
            yield from ("", f"{name.removeprefix('gpu_')}:", *table(lines))
    tried = own(LEDGER.removesuffix(".csv"), Tried)
    bad = [t for t in tried if t.outcome != "done"]
    yield from listed("Wrong, failed or lost", [f"{t.outcome}: {t.unit}: {t.message}" for t in bad])
    yield from listed("Not run for lack of time", seen.late)
    yield from listed("Trouble", seen.trouble)
    lacking = [f"{part}: {', '.join(names)}" for part, names in unmet.items() if names]
    yield from listed("Not run for lack of packages", lacking)
    counts = Counter(t.outcome for t in tried)
    numbers = ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common())
    yield from ("", f"units: {numbers or 'none'}, {len(seen.late)} not run for lack of time")
    if checks or bench:
        shape = DRY if facts.get("gpu") == "interpreter" else SHAPE
        yield from ("", *decision(checks, bench, own("gpu_tune", Result), facts["gpu"], shape))


def failed(seen: Watched, unmet: Mapping[str, Sequence[str]]) -> bool:
    """Whether something is wrong, failed, was lost or could not be run; not, that time ran out."""
    bad = any(outcome != "done" for outcome, _ in seen.outcomes.values())
    nothing = not seen.facts
    return bad or nothing or bool(seen.trouble) or any(unmet.values())


def verdicts(checks: list[Check]) -> list[dict[str, Any]]:
    """Per implementation and dtype: how many comparisons are right, and the largest error."""
    lines = []
    for impl, dtype in dict.fromkeys((c.impl, c.dtype) for c in checks):
        own = [c for c in checks if (c.impl, c.dtype) == (impl, dtype)]
        counts = Counter(c.verdict for c in own)
        worst = max(own, key=lambda c: (c.error or 0.0) / (c.limit or 1.0))
        named = {name: counts[name] for name in ("right", "wrong", "failed", "absent")}
        lines.append({"impl": impl, "dtype": dtype, **named,
                      "nearest to its limit": f"{worst.check}; {worst.shape}",
                      "error": worst.error, "limit": worst.limit})  # fmt: skip
    return lines


def listed(title: str, lines: list[str]) -> Iterator[str]:
    """A list, cut where it is long; nothing if it is empty."""
    if lines:
        yield from ("", f"{title} ({len(lines)}):")
        yield from (f"- {line}" for line in lines[:MOST])
        if len(lines) > MOST:
            yield f"- and {len(lines) - MOST} more, see {LEDGER}"


def table(lines: list[dict[str, Any]]) -> Iterator[str]:
    """A table in Markdown of equal dicts, its columns in line."""
    cells = [[*lines[0]], *([shown(value) for value in line.values()] for line in lines)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(cells[0]))]
    rule = ["-" * width for width in widths]
    for row in (cells[0], rule, *cells[1:]):
        yield "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"


def shown(value: Any) -> str:
    """A number with three or four digits that count."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if value != value:
        return ""
    return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.4g}"
