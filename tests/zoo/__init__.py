"""Tiny random models of every family: a file per family, that exports `CASES` and `PIPELINES`.

A case is one way to call a transformer (text to video, with an image, per-frame timesteps, ...);
`test_families.py` proves the same about all of them. A pipeline is a whole one of diffusers, with
the arguments of its call; `test_family_pipelines.py` runs them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from vidsparse.pipelines.adapter import Adapter
from vidsparse.pipelines.recognition import adapter_for

Grid = tuple[int, int, int]
TEXT = 16
"""Text rows that a case has, padding included; a sample after the first has fewer real ones."""


@dataclass(frozen=True)
class Case:
    """One way to call a transformer of a family.

    model: (heads, head dim) -> transformer. arguments: (transformer, grid in tokens, batch) -> of
        its forward, random.
    head_dims: that the model can have. heads: that it needs.
    controls: entries (as text) without which the output must differ; None: all of them.
    cuts: the model treats parts of the video apart, so an order must not mix them.
    rounding: how far an output of order 1 may be off at density 1, from the order of summation.
    dense: reason -> dense calls of a sparse forward. sparse: whether it has any others.
    grids: sizes of the video that it is proved for; all of one frame: it is an image model.
    takes: whether the stock transformer can be called with a grid at all.
    """

    name: str
    model: Callable[[int, int], nn.Module]
    arguments: Callable[[Any, Grid, int], dict[str, Any]]
    head_dims: tuple[int, ...] = (64, 128)
    heads: int = 2
    controls: tuple[str, ...] | None = None
    cuts: bool = False
    rounding: float = 2e-5
    dense: Mapping[str, int] = field(default_factory=dict)
    sparse: bool = True
    grids: tuple[Grid, ...] = ((3, 6, 8), (3, 5, 7))
    takes: Callable[[Grid], bool] = lambda grid: True

    def __str__(self) -> str:
        return self.name

    def build(
        self, grid: Grid | None = None, batch: int = 2, head_dim: int | None = None
    ) -> Subject:
        """The transformer with the arguments of a forward; grid, head_dim: None is the first."""
        torch.manual_seed(0)
        model = lively(self.model(self.heads, head_dim or self.head_dims[0]))
        return Subject(model, self.arguments(model, grid or self.grids[0], batch))


class Around(DiffusionPipeline):  # type: ignore[misc]
    """The least that is a pipeline: a transformer and a scheduler."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)


class Subject:
    """A transformer in a pipeline, and the arguments of its forward."""

    def __init__(self, model: nn.Module, arguments: dict[str, Any]) -> None:
        self.model, self.arguments = model, arguments
        self.pipe = Around(model, FlowMatchEulerDiscreteScheduler())

    @property
    def adapter(self) -> Adapter:
        return adapter_for(self.pipe)

    def forward(self) -> Tensor:
        """The video output, in float64's place one thread and no gradient."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # tiny tensors are slower on more
        try:
            with torch.no_grad():
                out = self.model(**self.arguments, return_dict=False)[0]
        finally:
            torch.set_num_threads(threads)
        return out


def lively(model: nn.Module) -> nn.Module:
    """Weights that matter: what starts at zero, or is one number a channel, gets random ones."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim < 2 or not parameter.any():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.data += 0.2 * noise.to(parameter.dtype)
    return model.eval()


def noise(*shape: int, seed: int = 3) -> Tensor:
    """The same normal numbers for the same shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def times(batch: int) -> Tensor:
    """A timestep for each sample."""
    return torch.linspace(500, 700, batch)


def words(batch: int, rows: int = TEXT) -> Tensor:
    """int64 [B, rows]: 1 for real text; each sample has less of it, the first has padding too."""
    real = torch.tensor([rows - 3 - 4 * sample for sample in range(batch)]).clamp(min=1)
    return (torch.arange(rows) < real[:, None]).long()


def prompts(batch: int, width: int, mask: str, rows: int = TEXT) -> dict[str, Tensor]:
    """Arguments of a pipeline: embedded prompts of unlike length, and the negative ones.

    mask: name of the argument that says which rows are real.
    """
    real, negative = words(2 * batch, rows).split(batch)
    return {
        "prompt_embeds": noise(batch, rows, width, seed=1),
        mask: real,
        "negative_prompt_embeds": noise(batch, rows, width, seed=2),
        f"negative_{mask}": negative,
    }


STEPS = 4
"""Of every pipeline's call."""

Pipelines = dict[str, Callable[[], tuple[Any, dict[str, Any]]]]
"""Name -> (pipeline, arguments of its call)."""


def cases() -> list[Case]:
    """Of all files, in the order of their names."""
    return [case for file in files().values() for case in file.CASES]


def pipelines() -> Pipelines:
    """Of all files."""
    return {name: build for file in files().values() for name, build in file.PIPELINES.items()}


def files() -> dict[str, Any]:
    """Name -> file, of every family."""
    names = [file.name for file in pkgutil.iter_modules(__path__)]
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}
