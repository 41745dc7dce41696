"""SparseProcessor: a model's stock attention processor with vidsparse as attention primitive.

Everything around the attention itself stays the model's own code: we run the stock `__call__`, in
which one global name, that of the attention primitive, means our function. So projections (LoRA,
quantised, fused), norms, rotary embedding, type casts and output projection are stock by
construction and follow diffusers as it changes; a dense call is bit for bit the stock one. A
`__call__` of our own would have to repeat the rotary embedding, which the stock code keeps in a
nested function, and would rot. Nothing global is patched: the name is bound in a copy of the
function's globals.

torch.compile sees one operator, `vidsparse::attention`, and traces everything around it into one
graph. What the operator needs beside tensors it finds by `number`, a 0-d tensor, so a graph serves
every layer and every step.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from vidsparse.operands import as_autocast
from vidsparse.pipelines import private
from vidsparse.pipelines.call import Call, Link


class SparseProcessor:
    """First base of a family's processor; the second is the stock class, and that is all of it.

    Made without arguments, or unpickled, it has no link and is a stock processor.
    stock_class: the second base. stock: its `__call__` with our attention primitive. dense: the
    primitive that it had.
    """

    link: Link | None = None
    number: Tensor | None = None
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
        count = next(_numbers)
        new.number = torch.tensor(count)
        _processors[count] = new
        return new

    def settings(self) -> dict[str, Any]:
        """What others have set on this processor, for example the attention backend."""
        return {k: v for k, v in self.__dict__.items() if k not in ("link", "number")}

    def __getstate__(self) -> dict[str, Any]:
        return self.settings()

    def run(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The stock `__call__` with our attention primitive."""
        if torch.compiler.is_compiling():
            _running.number = self.number
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
        about, ulysses = None, forward.ulysses
        if k.shape[1] == q.shape[1]:
            tokens = q.shape[1] * (1 if ulysses is None else ulysses.degree)
            about = link.adapter.around(link.transformer(), grid, tokens, link.layer)
        if about is None:
            other: Tensor = dense(q, k, v)
            return other
        context = replace(context, layer=link.layer)
        if ulysses is None:
            call = Call(link, report, about, context, dense)
            return call.run(q, k, v, mask, forward.real_text)

        ulysses.share_in(report)

        def inside(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            call = Call(link, report, about, context, whole(dense, mask))
            return call.run(q, k, v, mask, forward.real_text)

        return ulysses.exchange(q, k, v, mask, about, inside)


_numbers = itertools.count()
_processors: weakref.WeakValueDictionary[int, SparseProcessor] = weakref.WeakValueDictionary()
_running = threading.local()
"""`processor`, whose stock code this thread runs, or while it is compiled its `number`."""


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
        out: Tensor = attention_op(query, key, value, attn_mask, _running.number)
        return out
    processor: SparseProcessor = _running.processor
    if processor.link is not None:
        processor.link.forward.require_entries()
    dense = partial(processor.dense, attn_mask=attn_mask, **options)
    return processor.attend(query, key, value, attn_mask, dense)


def whole(dense: partial[Tensor], mask: Tensor | None) -> partial[Tensor]:
    """A stock call for all tokens of some heads: with their mask, and without another exchange."""
    options = {n: x for n, x in dense.keywords.items() if n != "parallel_config"}
    return partial(dense.func, **{**options, "attn_mask": mask})


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
def attention_op(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, number: Tensor) -> Tensor:
    """`SparseProcessor.attend` as one node of a compiled graph; out [B, tokens, H, D]."""
    processor = _processors.get(int(number))
    if processor is None:
        raise RuntimeError(
            "this compiled or exported program belongs to an acceleration that was undone since: "
            "compile or export again"
        )
    dense = partial(processor.dense, attn_mask=mask, backend=private.backend(processor))
    out = processor.attend(q, k, v, mask, dense).contiguous()
    return out.clone() if out.data_ptr() == v.data_ptr() else out  # a skipped layer gives v


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, number: Tensor) -> Tensor:
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
