"""Adapter: the facts about a model family that the other files need to put vidsparse into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from vidsparse.grid import TokenGrid
from vidsparse.plan import Branch

if TYPE_CHECKING:
    from vidsparse.pipelines.processor import SparseProcessor

Arguments = Mapping[str, Any]
"""Of a transformer's forward, by name."""


@dataclass(frozen=True)
class Site:
    """A place where a tensor with one row per video token passes, on its way in or out.

    at: "argument": the argument `name` of the transformer's forward; "output" of the submodule
        `name`; "input": its first argument, or `hidden_states`.
    axes: its token axis, or its three axes frames, height, width. In tuples and dicts every tensor
        has them, or the `items` of a tuple alone.
    joint: the text stands in the same tensor, where `Adapter.text` says. Rows of the grid before
        and after the video may stand in any.
    dims: number of axes of a tensor with a row for each token, where it may also be another, or
        have one row for all tokens, which is left alone.
    optional: the submodule or the argument may be missing or None, the tensor without that axis, or
        with one row for all tokens.
    once: only the first call in each forward; the later ones embed other rows.
    """

    at: Literal["argument", "output", "input"]
    name: str
    axes: int | tuple[int, int, int]
    joint: bool = False
    items: tuple[int, ...] | None = None
    dims: int | None = None
    optional: bool = False
    once: bool = False

    def __str__(self) -> str:
        return self.name if self.at == "argument" else f"{self.at} of {self.name}"


@dataclass(frozen=True)
class RealText:
    """Which text rows of each sample are no padding.

    arguments: of the transformer's forward that tell it. rows: their values -> bool [B, rows] for
    the text in the order of the sequence; or int64 [B], how many, where they are its first ones. It
    may wait for the device, as it is called once per prompt. The first of them is the mask: where
    it is None, nobody says.
    """

    arguments: tuple[str, ...]
    rows: Callable[..., Tensor]


@dataclass(frozen=True)
class Split:
    """How diffusers splits the transformers of a family between processes (`parallel.py`).

    plan: for classes that have no `_cp_plan`, or one that their attention does not follow.
    entries: instead of those of the adapter, where the plan splits what passes before it passes.
    together: text and video are split as one sequence, else each by itself.
    cuts: blocks tell parts of the video apart by rows that are split too, not by their place.
    lacks: (transformer, arguments) -> what of a forward the plan does not split, so that it would
        fail or be wrong, as in "..., which diffusers does not split"; "" if nothing.
    """

    plan: Mapping[str, Any] | None = None
    entries: tuple[Site, ...] | None = None
    together: bool = False
    cuts: bool = False
    lacks: Callable[[Any, Arguments], str] = lambda transformer, arguments: ""


NO_SPLIT = "diffusers has no cp_plan for it, and vidsparse knows none"


@dataclass(frozen=True)
class Adapter:
    """All facts about one model family.

    pipelines: names of the pipeline classes that are tested, for messages; any other pipeline
        whose transformers are of the class `transformer` is accepted too.
    components: names under which a pipeline may hold such a transformer.
    sparse: our processors; each takes the place of those of its second base, a stock class.
    self_attention: transformer -> the attention modules to accelerate, in layer order.
    grid: (transformer, arguments) -> token grid without text, never from a token count.
    entries: where video tokens, and what goes with them (positions, timesteps), come in.
    exit: an "input", where all tokens stand together for the last time. None, for a model that
        nobody knows well enough: tokens stay in raster order, and each call permutes its own.
    text: where text stands in the sequence of self-attention. Its rows are counted at each call.
    real_text: which of them are no padding. Without it, a masked call is dense.
    cuts: (transformer, arguments, grid) -> frames at which a token order must begin anew.
    sequence: (transformer, grid, tokens, layer) -> the grid of a self-attention call, None if it
        is not about the video; for families in which not all that is no video is text.
    branch_order: pipeline class name -> order of the guidance branches inside a step, for
        pipelines that never enter `cache_context`.
    packed: latents of each side that a pipeline puts into one row before the transformer sees it.
    split: how several processes share one video; a text says why they cannot.
    own_size: (config of the transformer, height and width of a picture) -> those of the video, for
        pipelines that take no size.
    """

    pipelines: tuple[str, ...]
    components: tuple[str, ...]
    transformer: type[nn.Module]
    sparse: tuple[type[SparseProcessor], ...]
    self_attention: Callable[[Any], list[Any]]
    grid: Callable[[Any, Arguments], TokenGrid]
    entries: tuple[Site, ...]
    exit: Site | None
    text: Literal["none", "first", "last"] = "none"
    real_text: RealText | None = None
    cuts: Callable[[Any, Arguments, TokenGrid], tuple[int, ...]] | None = None
    sequence: Callable[[Any, TokenGrid, int, int], TokenGrid | None] | None = None
    branch_order: Mapping[str, tuple[Branch, ...]] = field(default_factory=dict)
    packed: int = 1
    split: Split | str = NO_SPLIT
    own_size: Callable[[Arguments, tuple[int, int]], tuple[int, int]] | None = None

    def transformers(self, pipe: Any) -> dict[str, nn.Module]:
        """Component name -> transformer of this family, each under its first name only."""
        found: dict[str, Any] = {}
        for name in self.components:
            module = getattr(pipe, name, None)
            known = any(eager(module) is eager(other) for other in found.values())
            if isinstance(eager(module), self.transformer) and not known:
                found[name] = module
        return found

    @property
    def hoisted(self) -> bool:
        """Whether tokens are brought into their order once a forward."""
        return self.exit is not None

    def processors(self) -> dict[type, type[SparseProcessor]]:
        """Stock class -> ours."""
        return {ours.stock_class: ours for ours in self.sparse}

    def video(self, transformer: Any, arguments: Arguments) -> TokenGrid:
        """The grid of a forward, without text."""
        grid = replace(self.grid(transformer, arguments), text_first=self.text == "first")
        if self.cuts is None:
            return grid
        return replace(grid, cuts=self.cuts(transformer, arguments, grid))

    def around(
        self, transformer: Any, grid: TokenGrid, tokens: int, layer: int
    ) -> TokenGrid | None:
        """The grid of a self-attention call of so many tokens, with its text; None: not the video.

        Raises ValueError if they cannot be this video.
        """
        if self.sequence is not None:
            return self.sequence(transformer, grid, tokens, layer)
        words = tokens - grid.other_tokens
        if words and (self.text == "none" or words < 0):
            grid.check(tokens)
        return replace(grid, text_tokens=words)


def eager(module: Any) -> Any:
    """The module inside a `torch.compile` wrapper, or the module itself."""
    return getattr(module, "_orig_mod", module)
