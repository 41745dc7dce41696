"""End to end: one forward of Wan 2.1 transformers with random weights, dense against vidsparse.

Speed does not depend on the weights, which are drawn on the GPU. Sparse: presets in their sparse
steps as they are, with the permutation hoisted; dense: the fastest backend of diffusers. The
projected times are of 50 steps with two guidance branches, the transformer alone, with the dense
steps of the preset; a model with fewer layers than the real one is scaled by the layers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from gpu_cases import SHAPES, TINY, method, name_of, random_qkv
from gpu_results import Machine, facts, interleaved, speedup, spread
from gpu_rows import Result
from gpu_units import Unit, in_words
from gpu_ways import runs, sound

from vidsparse.attention import attend
from vidsparse.config import SparseConfig

STEPS = 50
PRESETS = ("tiles", "balanced", "fast")
DTYPE = torch.bfloat16
BRANCHES = 2
DENSITY = 0.25
"""Of the preset, where nothing is measured."""

UNTOUCHED = "dense as diffusers sets it"
"""Where nobody has chosen a backend: scaled_dot_product_attention, and what torch takes for it."""

BACKENDS = ("_native_cudnn", "_native_flash", "_flash_3")


@dataclass(frozen=True)
class Model:
    """A transformer. built: layers that are made of it; latents: frames, height, width."""

    name: str
    heads: int
    head_dim: int
    ffn: int
    layers: int
    built: int
    latents: tuple[int, int, int]
    text: int = 4096

    @property
    def tokens(self) -> int:
        frames, height, width = self.latents
        return frames * (height // 2) * (width // 2)


MODELS = (
    Model("wan2.1-1.3b-480p", 12, 128, 8960, 30, 30, (21, 60, 104)),
    Model("wan2.1-14b-720p", 40, 128, 13824, 40, 4, (21, 90, 160)),
)
DRY = Model("tiny", 2, 64, 64, 3, 1, (2, 16, 24), text=16)


def units(machine: Machine) -> list[Unit]:
    """The models and the first call of a fresh process."""
    models = (DRY,) if machine.dry else MODELS
    found = [
        Unit(f"model: {model.name}", blank(model, DENSITY, "vidsparse", "forward"),
             partial(forwards, machine, model), "gpu_model", "model",
             0.0 if machine.dry else 40.0, 200.0)
        for model in models
    ]  # fmt: skip
    first = blank(models[0], DENSITY, "vidsparse", "first call, empty cache")
    least = 0.0 if machine.dry else 30.0
    act = partial(cold_start, machine)
    return [
        *found,
        Unit("model: first call", first, act, "gpu_model", "first call", least, 150.0),
    ]


def forwards(machine: Machine, model: Model) -> Iterator[Result]:
    """ms per forward, per layer and of a whole generation, dense and of every preset."""
    transformer = build(model, machine.device)
    run = partial(transformer, **arguments(model, machine.device))
    untouched = interleaved({"dense": run}, machine, 1.0, 10)["dense"]
    dense = fastest_backend(transformer, run, machine)
    stock = interleaved({"dense": run}, machine, 1.5, 10)["dense"]
    row = partial(row_of, machine, model, dense)
    built, layers = model.built, model.layers
    yield row(1.0, dense, "forward", stock, stock)
    base = [spread(stock)[1]] * len(untouched)
    yield row(1.0, UNTOUCHED, "forward", untouched, base)
    yield row(1.0, dense, "layer", [t / built for t in stock])
    whole = [t * layers / built * BRANCHES * STEPS for t in stock]
    yield row(1.0, dense, f"{STEPS} steps, {layers} layers from {built}", whole)
    for preset in PRESETS:
        config = SparseConfig.load(preset, overrides(machine))
        impl = f"vidsparse-{preset} by {runs(config, machine.device, model.head_dim)}"
        yield from accelerated(machine, model, run, config, partial(row, impl=impl), stock)


def accelerated(
    machine: Machine,
    model: Model,
    run: Callable[[], Any],
    config: SparseConfig,
    row: Callable[..., Result],
    stock: list[float],
) -> Iterator[Result]:
    """Of one preset. A sparse forward is the mean over as many steps as orders of heads last."""
    import vidsparse

    first, period = config.schedule.count("dense_steps", STEPS), config.orders_last or 1
    steps = cycle(range(first, first + (STEPS - first) // period * period))
    pipe = pipeline(run.func)  # type: ignore[attr-defined]
    vidsparse.accelerate_pipeline(pipe, config)

    def sparse() -> None:
        for _ in range(period):
            at_step(run, next(steps))

    times = interleaved({"dense": partial(at_step, run, 0), "sparse": sparse}, machine, 3.0, 20)
    report = vidsparse.run_report(pipe)
    vidsparse.restore_pipeline(pipe)
    reasons = [{call.reason for call in report.calls if bool(call.step) == later}
               for later in (False, True)]  # fmt: skip
    if reasons != [{"warmup-step"}, {None}]:
        raise RuntimeError(f"step 0 should be dense and later ones sparse, were {reasons}")
    kept = [call.mean_density for call in report.calls if call.step]
    density = round(sum(kept) / len(kept), 4)
    later = [t / period for t in times["sparse"]]
    base = [spread(stock)[1]] * len(later)
    yield row(1.0, stage="forward, dense step", times=times["dense"], against=base)
    yield row(density, stage="forward", times=later, against=base)
    yield row(density, stage="layer", times=[t / model.built for t in later])
    scale = model.layers / model.built * BRANCHES
    mixed = [scale * (first * d + (STEPS - first) * s)
             for d, s in zip(times["dense"], later, strict=True)]  # fmt: skip
    yield row(density, stage=f"{STEPS} steps, {model.layers} layers from {model.built}",
              times=mixed, against=[t * scale * STEPS for t in base])  # fmt: skip


def row_of(
    machine: Machine,
    model: Model,
    dense: str,
    density: float,
    impl: str,
    stage: str,
    times: list[float],
    against: list[float] | None = None,
) -> Result:
    """One line; against: dense times of the same rounds."""
    low, middle, high = spread(times)
    return replace(
        blank(model, density, impl, stage),
        ms_p20=low, ms_p50=middle, ms_p80=high,
        dense_impl=dense if against else None,
        speedup_vs_dense=speedup(against, times) if against else None,
    )  # fmt: skip


def blank(model: Model, density: float, impl: str, stage: str) -> Result:
    """A row without times."""
    return Result(
        **facts(), shape=model.name, tokens=model.tokens, heads=model.heads,
        head_dim=model.head_dim, dtype=name_of(DTYPE), density=density, impl=impl, stage=stage,
    )  # fmt: skip


def overrides(machine: Machine) -> list[str]:
    """Of a preset: in a dry run what makes a tiny grid sparse."""
    small = ["schedule.min_tokens=0", "layout.tile=[2,4,4]"] if machine.dry else []
    return ["kernel.impl=triton", *small]


def at_step(run: Callable[[], Any], step: int) -> Any:
    """A forward in this step of a generation."""
    import vidsparse

    with vidsparse.step(step, STEPS):
        return run()


def build(model: Model, device: torch.device) -> Any:
    """The transformer with random weights, bfloat16 but for what diffusers keeps in float32."""
    from diffusers import WanTransformer3DModel

    with torch.device(device):
        transformer = WanTransformer3DModel(
            num_attention_heads=model.heads,
            attention_head_dim=model.head_dim,
            num_layers=model.built,
            ffn_dim=model.ffn,
            text_dim=model.text,
        )
    exact = set(transformer._keep_in_fp32_modules)
    for name, parameter in transformer.named_parameters():
        if not exact & set(name.split(".")):
            parameter.data = parameter.data.to(DTYPE)
    return transformer.eval()


def arguments(model: Model, device: torch.device) -> dict[str, Any]:
    """Of a forward of one guidance branch."""
    return {
        "hidden_states": torch.randn(1, 16, *model.latents, device=device, dtype=DTYPE),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": torch.randn(1, 512, model.text, device=device, dtype=DTYPE),
        "return_dict": False,
    }


def pipeline(transformer: Any) -> Any:
    """A Wan pipeline of a transformer and a scheduler, without text encoder and VAE."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    return WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer
    )


def fastest_backend(transformer: Any, run: Callable[[], Any], machine: Machine) -> str:
    """Set the fastest attention backend of diffusers that works here; its name."""
    if machine.dry:
        return "native"
    speed = {}
    for name in BACKENDS:
        try:
            transformer.set_attention_backend(name)
            speed[name] = spread(interleaved({name: run}, machine, 0.5, 5)[name])[1]
        except Exception as error:
            if not machine.healthy(error):
                raise
            print(f"no backend {name}: {in_words(error)}")
    if not speed:
        raise RuntimeError(f"none of the backends {', '.join(BACKENDS)} runs")
    best = min(speed, key=lambda name: speed[name])
    transformer.set_attention_backend(best)
    return best


def cold_start(machine: Machine) -> Iterator[Result]:
    """Seconds of the first sparse call in a new process with an empty kernel cache, as ms."""
    with tempfile.TemporaryDirectory() as cache:
        script = str(Path(__file__).resolve().parent / "suite.py")
        command = [sys.executable, script, "--first-call", *["--dry-run"] * machine.dry]
        command += ["--engines", *(one.name for one in sound(machine))]
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    if done.returncode:
        raise RuntimeError(f"the first call failed: {done.stderr.strip()[-300:]}")
    first, second = (float(x) for x in done.stdout.split()[-2:])
    model = DRY if machine.dry else MODELS[0]
    row = partial(row_of, machine, model, "")
    yield row(DENSITY, "vidsparse", "first call, empty cache", [1e3 * first])
    yield row(DENSITY, "vidsparse", "second call", [1e3 * second])


def first_call(machine: Machine) -> tuple[float, float]:
    """Seconds of the first and of the second sparse call of this process."""
    shape = TINY if machine.dry else SHAPES["wan2.1-1.3b-480p"]
    q, k, v = (x.transpose(1, 2) for x in random_qkv(shape, machine.device))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        attend(q, k, v, grid=shape.grid, config=method(DENSITY), hoisted=True)
        if not machine.dry:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[1]
