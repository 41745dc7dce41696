"""summary.md: a comparison as a page that can be pasted into an issue."""

from __future__ import annotations

from vidsparse.compare.comparison import Comparison, Row
from vidsparse.compare.sets import FEWEST
from vidsparse.terminal import printable

MOST_CLIPS = 40
"""Rows of the table of clips; of more the worst are shown."""


def markdown(comparison: Comparison) -> str:
    """The whole page."""
    parts = ["# vidsparse compare", "", *_arms(comparison)]
    if comparison.misses:
        parts += ["", "**Thresholds missed**", "", *(f"- {safe(why)}" for why in comparison.misses)]
    if comparison.warnings:
        parts += ["", *(f"> {safe(warning)}" for warning in comparison.warnings)]
    if comparison.pairings:
        parts += ["", *_pairings(comparison)]
    parts += ["", *_clips(comparison), "", *_notes(comparison)]
    return "\n".join(parts) + "\n"


def _arms(comparison: Comparison) -> list[str]:
    lines = [
        "| arm | clips | speed-up | PSNR dB | worst clip | SSIM | worst clip | flicker | density |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in comparison.tests:
        name = arm.name
        psnr, ssim = comparison.spread(name, "psnr_pool"), comparison.spread(name, "ssim")
        flicker = comparison.spread(name, "tf_diff")
        lines.append(
            row(
                safe(name) + (" (lossy files)" if comparison.lossy(name) else ""),
                str(len(comparison.of(name))),
                number(comparison.speedup(name), ".2f", "x"),
                number(psnr.mean if psnr else None, ".2f"),
                number(psnr.worst if psnr else None, ".2f"),
                number(ssim.mean if ssim else None, ".4f"),
                number(ssim.worst if ssim else None, ".4f"),
                number(flicker.mean if flicker else None, "+.5f"),
                number(comparison.mean(name, "density"), ".3f"),
            )
        )
    return lines


def _pairings(comparison: Comparison) -> list[str]:
    lines = [
        "| A against B | measure | mean A - B | 95 % interval | wins, ties, losses | better |",
        "|---|---|---|---|---|---|",
    ]
    for pair in comparison.pairings:
        interval = "-"
        if pair.low is not None and pair.high is not None:
            interval = f"{pair.low:+.4g} .. {pair.high:+.4g}" + (
                " (few clips)" if pair.wide else ""
            )
        lines.append(
            row(
                f"{safe(pair.a)} against {safe(pair.b)}",
                pair.measure,
                f"{pair.mean:+.4g}",
                interval,
                f"{pair.wins}, {pair.ties}, {pair.losses}",
                safe(pair.better or "-"),
            )
        )
    if any(pair.low is None for pair in comparison.pairings):
        lines += ["", f"No interval below {FEWEST} clips."]
    return lines


def _clips(comparison: Comparison) -> list[str]:
    lines = [
        "| arm | clip | PSNR dB | worst frame | drift dB/s | SSIM | flicker x | speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = list(comparison.rows)
    if len(rows) > MOST_CLIPS:
        rows = sorted(rows, key=lambda one: one.measured.metrics.psnr_pool)[:MOST_CLIPS]
    lines += [_clip(one) for one in rows]
    if len(rows) < len(comparison.rows):
        lines += ["", f"The {len(rows)} worst of {len(comparison.rows)}; clips.csv holds all."]
    return lines


def _clip(one: Row) -> str:
    metrics = one.measured.metrics
    worst = f"{number(metrics.psnr_min, '.2f')} (frame {metrics.worst_frame})"
    return row(
        safe(one.arm),
        safe(one.clip),
        number(metrics.psnr_pool, ".2f"),
        worst,
        number(metrics.psnr_slope, "+.2f"),
        number(metrics.ssim, ".4f"),
        number(metrics.flicker_ratio, ".3f"),
        number(one.speedup, ".2f", "x"),
    )


def _notes(comparison: Comparison) -> list[str]:
    lines = [
        "PSNR: of the MSE pooled over all frames, RGB, peak 255. SSIM: Gaussian 11x11, sigma 1.5, "
        "valid positions, mean of R, G, B. Flicker: temporal flickering, 1 - mean difference of "
        "consecutive frames / 255, minus that of the reference. All of them say how near the test "
        "is to the reference, not how good it is.",
    ]
    for name in comparison.settings.compat:
        lines += [
            "",
            f"By the convention of {name}:",
            "",
            "| arm | clip | PSNR dB | SSIM |",
            "|---|---|---|---|",
        ]
        for one in comparison.rows:
            both = one.measured.compat[name]
            lines.append(
                row(
                    safe(one.arm),
                    safe(one.clip),
                    number(both["psnr"], ".2f"),
                    number(both["ssim"], ".4f"),
                )
            )
    return lines


def row(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def number(value: float | None, form: str, unit: str = "") -> str:
    """A figure, "-" if it is not there, "identical" for an infinite PSNR."""
    if value is None:
        return "-"
    return "identical" if value == float("inf") else f"{value:{form}}{unit}"


def safe(text: str) -> str:
    """Text that stays text: no table bars, no markup, no control characters."""
    text = printable(text)
    for character in "&\\`*_[]<>|#":  # & first: entities hold it
        text = text.replace(
            character, f"\\{character}" if character not in "<>&" else _ENTITY[character]
        )
    return text


_ENTITY = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
