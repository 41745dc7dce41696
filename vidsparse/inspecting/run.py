"""One inspection: load, run once with a recorder, draw, and publish the folder as one act."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from vidsparse.accelerate import accelerate_pipeline, restore_pipeline
from vidsparse.drawing import require_matplotlib
from vidsparse.generate.clock import Listener
from vidsparse.generate.job import Job, prepare
from vidsparse.generate.model_files import InputError
from vidsparse.generate.request import Request
from vidsparse.generate.results import Arm, conditions
from vidsparse.generate.run import announce, load, placing, run_arm
from vidsparse.generate.sizes import read_grid
from vidsparse.inspecting.capture import Recorder
from vidsparse.inspecting.choice import Choice, choose_parts, choose_query, choose_steps, spans
from vidsparse.inspecting.figures import by_head, mass_maps, reads
from vidsparse.inspecting.film import film
from vidsparse.inspecting.page import Group, Picture, Section, write_index
from vidsparse.inspecting.places import Places
from vidsparse.interrupts import check, held, interruptible
from vidsparse.jobs.identity import job_id
from vidsparse.jobs.layout import INSPECTION, METRICS, PAGE, REPORT
from vidsparse.pipelines.recognition import adapter_for
from vidsparse.quality.frames import atomic_output
from vidsparse.reasons import REASONS
from vidsparse.versions import versions


@dataclass(frozen=True)
class Inspection:
    """What to look at, and in which run; empty: a choice is made. query: FRAME,ROW,COLUMN."""

    request: Request
    steps: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    query: str | None = None


def inspect(inspection: Inspection, listener: Listener | None = None) -> dict[str, Any]:
    """Run the pipeline once and write the pictures.

    Returns what metrics.json holds, and "out", the folder. Whatever goes wrong, an interrupt too,
    the folder is as it was. Raises InputError for a mistake in the inspection, and for a run in
    which nothing was sparse.
    """
    listener = listener or Listener()
    try:
        require_matplotlib()
    except ImportError as error:
        raise InputError(str(error)) from error
    job = _always_sparse(prepare(inspection.request, listener.say))
    height, width, frames = job.size
    steps = choose_steps(job.config, job.steps, inspection.steps)
    query = choose_query(inspection.query, read_grid(job.model).tokens(frames, height, width))
    wanted = {"layers": sorted(inspection.layers), "heads": sorted(inspection.heads)}
    id = job_id({"of": job.id, "steps": list(steps), "query": list(query), **wanted})
    with placing(job, id) as stage, interruptible():
        announce(job, stage, listener)
        pipe = load(job, listener)
        choice = Choice(steps, *_parts(pipe, job, steps, inspection), query)
        recorder, arm = record(pipe, job, choice, listener)
        listener.say("drawing")
        content = draw(stage.folder, id, job, recorder, arm)
    return {**content, "out": str(job.out.resolve())}


def _always_sparse(job: Job) -> Job:
    """The job without dense calls where those are only as fast: it is a plan that is wanted."""
    if job.config.kernel.crossover != "auto":
        return job
    change = "kernel.crossover=1"
    config = job.config.override(change)
    return replace(job, config=config, overrides=(*job.overrides, change))


def _parts(
    pipe: Any, job: Job, steps: tuple[int, ...], inspection: Inspection
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Layers and heads to look at, checked against the loaded model."""
    adapter = adapter_for(pipe)
    modules = adapter.self_attention(next(iter(adapter.transformers(pipe).values())))
    total, asked = job.steps, (inspection.layers, inspection.heads)
    return choose_parts(job.config, steps, total, len(modules), modules[0].heads, asked)


def record(pipe: Any, job: Job, choice: Choice, listener: Listener) -> tuple[Recorder, Arm]:
    """Run the pipeline sparse under a recorder; afterwards it is what it was before.

    Raises InputError if nothing that was chosen was sparse.
    """
    recorder = Recorder(job.config, choice)
    with held():
        try:
            with interruptible(), _refusals():
                accelerate_pipeline(pipe, job.preset, job.overrides)
            with interruptible(), recorder.recording(pipe):
                arm = run_arm(pipe, job, "sparse", listener)
        finally:
            restore_pipeline(pipe)
    check()
    if not recorder.maps:
        raise InputError(_never_sparse(arm, choice))
    return recorder, arm


@contextmanager
def _refusals() -> Iterator[None]:
    """What cannot be accelerated is a mistake of the user."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error


def _never_sparse(arm: Arm, choice: Choice) -> str:
    """Why there is nothing to draw, and the cure."""
    assert arm.report is not None
    steps = set(choice.steps)
    found = {call.reason for call in arm.report.calls if call.step in steps and call.reason}
    why = "; ".join(f"{code}: {REASONS.get(code, code)}" for code in sorted(found))
    return (
        f"nothing was sparse in step {spans(choice.steps)}, layer {spans(choice.layers)}: {why}; "
        "--set schedule.min_tokens=0 makes short videos sparse"
    )


def draw(folder: Path, id: str, job: Job, recorder: Recorder, arm: Arm) -> dict[str, Any]:
    """Write all pictures, the page and metrics.json; returns the content of the last."""
    sections = [
        _summary(folder, recorder, arm),
        _masses(folder, recorder),
        _readings(folder, recorder, arm),
        _films(folder, recorder),
    ]
    assert arm.report is not None
    arm.report.save(folder / REPORT)
    rows = [
        {"step": step, "layer": layer, "head": head, **asdict(found)}
        for (step, layer, head), found in sorted(recorder.figures.items())
    ]
    facts = conditions(job, arm)
    said = (
        f"{job.model.name}, {facts['width']}x{facts['height']}, {facts['frames']} frames, "
        f"{facts['steps']} steps, {job.tokens:,} tokens, seed {job.seed}, {job.dtype} on "
        f"{job.device}, preset {' '.join([job.preset, *job.overrides])}"
    )
    write_index(folder, sections, rows, job.prompt, said, _notes(recorder))
    files = [p.file for s in sections for g in s.groups for p in g.pictures]
    content = {
        "schema": INSPECTION,
        "id": id,
        **facts,
        "chosen": asdict(recorder.choice),
        "density": arm.report.density,
        "attention_density": arm.report.attention_density,
        "heads": rows,
        "versions": versions(),
        "files": [PAGE, *files, REPORT, METRICS],
    }
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_output(folder / METRICS) as part:  # the last file: with it the folder is complete
        part.write_bytes(text.encode(errors="backslashreplace") + b"\n")
    reread: dict[str, Any] = json.loads(text)
    return reread


def _notes(recorder: Recorder) -> list[str]:
    """What of the choice the run did not have."""
    choice = recorder.choice
    wanted = {(s, n, h) for s in choice.steps for n in choice.layers for h in choice.heads}
    missing = sorted({(step, layer) for step, layer, _ in wanted - set(recorder.maps)})
    if not missing:
        return []
    named = ", ".join(f"step {step} layer {layer}" for step, layer in missing)
    return [f"dense in this run, so without maps: {named}"]


def _summary(folder: Path, recorder: Recorder, arm: Arm) -> Section:
    assert arm.report is not None
    arm.report.plot(folder / "density.png")
    size = tuple(1 + max(place[n] for place in recorder.figures) for n in (1, 2))
    by_head(folder / "heads.png", recorder.figures, (size[0], size[1]), recorder.choice.steps)
    found = list(recorder.figures.values())
    recall, error = fmean(f.recall for f in found), fmean(f.error for f in found)
    worst = max(recorder.figures, key=lambda place: recorder.figures[place].error)
    return Section(
        "summary",
        "Density, recall and error",
        f"All layers and heads in step {spans(recorder.choice.steps)}; the maps below are of layer "
        f"{spans(recorder.choice.layers)}, head {spans(recorder.choice.heads)}.",
        [
            Group("", [Picture(
                "density.png",
                "Heat map of density by step and layer",
                "Density of attention by step and layer, mean over heads and guidance branches. "
                "Grey cells ran dense, for the reason in the legend.",
            )]),
            Group("", [Picture(
                "heads.png",
                "Heat maps of recall and error by layer and head",
                f"Above: share of the true attention mass in the blocks that the plan lists, mean "
                f"{recall:.3f}. Below: relative L2 error of the output against full attention of "
                f"the same q, k, v, mean {error:.3g}; the largest is "
                f"{recorder.figures[worst].error:.3g} in step {worst[0]}, layer {worst[1]}, head "
                f"{worst[2]}.",
            )]),
        ],
    )  # fmt: skip


def _masses(folder: Path, recorder: Recorder) -> Section:
    places, groups = _places(recorder), []
    for step, layer in sorted({place[:2] for place in recorder.maps}):
        heads = [h for h in recorder.choice.heads if (step, layer, h) in recorder.maps]
        name = f"mass-step{step:02d}-layer{layer:02d}.png"
        mass_maps(
            folder / name,
            {h: recorder.maps[step, layer, h] for h in heads},
            {h: recorder.figures[step, layer, h] for h in heads},
            f"step {step}, layer {layer}",
            {
                h: places.under(recorder.maps[step, layer, h].plan).tile(recorder.choice.query)
                for h in heads
            },
        )
        said = "; ".join(_said(recorder, (step, layer, head)) for head in heads)
        alt = f"Draft and true block mass, step {step}, layer {layer}"
        groups.append(Group(f"Step {step}, layer {layer}", [Picture(name, alt, said)]))
    return Section(
        "mass",
        "Draft beside true mass",
        "How much of a query block's attention falls on each key block: as the estimator drafts it "
        "before the selection, and as full attention has it (softmax in float32). Same colours in "
        "both; blocks in layout order, and where a head has an order of its own, in that.",
        groups,
    )


def _said(recorder: Recorder, place: tuple[int, int, int]) -> str:
    found = recorder.figures[place]
    return (
        f"head {place[2]}: the plan lists blocks with {found.recall:.1%} of the true mass (the "
        f"best choice of as many: {found.best:.1%}) at density {found.density:.3f}, output error "
        f"{found.error:.3g}"
    )


def _readings(folder: Path, recorder: Recorder, arm: Arm) -> Section:
    shared, query, groups = _places(recorder), recorder.choice.query, []
    for step, layer in sorted({place[:2] for place in recorder.maps}):
        pictures = []
        for head in recorder.choice.heads:
            one = recorder.maps.get((step, layer, head))
            if one is None:
                continue
            name = f"reads-step{step:02d}-layer{layer:02d}-head{head:02d}.png"
            places = shared.under(one.plan)
            tile = places.tile(query)
            volume, own = places.levels(one.plan.levels, recorder.rest, tile), places.tokens(tile)
            title = f"step {step}, layer {layer}, head {head}: query block {tile}"
            centroid = places.cuts[1].levels
            reads(folder / name, volume, own, arm.frames, centroid, title)
            caption = (
                f"Head {head}: the block reads {(volume == 0).mean():.1%} of the video exactly"
            )
            pictures.append(Picture(name, f"{title}, over the frames", caption + "."))
        groups.append(Group(f"Step {step}, layer {layer}", pictures))
    return Section(
        "reads",
        "What one query block reads",
        f"The block that holds the token at latent frame {query[0]}, row {query[1]}, column "
        f"{query[2]} (outlined), and the level at which it reads every region of the video, drawn "
        "over the decoded frames.",
        groups,
    )


def _films(folder: Path, recorder: Recorder) -> Section:
    layer, head = recorder.shown
    name = f"levels-layer{layer:02d}-head{head:02d}.gif"
    title = f"layer {layer}, head {head}"
    places, query = _places(recorder), recorder.choice.query
    film(folder / name, recorder.film, recorder.rest, places, query, title)
    caption = "Left: the plan, the row of the query tile outlined. Right: what the tile reads."
    picture = Picture(name, f"Levels of {title}, step by step", caption)
    about = f"Every step of the run, {title}."
    return Section("steps", "The plan over the steps", about, [Group("", [picture])])


def _places(recorder: Recorder) -> Places:
    assert recorder.grid is not None and recorder.cuts is not None
    return Places.of(recorder.grid, recorder.config.layout, recorder.cuts)
