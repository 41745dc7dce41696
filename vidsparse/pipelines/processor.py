"""SparseProcessor: a model's stock attention processor with vidsparse as attention primitive.

Everything around the attention itself stays the model's own code: we run the stock `__call__`, in
which one global name, that of the attention primitive, means our function. So projections (LoRA,
quantised, fused), norms, rotary embedding, type casts and output projection are stock by
construction and follow diffusers as it changes; a dense call is bit for bit the stock one. A
`__call__` of our own would have to repeat the rotary embedding, which the stock code keeps in a
nested function, and would rot. Nothing global is patched: the name is bound in a copy of the
function's globals.

torch.compile sees one operator, `vidsparse::attention`, and traces everything around it into one
graph. What the operator needs beside tensors it finds by `site`, a 0-d tensor, so a graph serves
every layer and every step.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from vidsparse.attention import AttentionResult, attend, decision_for, full_density
from vidsparse.config import SparseConfig
from vidsparse.operands import as_autocast
from vidsparse.pipelines import private
from vidsparse.pipelines.adapter import Adapter
from vidsparse.pipelines.forward import Forward, RealRows
from vidsparse.pipelines.observation import ObservedCall, Observer
from vidsparse.pipelines.report import RunReport
from vidsparse.plan import StepContext, TokenGrid


@dataclass(frozen=True)
class Link:
    """What ties a processor to an accelerated pipeline.

    forward: of its transformer. layer: index of its module, 0-based. module, transformer: weak
    references to the attention module and to what it is part of. observers: are shown every call,
    see `observation.py`.
    """

    forward: Forward
    layer: int
    config: SparseConfig
    module: weakref.ref[nn.Module]
    transformer: weakref.ref[nn.Module]
    adapter: Adapter
    observers: Sequence[Observer] = ()


class SparseProcessor:
    """First base of a family's processor; the second is the stock class, and that is all of it.

    Made without arguments, or unpickled, it has no link and is a stock processor.
    stock_class: the second base. stock: its `__call__` with our attention primitive. dense: the
    primitive that it had.
    """

    link: Link | None = None
    site: Tensor | None = None
    stock_class: ClassVar[type]
    dense: ClassVar[Callable[..., Tensor]]
    stock: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.stock_class = cls.__mro__[2]
        call = cls.stock_class.__call__
        function = inspect.unwrap(call)
        used = _names(function.__code__)
        name = next((name for name, needs in PRIMITIVES.items() if needs <= used), "")
        cls.stock = rebound(function, name, MEANINGS.get(name, primitive))
        of_stock = function.__globals__.get(name)
        cls.dense = staticmethod(_sdpa_dense if of_stock is functional else of_stock)
        private.skip_as(cls, cls.stock_class)

        @functools.wraps(call)  # diffusers looks at the signature
        def accelerated(self: SparseProcessor, attn: Any, *args: Any, **kwargs: Any) -> Any:
            if self.link is None:
                return call(self, attn, *args, **kwargs)
            return self.run(attn, *args, **kwargs)

        cls.__call__ = accelerated  # type: ignore[method-assign]

    @classmethod
    def replacing(cls, stock: Any, link: Link) -> Self:
        """A processor with the settings of `stock`."""
        new = cls()
        new.__dict__.update(stock.__dict__)
        new.link = link
        number = next(_numbers)
        new.site = torch.tensor(number)
        _sites[number] = new
        return new

    def settings(self) -> dict[str, Any]:
        """What others have set on this processor, for example the attention backend."""
        return {k: v for k, v in self.__dict__.items() if k not in ("link", "site")}

    def __getstate__(self) -> dict[str, Any]:
        return self.settings()

    def run(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The stock `__call__` with our attention primitive."""
        if torch.compiler.is_compiling():
            _running.site = self.site
            return self.stock(attn, *args, **kwargs)
        _running.processor = self
        try:
            return self.stock(attn, *args, **kwargs)
        finally:
            _running.processor = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dense: Any) -> Tensor:
        """q, k, v [B, tokens, H, D], after norm and RoPE -> [B, tokens, H, D].

        A call that is not about the video, as keys of another length show, is a stock one.
        """
        link = self.link
        forward = link.forward if link else None
        grid, context = (forward.grid, forward.context) if forward else (None, None)
        report = forward.report if forward else None
        if link is None or forward is None or grid is None or context is None or report is None:
            raise RuntimeError(
                "accelerated attention ran outside a call of its transformer, where vidsparse "
                "learns grid and step: call transformer(...), not transformer.forward(...) or a "
                "program exported from it; if another tool has cleared the hooks of the "
                "transformer, call accelerate_pipeline again; or restore_pipeline first"
            )
        if private.parallel_config(self) is not None:
            raise RuntimeError(
                "vidsparse does not support context parallelism: restore_pipeline first"
            )
        about = None
        if k.shape[1] == q.shape[1]:
            about = link.adapter.around(link.transformer(), grid, q.shape[1], link.layer)
        if about is None:
            other: Tensor = dense(q, k, v)
            return other
        grid = about
        context = replace(context, layer=link.layer)
        call = _Call(link, report, grid, context, dense)
        module, real = link.module(), forward.real_text
        if module is not None and private.skips_scores(module):
            return call.stock(q, k, v, "layer-skip")
        if mask is None:
            return call.whole(q, k, v)
        words = grid.text_tokens
        if real is None or len(real) != q.shape[0] or not all(rows.fit(words) for rows in real):
            return call.stock(q, k, v, "masked")
        if all(rows.count == words for rows in real):
            return call.whole(q, k, v)
        return call.without_padding(q, k, v, real)


@dataclass(frozen=True)
class _Call:
    """One self-attention call. dense: (q, k, v) -> out, the stock call with its mask."""

    link: Link
    report: RunReport
    grid: TokenGrid
    context: StepContext
    dense: Callable[[Tensor, Tensor, Tensor], Tensor]

    def stock(self, q: Tensor, k: Tensor, v: Tensor, reason: str) -> Tensor:
        """Dense, as the stock code does it."""
        density = full_density(q.shape[2])
        result = AttentionResult(self.dense(q, k, v), None, None, density, reason)
        return self._noted(self.grid, q, k, v, result)

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All rows are real."""
        return self._noted(self.grid, q, k, v, self._attend(self.grid, q, k, v, self.dense))

    def without_padding(
        self, q: Tensor, k: Tensor, v: Tensor, real: tuple[RealRows, ...]
    ) -> Tensor:
        """Only some text rows of each sample are real: padding is cut out, and its rows are 0.

        Samples of one length are one call. A dense call keeps its mask and all rows.
        """
        config, grid = self.link.config, self.grid
        decision = decision_for(
            q, grid=grid, config=config, context=self.context, hoisted=self.link.adapter.hoisted
        )
        if decision.reason is not None:
            return self.whole(q, k, v)
        out = torch.zeros_like(q)
        alike = len({rows.count for rows in real}) == 1 and all(r.index is None for r in real)
        for sample, rows in enumerate(real[:1] if alike else real):
            of = slice(None) if alike else slice(sample, sample + 1)
            short = replace(grid, text_tokens=rows.count)
            parts = (_cut(x[of], grid, rows) for x in (q, k, v))
            _uncut(out[of], grid, rows, self.whole_of(short, *parts))
        return out

    def whole_of(self, grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All rows of these are real."""
        return self._noted(grid, q, k, v, self._attend(grid, q, k, v, None))

    def _attend(
        self, grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor, dense: Any
    ) -> AttentionResult:
        return attend(
            q,
            k,
            v,
            grid=grid,
            config=self.link.config,
            context=self.context,
            hoisted=self.link.adapter.hoisted,
            watch=True,
            dense_path=dense,
        )

    def _noted(
        self, grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor, result: AttentionResult
    ) -> Tensor:
        """The output of a call that the report and the observers have been told of."""
        self.report.add(self.context, result)
        for observer in tuple(self.link.observers):
            observer(ObservedCall(self.context, grid, q, k, v, result))
        return result.out


def _parts(x: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
    """Text and the rest of x [B, tokens, H, D]; views."""
    if grid.text_first:
        return x[:, : grid.text_tokens], x[:, grid.text_tokens :]
    return x[:, grid.other_tokens :], x[:, : grid.other_tokens]


def _cut(x: Tensor, grid: TokenGrid, rows: RealRows) -> Tensor:
    """x [B, tokens, H, D] without the padding of its text."""
    if rows.index is None and not grid.text_first:
        return x[:, : grid.other_tokens + rows.count]
    text, rest = _parts(x, grid)
    text = text[:, : rows.count] if rows.index is None else text.index_select(1, rows.index)
    return torch.cat([text, rest] if grid.text_first else [rest, text], 1)


def _uncut(out: Tensor, grid: TokenGrid, rows: RealRows, short: Tensor) -> None:
    """Write what `_cut` has left to its place in `out`."""
    text, rest = _parts(out, grid)
    real, others = _parts(short, replace(grid, text_tokens=rows.count))
    rest.copy_(others)
    if rows.index is None:
        text[:, : rows.count] = real
    else:
        text.index_copy_(1, rows.index, real)


_numbers = itertools.count()
_sites: weakref.WeakValueDictionary[int, SparseProcessor] = weakref.WeakValueDictionary()
_running = threading.local()
"""`processor`, whose stock code this thread runs, or while it is compiled its `site`."""


def primitive(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """Stands in for the attention primitive of the stock code; options: its other arguments.

    Raises ValueError for one that changes what attention means.
    """
    for name, usual in USUAL.items():
        if options.get(name, usual) not in (usual, None, query.shape[-1] ** -0.5):
            raise ValueError(
                f"attention with {name}={options[name]!r}: vidsparse computes "
                "softmax(q k^T / sqrt(D)) v; restore_pipeline first"
            )
    if torch.compiler.is_compiling():  # inside the operator, autocast is off
        query, key, value = as_autocast(query, key, value)
        out: Tensor = attention_op(query, key, value, attn_mask, _running.site)
        return out
    processor: SparseProcessor = _running.processor
    if processor.link is not None:
        processor.link.forward.require_entries()
    dense = partial(processor.dense, attn_mask=attn_mask, **options)
    return processor.attend(query, key, value, attn_mask, dense)


USUAL = {"scale": None, "is_causal": False, "dropout_p": 0.0, "enable_gqa": False}
"""Arguments that a sparse call has no meaning for, and the values that they may have."""


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """`primitive` where the stock code has heads before tokens, [B, H, tokens, D]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return primitive(q, k, v, attn_mask, **options).transpose(1, 2)


def _sdpa_dense(q: Tensor, k: Tensor, v: Tensor, backend: Any = None, **options: Any) -> Tensor:
    """The primitive of such code, called with tokens before heads; it knows no backends."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def _functional() -> ModuleType:
    """`torch.nn.functional` with our attention."""
    module = ModuleType("functional")
    module.__dict__.update({k: v for k, v in vars(functional).items() if not k.startswith("__")})
    module.scaled_dot_product_attention = sdpa  # type: ignore[attr-defined]
    return module


MEANINGS: dict[str, Any] = {"dispatch_attention_fn": primitive, "F": _functional()}
"""Global names by which stock code reaches its attention primitive -> what they mean for us."""

PRIMITIVES = {
    "dispatch_attention_fn": {"dispatch_attention_fn"},
    "F": {"F", "scaled_dot_product_attention"},
}
"""Those names -> names that show that the code calls it."""


@torch.library.custom_op("vidsparse::attention", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, site: Tensor) -> Tensor:
    """`SparseProcessor.attend` as one node of a compiled graph; out [B, tokens, H, D]."""
    processor = _sites.get(int(site))
    if processor is None:
        raise RuntimeError(
            "this compiled or exported program belongs to an acceleration that was undone since: "
            "compile or export again"
        )
    dense = partial(processor.dense, attn_mask=mask, backend=private.backend(processor))
    out = processor.attend(q, k, v, mask, dense).contiguous()
    return out.clone() if out.data_ptr() == v.data_ptr() else out  # a skipped layer gives v


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, site: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def rebound(function: Callable[..., Any], name: str, meaning: Callable[..., Any]) -> FunctionType:
    """The same code, in which a global name means something else.

    Raises TypeError if the code does not use the name: diffusers has moved its attention call.
    """
    code = function.__code__
    if name not in _names(code):
        known = name or " or ".join(MEANINGS)
        raise TypeError(f"{function.__qualname__} does not call {known}: vidsparse cannot enter it")
    scope = {**function.__globals__, name: meaning}
    scope.pop("__name__")  # by it torch.compile would look names up in the stock module
    new = FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
    new.__kwdefaults__ = function.__kwdefaults__
    return new


def _names(code: CodeType) -> set[str]:
    """Global names that the code and the functions inside it use."""
    inner = [_names(const) for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*inner)
