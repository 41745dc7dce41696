"""An adapter for transformers that no family file describes: what can be found out, and no more.

Tokens stay in raster order outside of attention, so nothing has to be known of embeddings and
positions: each call brings its own queries, keys and values into the token order and back. That
costs two permutations a call, which a family's own file saves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, eager
from vidsparse.pipelines.processor import SparseProcessor

COMPONENTS = ("transformer", "transformer_2")


def generic_adapter(
    pipe: Any,
    text: Literal["none", "first", "last"] | None = None,
    grid: Callable[[Any, Arguments], TokenGrid] | None = None,
) -> Adapter:
    """An adapter for the transformers of any pipeline, `accelerate_pipeline(pipe, adapter=...)`.

    text: where text stands in the sequence of self-attention; None: not known, so a call with more
        rows than the video has is refused. grid: (transformer, arguments of its forward by name) ->
        token grid of the video; None: from the shape of `hidden_states` and the patch size of the
        config, or from the arguments num_frames, height and width.

    Every attention module whose processor calls an attention primitive that we know takes part; its
    calls with keys of another length, and over less rows than the video has, are stock. Calls with
    a mask are dense. Warns of what it could not find out: whether a model treats some frames apart,
    and what it does with rows that are no video.

    Raises ValueError if the pipeline has no transformer, or one without such a module.
    """
    if text not in (None, "none", "first", "last"):
        raise ValueError(f"text={text!r}: allowed is none, first, last, or None if not known")
    held = {name: eager(getattr(pipe, name, None)) for name in COMPONENTS}
    models = [module for module in held.values() if isinstance(module, nn.Module)]
    if not models:
        raise ValueError(
            f"this {type(pipe).__name__} has no {' or '.join(COMPONENTS)}: the generic adapter "
            "does not know where else to look"
        )
    sparse = tuple(_processors(models))
    if not sparse:
        raise ValueError(
            f"no attention processor of {type(models[0]).__name__} calls an attention primitive "
            "that vidsparse knows: it needs a family file of its own"
        )
    known = {cls.stock_class for cls in sparse}
    warnings.warn(
        f"the generic adapter takes {', '.join(sorted(cls.__name__ for cls in known))} of "
        f"{type(models[0]).__name__} for self-attention over the video. Not known: whether the "
        "model treats some frames apart, and whether all rows of its sequence are video or text. "
        "Compare with the dense pipeline before you rely on it",
        RuntimeWarning,
        stacklevel=2,
    )

    def self_attention(transformer: Any) -> list[Any]:
        return [m for m in transformer.modules() if _stock(getattr(m, "processor", None)) in known]

    def sequence(model: Any, video: TokenGrid, tokens: int, layer: int) -> TokenGrid | None:
        words = tokens - video.video_tokens
        if words < 0:
            return None
        if words and text in (None, "none"):
            raise ValueError(
                f"self-attention over {tokens} rows, of which {video.video_tokens} are video: say "
                "where the others stand, accelerate_pipeline(pipe, adapter=vidsparse."
                'generic_adapter(pipe, text="first")) or text="last"'
            )
        return TokenGrid(
            video.frames, video.height, video.width, text_tokens=words, text_first=text == "first"
        )

    return Adapter(
        pipelines=(type(pipe).__name__,),
        components=COMPONENTS,
        transformer=type(models[0]),
        sparse=sparse,
        self_attention=self_attention,
        grid=grid or read_grid,
        entries=(),
        exit=None,
        text=text or "none",
        sequence=sequence,
    )


def read_grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    """The token grid that the arguments of a forward show.

    Raises ValueError if they do not.
    """
    named = [arguments.get(name) for name in ("num_frames", "height", "width")]
    if all(isinstance(size, int) for size in named):
        return TokenGrid(*named)  # type: ignore[arg-type]
    config, latents = transformer.config, arguments["hidden_states"]
    channels = getattr(config, "in_channels", None)
    patch = getattr(config, "patch_size", None)
    deep = getattr(config, "patch_size_t", None) or 1
    sides = (deep, patch, patch) if isinstance(patch, int) else patch
    sizes = None
    if latents.ndim == 5 and channels in latents.shape[1:3]:
        frames = latents.shape[2] if latents.shape[1] == channels else latents.shape[1]
        sizes = (frames, *latents.shape[3:])
    if sizes is None or sides is None or len(sides) != 3:
        raise ValueError(
            f"hidden_states of shape {tuple(latents.shape)} with in_channels={channels!r} and "
            f"patch_size={patch!r} does not show the token grid: give it, vidsparse."
            "generic_adapter(pipe, grid=lambda transformer, arguments: vidsparse.TokenGrid(...))"
        )
    return TokenGrid(*(size // side for size, side in zip(sizes, sides, strict=True)))


def _processors(models: list[nn.Module]) -> list[type[SparseProcessor]]:
    """Ours for each class of processors that calls a primitive."""
    found: dict[type, type[SparseProcessor]] = {}
    for model in models:
        for module in model.modules():
            stock = _stock(getattr(module, "processor", None))
            if stock is None or stock in found:
                continue
            try:
                found[stock] = _made(stock)
            except TypeError:  # it calls none that we know
                continue
    return list(found.values())


def _stock(processor: object) -> type | None:
    if isinstance(processor, SparseProcessor):
        return processor.stock_class
    return None if processor is None else type(processor)


def _made(stock: type) -> type[SparseProcessor]:
    """Our processor of a stock class; one class each, however often it is asked for."""
    if stock not in _known:
        _known[stock] = type(f"Sparse{stock.__name__}", (SparseProcessor, stock), {})
    return _known[stock]


_known: dict[type, type[SparseProcessor]] = {}
