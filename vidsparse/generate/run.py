"""One generation, or a comparison of the dense and the sparse pipeline: load, run, time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from statistics import fmean
from time import perf_counter, process_time
from typing import Any

import torch
from torch import nn

from vidsparse.accelerate import accelerate_pipeline, restore_pipeline, run_report
from vidsparse.config import SparseConfig
from vidsparse.generate.job import DTYPES, Job, Request, prepare
from vidsparse.generate.loading import load_pipeline, try_out
from vidsparse.generate.memory import is_out_of_memory
from vidsparse.generate.model_files import InputError
from vidsparse.generate.rescue import rescue
from vidsparse.generate.results import Arm, check_encoder, write
from vidsparse.interrupts import check, held, interruptible
from vidsparse.jobs.publish import NotPlaced, Refused, Stage, publishing
from vidsparse.pipelines.recognition import adapter_for
from vidsparse.quality.frames import quantise


class Listener:
    """Is told what a run does while it works; this one ignores it."""

    def say(self, text: str) -> None:
        """Something begins, or is worth knowing."""

    def job(self, job: Job) -> None:
        """This is what will be done."""

    def begin(self, arm: str, steps: int) -> None:
        """An arm, "dense" or "sparse", begins."""

    def step(self, done: int, density: float) -> None:
        """A step has ended. density: mean of its self-attention calls, dense ones counting 1."""

    def end(self) -> None:
        """The arm has ended, or was broken off."""


def generate(request: Request, listener: Listener | None = None) -> dict[str, Any]:
    """`prepare` and `execute`: do what a request says. Raises InputError for a mistake in it."""
    listener = listener or Listener()
    return execute(prepare(request, listener.say), listener)


def execute(job: Job, listener: Listener, pipe: Any = None) -> dict[str, Any]:
    """Load the model, run the arms, write the files. pipe: what `load` returned for a like job.

    Returns what metrics.json holds, and "out", the folder of the files. Whatever goes wrong, an
    interrupt too, no partial folder stays behind and one that was there is as it was; but what was
    computed is kept elsewhere when it cannot be written. Raises InputError for what is found out
    late.
    """
    with placing(job, job.id) as stage:
        check_encoder(stage.folder)
        with interruptible():
            announce(job, stage, listener)
            pipe = load(job, listener) if pipe is None else pipe
        content = render(pipe, job, stage, listener)
    return {**content, "out": str(job.out.resolve())}


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
    try_out(pipe, job.model, job.call)
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
    unknown = _unknown_words(pipe, job.prompt)
    if unknown:
        listener.say(f"note: {job.model.name} never learnt the words: {', '.join(unknown)}")
    with held():
        try:
            with interruptible():
                _accelerate(pipe, job.config)  # refuse before minutes are spent
                if job.compare_dense:
                    listener.say("warming up: one step of each arm, not measured")
                    _accelerate(pipe, job.config.override("schedule.name=constant"))
                    _call(pipe, job, num_inference_steps=1, output_type="latent")
                    restore_pipeline(pipe)
                    _call(pipe, job, num_inference_steps=1, output_type="latent")
                    arms["dense"] = run_arm(pipe, job, "dense", listener)
                    _accelerate(pipe, job.config)
                arms["sparse"] = run_arm(pipe, job, "sparse", listener)
        finally:
            restore_pipeline(pipe)


def run_arm(pipe: Any, job: Job, name: str, listener: Listener) -> Arm:
    """Run the pipeline as it is. name: "dense", or "sparse" for an accelerated one."""
    clock = StepClock(pipe, name == "sparse", listener)
    listener.begin(name, job.call["num_inference_steps"])
    start = perf_counter()
    with clock.running():
        video = _call(
            pipe,
            job,
            callback_on_step_end=clock.step_end,
            callback_on_step_end_tensor_inputs=[],
            output_type="np",
        )
    total = perf_counter() - start
    try:
        frames = quantise(video[0])
    except ValueError as error:
        if job.dtype != "fp16":
            raise
        raise InputError(
            f"--dtype fp16 overflows in this model: take bf16 or fp32 ({error})"
        ) from error
    return Arm(
        frames=frames,
        denoise_seconds=clock.marks[-1] - clock.marks[0],
        cpu_seconds=clock.cpu_marks[-1] - clock.cpu_marks[0],
        total_seconds=total,
        step_seconds=tuple(end - begin for begin, end in pairwise(clock.marks)),
        density=tuple(clock.density),
        report=run_report(pipe) if name == "sparse" else None,
    )


class StepClock:
    """When the steps of a denoising loop ended; the first mark is the first transformer forward."""

    def __init__(self, pipe: Any, sparse: bool, listener: Listener) -> None:
        self.pipe, self.sparse, self.listener = pipe, sparse, listener
        self.marks: list[float] = []
        self.cpu_marks: list[float] = []
        self.density: list[float] = []
        self.seen = 0  # calls of the report that earlier steps have counted

    @contextmanager
    def running(self) -> Iterator[None]:
        """The transformers are watched inside."""
        transformers: list[nn.Module] = [*adapter_for(self.pipe).transformers(self.pipe).values()]
        handles = [m.register_forward_pre_hook(self._forward, prepend=True) for m in transformers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.listener.end()

    def step_end(
        self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        """`callback_on_step_end` of a pipeline."""
        self._mark()
        density = 1.0
        if self.sparse:
            calls = run_report(pipe).calls
            fresh, self.seen = calls[self.seen :], len(calls)
            density = fmean(1.0 if c.reason else c.mean_density for c in fresh) if fresh else 1.0
        self.density.append(density)
        check()  # an interrupt that a library has swallowed
        self.listener.step(step + 1, density)
        return tensors

    def _forward(self, module: nn.Module, args: Any) -> None:
        if not self.marks:
            self._mark()

    def _mark(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(perf_counter())
        self.cpu_marks.append(process_time())


def _call(pipe: Any, job: Job, **more: Any) -> Any:
    """First output of the pipeline. The noise comes from the CPU: the same on every device."""
    generator = torch.Generator("cpu").manual_seed(job.seed)
    return pipe(**{**job.call, **more}, generator=generator)[0]


def _no_memory(job: Job) -> str:
    return (
        f"{job.device} has too little memory for this model at this size: take fewer --frames, "
        "a smaller --height and --width, or --dtype bf16"
    )


def _accelerate(pipe: Any, config: SparseConfig) -> None:
    try:
        accelerate_pipeline(pipe, config)
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
