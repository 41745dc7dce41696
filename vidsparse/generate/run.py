"""One generation, or a comparison of the dense and the sparse pipeline: load, run, time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch

from vidsparse.accelerate import accelerate_pipeline, restore_pipeline, run_report
from vidsparse.config import SparseConfig
from vidsparse.generate import forecast, ranks
from vidsparse.generate.clock import Listener, StepClock
from vidsparse.generate.job import Job, prepare
from vidsparse.generate.loading import load_pipeline, schedule, try_out
from vidsparse.generate.memory import is_out_of_memory
from vidsparse.generate.model_files import InputError
from vidsparse.generate.request import DTYPES, Request
from vidsparse.generate.rescue import rescue
from vidsparse.generate.results import Arm, check_encoder, write
from vidsparse.interrupts import check, held, interruptible
from vidsparse.jobs.publish import NotPlaced, Refused, Stage, publishing
from vidsparse.pipelines.parallel import Unshared, split_pipeline
from vidsparse.quality.frames import quantise

Loading = Callable[[Job, Listener], Any]
"""Makes a job's pipeline."""


def generate(request: Request, listener: Listener | None = None) -> dict[str, Any]:
    """`prepare` and `execute`: do what a request says. Raises InputError for a mistake in it."""
    listener = listener or Listener()
    return execute(prepare(request, listener.say), listener)


def execute(
    job: Job, listener: Listener, pipe: Any = None, loading: Loading | None = None
) -> dict[str, Any]:
    """Load the model, run the arms, write the files. pipe: what `load` returned for a like job.
    loading: instead of `load`; is called when the files can be written, before all that is long.

    Returns what metrics.json holds, and "out", the folder of the files. Whatever goes wrong, an
    interrupt too, no partial folder stays behind and one that was there is as it was; but what was
    computed is kept elsewhere when it cannot be written. Raises InputError for what is found out
    late.
    """
    with placing(job, job.id) as stage, threads(job):
        check_encoder(stage.folder)
        with interruptible():
            announce(job, stage, listener)
            pipe = (loading or load)(job, listener) if pipe is None else pipe
        content = render(pipe, job, stage, listener)
    return {**content, "out": str(job.out.resolve())}


def load_together(job: Job, listener: Listener) -> Any:
    """`load`, in all processes that share the video: the others wait for this to `follow`."""
    ranks.tell(job.ulysses)
    return load(job, listener)


def follow(job: Job, pipe: Any = None) -> Any:
    """What `execute` computes, in a process that shares the video and does not speak for it; writes
    nothing. Returns the pipeline. Raises InputError."""
    listener = Listener()
    try:
        with threads(job):
            pipe = load(job, listener) if pipe is None else pipe
            run_arms(pipe, job, listener, {})
        return pipe
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(_no_memory(job)) from error


@contextmanager
def threads(job: Job) -> Iterator[None]:
    """As many of torch inside as a job asks for."""
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def placing(job: Job, id: str) -> Iterator[Stage]:
    """`publishing` the folder of a job, in which what is found out late is an InputError.

    id: of what the folder will hold. An interrupt that comes when the folder is in its place says
    so in a note.
    """
    stage = None
    try:
        with publishing(job.out, id, overwrite=job.overwrite) as stage:
            yield stage
    except (Refused, NotPlaced) as error:
        raise InputError(f"--out {error}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(_no_memory(job)) from error
    except KeyboardInterrupt as interrupt:
        if stage is not None and stage.published:
            interrupt.add_note(f"the files are in {job.out}")
        raise


def announce(job: Job, stage: Stage, listener: Listener) -> None:
    """Say what will be done, and what it will replace."""
    listener.job(job)
    if stage.note:
        listener.say(f"note: {job.out}: {stage.note}")


def load(job: Job, listener: Listener) -> Any:
    """The pipeline in the job's dtype, but its autoencoder in fp32. Raises InputError."""
    for note in job.notes:
        listener.say(note)
    listener.say(f"loading {job.model.name}")
    dtype = getattr(torch, DTYPES[job.dtype])
    pipe = load_pipeline(job.model, dtype, job.device, listener.say)
    schedule(pipe, job)
    try_out(pipe, job)
    return pipe


def render(pipe: Any, job: Job, stage: Stage, listener: Listener) -> dict[str, Any]:
    """Run the arms of a job on a loaded pipeline, write all into the stage's folder.

    Returns the metrics. Raises InputError for what cannot be accelerated or written; what was
    computed before that is kept elsewhere.
    """
    arms: dict[str, Arm] = {}
    try:
        with interruptible():
            run_arms(pipe, job, listener, arms)
            listener.say("measuring and writing" if "dense" in arms else "writing")
        return write(job, arms["sparse"], arms.get("dense"), stage.folder)
    except Exception as error:
        check()  # an interrupt makes libraries fail in ways of their own
        if not arms:
            raise
        kept = rescue(job, arms, stage)
        if is_out_of_memory(error):
            raise InputError(f"{_no_memory(job)}; {kept}") from error
        if isinstance(error, InputError):
            raise InputError(f"{error}; {kept}") from error
        if isinstance(error, OSError) and "sparse" in arms:
            why = str(error).replace(f"{stage.folder}/", "")
            raise InputError(f"--out {job.out}: cannot be written: {why}; {kept}") from error
        error.add_note(kept)
        raise


def run_arms(pipe: Any, job: Job, listener: Listener, arms: dict[str, Arm]) -> None:
    """Run "dense", if it is asked for, and "sparse", each into `arms` when it is complete.

    The pipeline is afterwards what it was before, an interrupt included. Raises InputError.
    """
    schedule(pipe, job)
    unknown = _unknown_words(pipe, job.prompt)
    if unknown:
        listener.say(f"note: {job.model.name} never learnt the words: {', '.join(unknown)}")
    with held():
        try:
            with interruptible():
                alone = job.ulysses == 1  # predictions are of one device
                foretold = forecast.announce(pipe, job, listener.say) if alone else {}
                _accelerate(pipe, job, job.config)  # refuse before minutes are spent
                if job.compare_dense:
                    listener.say("warming up: one step of each arm, not measured")
                    _accelerate(pipe, job, job.config.override("schedule.name=constant"))
                    steps = {job.takes.names["steps"]: job.takes.fewest}
                    _call(pipe, job, **steps, output_type="latent")
                    restore_pipeline(pipe)
                    _call(pipe, job, **steps, output_type="latent")
                    arms["dense"] = run_arm(pipe, job, "dense", listener)
                    _accelerate(pipe, job, job.config)
                arms["sparse"] = run_arm(pipe, job, "sparse", listener)
                for name, arm in arms.items():
                    arms[name] = replace(arm, foretold=foretold.get(name))
        finally:
            restore_pipeline(pipe)


def run_arm(
    pipe: Any, job: Job, name: str, listener: Listener, accelerated: bool | None = None
) -> Arm:
    """Run the pipeline as it is. name: "dense" or "sparse", as shown. accelerated: whether the
    pipeline is; None: if it is "sparse"."""
    accelerated = name == "sparse" if accelerated is None else accelerated
    clock = StepClock(pipe, accelerated, listener)
    listener.begin(name, min(job.steps, int(job.steps * job.takes.strength)))
    start = perf_counter()
    with clock.running() as told:
        made = _call(pipe, job, **told, output_type="np")[0]
    total = perf_counter() - start
    try:
        frames = quantise(made if len(made.shape) == 4 else made[None])
    except ValueError as error:
        if job.dtype != "fp16":
            raise
        raise InputError(
            f"--dtype fp16 overflows in this model: take bf16 or fp32 ({error})"
        ) from error
    asked = job.size[2]
    if len(frames) != asked:
        listener.say(f"note: the pipeline made {len(frames)} frames, {asked} were asked for")
    return Arm(
        frames=frames,
        denoise_seconds=clock.marks[-1] - clock.marks[0],
        cpu_seconds=clock.cpu_marks[-1] - clock.cpu_marks[0],
        total_seconds=total,
        step_seconds=tuple(end - begin for begin, end in pairwise(clock.marks)),
        density=tuple(clock.density),
        report=run_report(pipe) if accelerated else None,
    )


def _call(pipe: Any, job: Job, **more: Any) -> Any:
    """First output of the pipeline. The noise comes from the CPU: the same on every device."""
    generator = torch.Generator("cpu").manual_seed(job.seed)
    inputs = {job.takes.names[one.option]: one.value for one in job.inputs}
    try:
        return pipe(**{**job.call, **inputs, **more}, generator=generator)[0]
    except Unshared as error:
        raise InputError(str(error)) from error


def _no_memory(job: Job) -> str:
    return (
        f"{job.device} has too little memory for this model at this size: take fewer --frames, "
        "a smaller --height and --width, or --dtype bf16"
    )


def _accelerate(pipe: Any, job: Job, config: SparseConfig) -> None:
    try:
        accelerate_pipeline(pipe, config)
        if job.ulysses > 1:
            split_pipeline(pipe, job.ulysses, stock=job.compare_dense)
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error


def _unknown_words(pipe: Any, prompt: str) -> list[str]:
    """Words that the tokenizer has no token for: the demo model knows few."""
    tokenizer = getattr(pipe, "tokenizer", None)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if tokenizer is None or unknown is None:
        return []
    words = dict.fromkeys(prompt.split())
    return [w for w in words if unknown in tokenizer(w, add_special_tokens=False).input_ids]
