"""The diffusers side: how a video model is made to call vidsparse, and how that is undone.

A model family is a file here, for example `wan.py`, that exports `ADAPTER`: all facts about the
family. Only that file imports the diffusers classes of the family. The other files know no model;
`installation.py` puts them to work on one pipeline.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from vidsparse.plan import Branch, TokenGrid

if TYPE_CHECKING:
    from vidsparse.pipelines.processor import SparseProcessor


@dataclass(frozen=True)
class PerToken:
    """An argument of forward that may be [B, tokens], such as a timestep for each token.

    module: submodule that embeds it. outputs: which of its outputs, a tuple, come from it; they
    are [B, tokens, C] if it is [B, tokens].
    """

    argument: str
    module: str
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Adapter:
    """All facts about one model family.

    pipelines: names of the pipeline classes that are tested, for messages; any other pipeline
        whose transformers are of the class `transformer` is accepted too.
    components: names under which a pipeline may hold such a transformer.
    stock, sparse: class of the processor to replace, and of ours (a `SparseProcessor`).
    self_attention: transformer -> the attention modules to accelerate, in layer order.
    grid: (transformer, arguments of its forward by name) -> token grid, never from a token count.
    embeddings: submodules whose output [B, C, frames, height, width] becomes the video tokens.
    rope, rope_axis: submodule that returns the rotary tables (a tuple), and their token axis.
    output: submodule that sees the tokens last, [B, tokens, C].
    per_token: the arguments of forward that may be one for each token.
    branch_order: pipeline class name -> order of the guidance branches inside a step, for
        pipelines that never enter `cache_context`.
    """

    pipelines: tuple[str, ...]
    components: tuple[str, ...]
    transformer: type[nn.Module]
    stock: type
    sparse: type[SparseProcessor]
    self_attention: Callable[[nn.Module], list[Any]]
    grid: Callable[[Any, Mapping[str, Any]], TokenGrid]
    embeddings: tuple[str, ...]
    rope: str
    rope_axis: int
    output: str
    per_token: tuple[PerToken, ...] = ()
    branch_order: Mapping[str, tuple[Branch, ...]] = field(default_factory=dict)

    def transformers(self, pipe: Any) -> dict[str, nn.Module]:
        """Component name -> transformer of this family, each under its first name only."""
        found: dict[str, Any] = {}
        for name in self.components:
            module = getattr(pipe, name, None)
            known = any(eager(module) is eager(other) for other in found.values())
            if isinstance(eager(module), self.transformer) and not known:
                found[name] = module
        return found


def eager(module: Any) -> Any:
    """The module inside a `torch.compile` wrapper, or the module itself."""
    return getattr(module, "_orig_mod", module)


def adapters() -> list[Adapter]:
    """The adapters of all family files, in the order of the file names."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return [module.ADAPTER for module in modules if hasattr(module, "ADAPTER")]
