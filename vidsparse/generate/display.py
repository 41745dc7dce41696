"""What a person sees while a video is made: a line per phase, a bar per arm, a table at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table

from vidsparse.costs.machine import in_words
from vidsparse.generate.clock import Listener
from vidsparse.generate.job import Job
from vidsparse.jobs.layout import ABOUT
from vidsparse.reasons import REASONS
from vidsparse.terminal import printable

BUSY = 0.5
"""Share of its threads' time that a denoising loop on a quiet CPU uses at least."""
LONGEST_PROMPT = 300
"""Characters of a prompt that are shown."""


class Display(Listener):
    """Progress on a console: a live bar on a terminal, a line per quarter of the way elsewhere."""

    def __init__(self, console: Console, status: Status | None = None) -> None:
        self.console, self.status = console, status  # the status ends with the first message
        self.progress: Progress | None = None
        self.task = TaskID(0)
        self.arm, self.steps = "", 0

    def say(self, text: str) -> None:
        if self.status is not None:
            self.status.stop()
        self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def job(self, job: Job) -> None:
        height, width, frames = job.size
        length = "" if job.takes.still else f"{frames} frames, "
        start = "".join(f", {one.option.replace('_', ' ')} {one.file}" for one in job.inputs)
        self.say(f'{job.model.name}: "{printable(job.prompt, LONGEST_PROMPT)}"{start}')
        self.say(
            f"{width}x{height}, {length}{job.steps} steps, {job.tokens:,} tokens, seed {job.seed}, "
            f"{job.dtype} on {job.device}, preset {' '.join([job.preset, *job.overrides])}, "
            f"{job.config.dense_note(job.steps)}"
        )

    def begin(self, arm: str, steps: int) -> None:
        self.arm, self.steps = arm, steps
        if not self.console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("{task.description:7}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self.console,
            refresh_per_second=4,
        )
        self.task = self.progress.add_task(arm, total=steps, note="")
        self.progress.start()

    def step(self, done: int, density: float) -> None:
        note = f"density {density:.2f}"
        if self.progress is not None:
            note += ", decoding" if done == self.steps else ""
            self.progress.update(self.task, completed=done, note=note)
        elif done == self.steps or done % max(1, self.steps // 4) == 0:
            self.say(f"{self.arm}: {done}/{self.steps} steps, {note}")

    def end(self) -> None:
        if self.progress is not None:
            task = self.progress.tasks[self.task]
            self.progress.update(self.task, note=task.fields["note"].removesuffix(", decoding"))
            self.progress.stop()
            self.progress = None

    def finish(self, content: dict[str, Any]) -> None:
        """Figures and files of a run; content: what `generate` returned."""
        self.console.print(summary(content))
        for note in notes(content):
            self.say(note)
        out = Path(content["out"])
        near = out.is_relative_to(Path.cwd())
        self.say(f"{out.relative_to(Path.cwd()) if near else out}/")
        for name in content["files"]:
            self.say(f"  {name:17} {ABOUT[name]}")


def summary(content: dict[str, Any]) -> Table:
    """The figures worth a look."""
    dense, sparse = content["arms"]["dense"], content["arms"]["sparse"]
    quality, speedup = content["quality"], content["speedup"]
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("", "dense", "sparse", ""):
        table.add_column(name, justify="left" if not name else "right")

    def seconds(title: str, key: str, gain: str) -> None:
        cells = [f"{arm[key]:.2f} s" if arm else "-" for arm in (dense, sparse)]
        table.add_row(title, *cells, f"{speedup[gain]:.2f}x as fast" if speedup else "")

    seconds("denoising", "denoise_seconds", "denoise")
    cells = [_predicted(arm) for arm in (dense, sparse)]
    if any(cells):
        table.add_row("predicted", *(cell or "-" for cell in cells), _off(dense, sparse))
    if bound := content["limit"]:
        why = f"{bound['share']:.0%} of it is sparse attention"
        table.add_row("at most", "", "", f"{bound['speedup']:.2f}x: {why}")
    seconds("median step", "median_step_seconds", "median_step")
    if content["device"] == "cpu":
        seconds("CPU time", "cpu_seconds", "cpu")
    seconds("whole pipeline", "total_seconds", "total")
    overall = f"{content['attention_density']:.2f} with the dense calls"
    table.add_row("density", "1.00" if dense else "-", f"{content['density']:.2f}", overall)
    if quality:
        psnr = quality["psnr_pool"]
        shown = "identical" if psnr is None else f"{psnr:.2f} dB"
        table.add_row("PSNR", "", shown, "sparse against dense, all frames pooled")
        table.add_row("SSIM", "", f"{quality['ssim']:.4f}", "mean over frames")
    return table


def _predicted(arm: dict[str, Any] | None) -> str:
    found = arm and arm.get("predicted")
    return f"{found['seconds']:.2f} s" if found else ""


def _off(*arms: dict[str, Any] | None) -> str:
    """How far the predictions were off, the worst of them, and from what."""
    known = [arm for arm in arms if arm and arm.get("predicted")]
    off = [arm["predicted"]["seconds"] / arm["denoise_seconds"] - 1 for arm in known]
    sources = in_words(known[0]["predicted"]["sources"])
    return f"{max(off, key=abs):+.0%} off, from {sources} figures"


def notes(content: dict[str, Any]) -> list[str]:
    """What a user should not overlook."""
    found = []
    if not content["sparse_calls"]:
        why = "; ".join(REASONS.get(code, code) for code in content["dense_reasons"])
        found.append(f"note: nothing was sparse, every self-attention call ran dense: {why}")
    arms = [arm for arm in content["arms"].values() if arm]
    shares = [arm["cpu_seconds"] / (arm["denoise_seconds"] * content["threads"]) for arm in arms]
    if content["device"] == "cpu" and min(shares) < BUSY:
        found.append(
            f"note: the run got {min(shares):.0%} of {content['threads']} CPU threads; if other "
            "programs are running, compare the CPU times"
        )
    return found


def hide_bars() -> None:
    """Switch off the libraries' bars for loading weights; downloads keep theirs."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
