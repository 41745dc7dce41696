"""Sections of a config that are no stages: forced blocks, the kernel, what a run keeps."""

from __future__ import annotations

from dataclasses import dataclass

from vidsparse import forms, registry
from vidsparse.fields import require


@dataclass(frozen=True)
class Force:
    """Blocks that are exact whatever their score.

    text: text keys for every query, and every key for text queries. own_block: the keys of the
    query block itself; not in a layout with orders of heads, where queries and keys have their own.
    first_frame: all blocks that hold tokens of frame 0. same_frame: all blocks that share a frame
    with the query block. neighbours: so many video blocks before and after those of the query block
    itself, in the order of the layout. sinks: the first so many video blocks. in_budget: forced
    blocks count inside the density (True) or on top.
    """

    text: bool = True
    own_block: bool = True
    first_frame: bool = False
    same_frame: bool = False
    neighbours: int = 0
    sinks: int = 0
    in_budget: bool = True

    def __post_init__(self) -> None:
        for name in ("neighbours", "sinks"):
            value = getattr(self, name)
            require(value >= 0, f"force.{name}", value, "an integer >= 0")


CPU_ROUTES = ("auto", "native", "onednn", "mixed", "sdpa")
FORMS = ("auto", *forms.FORMS)


@dataclass(frozen=True)
class Kernel:
    """How a plan is executed.

    block_q, block_k: tokens per query / key block, a power of two in 16 .. 512; block_q "auto":
        what the executor that is chosen prefers.
    qk: "native" computes q.k in the input dtype with fp32 sums; "int8" in 8 bits with a scale per
        block, Triton engine only.
    impl: auto, or the name of an executor, which is executed or refused, never replaced.
    form: of the Triton forward kernel, auto | pointer | tma; the last is for GPUs of compute
        capability 9 and 10.
    engine: auto, or the name of an exact engine, which runs the listed blocks of plans without
        levels on a GPU: executed or refused, never replaced (`vidsparse doctor` shows them).
    cpu_route: how the CPU engine computes, auto | native | onednn | mixed | sdpa: auto takes what
        was measured to be fastest and exact on this machine (`vidsparse doctor` shows it).
        native: torch's fp32 products; onednn: fp32 products through oneDNN; mixed: for bf16 input,
        weights times values in bf16; sdpa: torch's attention on the keys that a row lists.
    crossover: with impl auto, density above which a call goes dense, in (0, 1], where dense is as
        fast; "auto" measures that once on a CPU and keeps it (`vidsparse doctor` shows it). A
        number makes the decision the same on every machine.
    """

    block_q: int | str = "auto"
    block_k: int = 64
    qk: str = "native"
    impl: str = "auto"
    form: str = "auto"
    engine: str = "auto"
    cpu_route: str = "auto"
    crossover: int | float | str = "auto"

    def __post_init__(self) -> None:
        sizes = [1 << n for n in range(4, 10)]
        allowed = "a power of two, 16 .. 512"
        ok = self.block_q == "auto" or self.block_q in sizes
        require(ok, "kernel.block_q", self.block_q, f"{allowed}, or auto")
        require(self.block_k in sizes, "kernel.block_k", self.block_k, allowed)
        require(self.qk in ("native", "int8"), "kernel.qk", self.qk, "native, int8")
        require(self.form in FORMS, "kernel.form", self.form, ", ".join(FORMS))
        engines = ("auto", *registry.engines())
        require(self.engine in engines, "kernel.engine", self.engine, ", ".join(engines))
        implementations = registry.implementations()
        require(self.impl in implementations, "kernel.impl", self.impl, ", ".join(implementations))
        require(
            self.cpu_route in CPU_ROUTES, "kernel.cpu_route", self.cpu_route, ", ".join(CPU_ROUTES)
        )
        number = isinstance(self.crossover, float | int) and not isinstance(self.crossover, bool)
        ok = 0 < self.crossover <= 1 if number else self.crossover == "auto"  # type: ignore[operator]
        require(ok, "kernel.crossover", self.crossover, "a number in (0, 1], or auto")
        if number:
            object.__setattr__(self, "crossover", float(self.crossover))


@dataclass(frozen=True)
class Keep:
    """What the calls of a run carry from step to step, for each transformer, branch and layer;
    calls of `sparse_attention` belong to no run, and keep nothing. Dropped when the run ends.

    plans: steps for which the blocks that a call has chosen are read again, >= 1; 1: every call
        chooses. SparseD (arXiv 2509.24014) keeps those of the first sparse step to the end.
    residual: add to sparse calls what the last dense step before them gave beyond a sparse call,
        which that step computes too. A call that finds none, as no dense step of this form came
        before, is plainly sparse, and so is one of which padded text is cut out; a schedule without
        dense steps is refused.
    tail: steps for which what the blocks that a call does not list gave is merged again, >= 1; 1:
        never. The first of these steps reads everything, the others what the call has listed then
        (FlashBlock).
    gigabytes: that residuals and tails may take together, > 0; more is refused. Each takes as much
        as the output of a layer and branch, a tail 4 bytes a row and head more.
    """

    plans: int = 1
    residual: bool = False
    tail: int = 1
    gigabytes: float = 8.0

    def __post_init__(self) -> None:
        require(self.plans >= 1, "keep.plans", self.plans, "an integer >= 1")
        require(self.tail >= 1, "keep.tail", self.tail, "an integer >= 1")
        require(self.gigabytes > 0, "keep.gigabytes", self.gigabytes, "a number > 0")
        both = self.tail > 1 and (self.residual or self.plans > 1)
        other = "keep.residual=True" if self.residual else f"keep.plans={self.plans}"
        if both:
            raise ValueError(
                f"keep.tail={self.tail} with {other}: a tail stands for all that is not listed, "
                "and its blocks are kept with it; use one of them"
            )


@dataclass(frozen=True)
class Calibrated:
    """What `vidsparse calibrate` made a preset of; all empty in others. It decides nothing.

    id: of the calibration. model: its name; fingerprint: of its files; transformer: `identity` in
    `vidsparse.pipelines.provenance`. tokens: frames, height, width. target: the goal in a word;
    goal, reached: in words. prompts: measured on; psnr: of each in dB, none if no video was made.
    margin: dB that their mean lies above what is promised of others. held_out, held_out_psnr: of
    the prompts that it was checked on.
    """

    id: str = ""
    model: str = ""
    fingerprint: str = ""
    transformer: str = ""
    tokens: tuple[int, ...] = ()
    steps: int = 0
    seed: int = 0
    target: str = ""
    goal: str = ""
    reached: str = ""
    prompts: tuple[str, ...] = ()
    psnr: tuple[float, ...] = ()
    margin: float = 0.0
    held_out: tuple[str, ...] = ()
    held_out_psnr: tuple[float, ...] = ()
    versions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("tokens", "prompts", "psnr", "held_out", "held_out_psnr", "versions"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
