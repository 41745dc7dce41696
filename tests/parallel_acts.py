"""What each process of a test of context parallelism does; `ranks.on_ranks` starts them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from time import process_time
from typing import Any

import diffusers
import tiny
import torch
import torch.distributed as dist
import zoo
from diffusers import ContextParallelConfig
from diffusers.models import attention_dispatch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import vidsparse

HEADS = 4
SPARSE: dict[str, Any] = {
    "layout": {"name": "tile", "tile": [2, 2, 4]},
    "schedule": {"density": 0.4, "dense_steps": 1, "dense_layers": [], "min_tokens": 0},
    "kernel": {"block_q": 16, "block_k": 16, "impl": "reference"},
}
METHODS: dict[str, list[str]] = {
    "topk": ["selector.name=topk", "compensation.name=none"],
    "taylor": ["selector.name=topk", "compensation.name=taylor"],
    "threshold of each head": ["selector.name=threshold", "compensation.name=none"],
    "top-p of each head": ["selector.name=topp", "selector.p=0.5"],
    "order of each head, kept": ["layout.name=content", "layout.gate=false"],
    "engine of the CPU": ["kernel.impl=cpu", "kernel.cpu_route=native"],
}
"""Name -> overrides; what one process and several must compute alike."""
STEPS = 3


def split(model: Any) -> None:
    """Between all processes, tokens for heads."""
    diffusers.utils.logging.set_verbosity_error()  # it warns that this is experimental
    mesh = processes()
    config = ContextParallelConfig(ulysses_degree=mesh.size(), mesh=mesh)
    model.enable_parallelism(config=config)


def shortened(model: Any) -> Any:
    """Diffusers' plan of Helios names each of 40 blocks; a tiny model has fewer."""
    if isinstance(model, diffusers.HeliosTransformer3DModel):
        blocks, plan = len(model.blocks), type(model)._cp_plan
        model._cp_plan = {
            name: what
            for name, what in plan.items()
            if "*" in name or int(name.split(".")[1]) < blocks
        }
    return model


@cache
def processes() -> Any:
    """All of them; to make their groups takes longer than a forward."""
    return init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("ring", "ulysses"))


def alone_and_together(
    make: Callable[[], Any], run: Callable[[Any], Tensor], *overrides: str, late: bool = False
) -> dict[str, Any]:
    """A pipeline accelerated in one process and in all: largest difference of what they give.

    late: it is accelerated when it has been split already.
    """
    pipe = make()
    vidsparse.accelerate_pipeline(pipe, SPARSE, list(overrides))
    one = run(pipe)
    heads = vidsparse.run_report(pipe).calls[-1].density
    if late:
        pipe = make()
        split(pipe.transformer)
        vidsparse.accelerate_pipeline(pipe, SPARSE, list(overrides))
    else:
        split(pipe.transformer)
        if getattr(pipe, "transformer_2", None) is not None:
            split(pipe.transformer_2)
    many = run(pipe)
    report = vidsparse.run_report(pipe)
    return {
        "pipe": pipe,
        "one": one,
        "off": float((one - many).abs().max() / one.abs().max()),
        "report": report,
        "heads": heads,
    }


def told(found: dict[str, Any], plain: Tensor) -> dict[str, Any]:
    """What of it can be sent. plain: what the stock pipeline gives in one process."""
    report, one = found["report"], found["one"]
    return {
        "off": found["off"],
        "sparse": float((one - plain).abs().max() / one.abs().max()),
        "reasons": report.dense_reasons,
        "density": report.calls[-1].density,
        "heads": found["heads"],
        "share": report.share,
    }


def case(name: str) -> zoo.Case:
    return next(case for case in zoo.cases() if str(case) == name)


def forwards(pipe: Any, arguments: dict[str, Any]) -> Tensor:
    """A run of a bare transformer, both branches of guidance in each step."""
    outputs = []
    for index in range(STEPS):
        for branch in ("cond", "uncond"):
            given = dict(arguments)
            given["hidden_states"] = arguments["hidden_states"] * (1 + 0.1 * index)
            if branch == "uncond":
                given["encoder_hidden_states"] = -arguments["encoder_hidden_states"]
            with torch.no_grad(), vidsparse.step(index, STEPS, branch):  # type: ignore[arg-type]
                outputs.append(pipe.transformer(**given, return_dict=False)[0])
    return torch.stack(outputs)


class Bare:
    """A case of the zoo with heads for every process."""

    def __init__(self, name: str, grid: zoo.Grid) -> None:
        self.case = case(name)
        self.arguments = self.case.arguments(self.make().transformer, grid, 2)
        self.plain = self.run(self.make())

    def make(self) -> Any:
        torch.manual_seed(0)
        model = self.case.model(HEADS, self.case.head_dims[0])
        return zoo.Around(shortened(zoo.lively(model)), tiny.euler())

    def run(self, pipe: Any) -> Tensor:
        return forwards(pipe, self.arguments)

    def compared(self, *overrides: str, late: bool = False) -> dict[str, Any]:
        return told(alone_and_together(self.make, self.run, *overrides, late=late), self.plain)


def wan(rank: int) -> dict[str, Any]:
    """All methods on one forward after the other, and a whole pipeline."""
    bare = Bare("wan", (3, 4, 4))
    found = {name: bare.compared(*METHODS[name]) for name in METHODS}
    found["accelerated last"] = bare.compared(late=True)
    found["pipeline"], pipe, plain = whole("wan")
    vidsparse.restore_pipeline(pipe)
    _, call = tiny.build("wan", heads=HEADS)
    found["pipeline"]["restored"] = float((tiny.run(pipe, call) - plain).abs().max())
    return found


def whole(name: str, **options: Any) -> tuple[dict[str, Any], Any, Tensor]:
    """A pipeline of `tiny`: what is told of it, itself, split, and what it gave before all."""
    build = partial(tiny.build, name, heads=HEADS, **options)
    plain, call = build()
    before = tiny.run(plain, call)
    found = alone_and_together(lambda: build()[0], lambda pipe: tiny.run(pipe, call))
    return told(found, before), found["pipe"], before


FAMILIES: dict[str, zoo.Grid] = {
    "chronoedit": (3, 4, 4),
    "cogvideox": (3, 4, 4),
    "cogvideox 1.5": (2, 4, 4),
    "flux": (1, 6, 8),
    "flux2": (1, 6, 8),
    "flux2 klein kv": (1, 6, 8),
    "flux2 references": (1, 6, 8),
    "helios": (3, 4, 4),
    "hunyuan_video": (3, 4, 4),
    "minimax_h3 each row": (3, 4, 4),
    "minimax_h3 frames": (2, 4, 5),
    "minimax_h3 references": (3, 4, 4),
    "qwen_image": (1, 6, 8),
    "qwen_image layered": (3, 5, 7),
    "wan token times": (3, 4, 4),
}
"""Case -> a grid that divides into two, with all that stands beside the video."""


def families(rank: int, names: list[str]) -> dict[str, Any]:
    """Cases of them; where a plan of ours split them, restoring them ends that."""
    found = {}
    for name in names:
        bare = Bare(name, FAMILIES.get(name, (3, 4, 4)))
        last = alone_and_together(bare.make, bare.run, *METHODS["taylor"])
        found[name] = told(last, bare.plain)
        if type(last["pipe"].transformer)._cp_plan is None:
            vidsparse.restore_pipeline(last["pipe"])
            found[name]["restored"] = torch.equal(bare.run(last["pipe"]), bare.plain)
    return found


def pipelines(rank: int) -> dict[str, Any]:
    """Whole ones of Wan that differ: a timestep for each token, two transformers, image keys."""
    found = {name: whole(name)[0] for name in ("wan_ti2v_image", "wan22")}
    return {**found, "wan_i2v": whole("wan_i2v", head_dim=8)[0]}  # its image keys are 32 wide


def measured(rank: int, grids: list[zoo.Grid]) -> list[dict[str, float]]:
    """CPU seconds of a sparse forward of Wan in one process and in all; bytes that this one sends.

    The best of three; one sample.
    """
    found = []
    for grid in grids:
        pipe = zoo.Around(tiny.transformer(heads=HEADS, head_dim=64), tiny.euler())
        arguments = case("wan").arguments(pipe.transformer, grid, 1)
        vidsparse.accelerate_pipeline(pipe, SPARSE, [*METHODS["engine of the CPU"], *BLOCKS])
        one = seconds(pipe, arguments)
        split(pipe.transformer)
        sent = [0.0]
        exchange = attention_dispatch._all_to_all_single

        def counted(x: Tensor, group: Any, sent: Any = sent, exchange: Any = exchange) -> Tensor:
            sent[0] += x.nbytes * (dist.get_world_size(group) - 1) / dist.get_world_size(group)
            out: Tensor = exchange(x, group)
            return out

        attention_dispatch._all_to_all_single = counted
        two = seconds(pipe, arguments)
        attention_dispatch._all_to_all_single = exchange
        found.append({"one": one, "two": two, "sent": sent[0] / RUNS})
    return found


BLOCKS = ["kernel.block_q=64", "kernel.block_k=64", "schedule.dense_steps=0"]
RUNS = 3


def seconds(pipe: Any, arguments: dict[str, Any]) -> float:
    """CPU time of a forward, the least of some."""
    taken = []
    for _ in range(RUNS):
        start = process_time()
        with torch.no_grad(), vidsparse.step(1, STEPS):
            pipe.transformer(**arguments, return_dict=False)
        taken.append(process_time() - start)
    return min(taken)
