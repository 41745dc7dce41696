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

import inspect
import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import CodeType, FunctionType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vidsparse.attention import AttentionResult, attend, full_density
from vidsparse.config import SparseConfig
from vidsparse.operands import as_autocast
from vidsparse.pipelines.forward import Forward
from vidsparse.pipelines.hooks import skips_scores
from vidsparse.pipelines.observation import ObservedCall, Observer

PRIMITIVE = "dispatch_attention_fn"


@dataclass(frozen=True)
class Link:
    """What ties a processor to an accelerated pipeline.

    forward: of its transformer. layer: index of its module, 0-based. module: weak reference to the
    attention module. observers: are shown every call, see `observation.py`.
    """

    forward: Forward
    layer: int
    config: SparseConfig
    module: weakref.ref[nn.Module]
    observers: Sequence[Observer] = ()


class SparseProcessor:
    """First base of a family's processor; the second is the stock class.

    A subclass defines `__call__` with the parameters of the stock one and hands them to `run`. Made
    without arguments, or unpickled, it has no link and is a stock processor.
    """

    link: Link | None = None
    site: Tensor | None = None
    dense: ClassVar[Callable[..., Tensor]]
    stock: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        function = inspect.unwrap(cls.__mro__[2].__call__)
        cls.dense = staticmethod(function.__globals__.get(PRIMITIVE))
        cls.stock = rebound(function, PRIMITIVE, primitive)

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

    def run(self, attn: nn.Module, *args: Any) -> Any:
        """The stock `__call__(attn, *args)`, a self-attention call, with our attention primitive.

        args: as for the stock processor; the first is hidden_states [B, tokens, C].
        """
        if torch.compiler.is_compiling():
            _running.site = self.site
            return self.stock(attn, *args)
        _running.processor = self
        try:
            return self.stock(attn, *args)
        finally:
            _running.processor = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dense: Any) -> Tensor:
        """q, k, v [B, tokens, H, D], after norm and RoPE -> [B, tokens, H, D]."""
        link = self.link
        forward = link.forward if link else None
        grid, context = (forward.grid, forward.context) if forward else (None, None)
        report = forward.report if forward else None
        if link is None or grid is None or context is None or report is None:
            raise RuntimeError(
                "accelerated attention ran outside a call of its transformer, where vidsparse "
                "learns grid and step: call transformer(...), not transformer.forward(...) or a "
                "program exported from it; if another tool has cleared the hooks of the "
                "transformer, call accelerate_pipeline again; or restore_pipeline first"
            )
        if getattr(self, "_parallel_config", None) is not None:
            raise RuntimeError(
                "vidsparse does not support context parallelism: restore_pipeline first"
            )
        grid.check(q.shape[1])
        context = replace(context, layer=link.layer)
        module = link.module()
        reason = "masked" if mask is not None else None
        reason = "layer-skip" if module is not None and skips_scores(module) else reason
        if reason:
            result = AttentionResult(dense(q, k, v), None, None, full_density(q.shape[2]), reason)
        else:
            result = attend(
                q,
                k,
                v,
                grid=grid,
                config=link.config,
                context=context,
                hoisted=True,
                watch=True,
                dense_path=dense,
            )
        report.add(context, result)
        for observer in tuple(link.observers):
            observer(ObservedCall(context, grid, q, k, v, result))
        return result.out


_numbers = itertools.count()
_sites: weakref.WeakValueDictionary[int, SparseProcessor] = weakref.WeakValueDictionary()
_running = threading.local()
"""`processor`, whose stock code this thread runs, or while it is compiled its `site`."""


def primitive(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """Stands in for the attention primitive of the stock code; options: its other arguments."""
    if torch.compiler.is_compiling():  # inside the operator, autocast is off
        query, key, value = as_autocast(query, key, value)
        out: Tensor = attention_op(query, key, value, attn_mask, _running.site)
        return out
    processor: SparseProcessor = _running.processor
    if processor.link is not None:
        processor.link.forward.require_entries()
    dense = partial(processor.dense, attn_mask=attn_mask, **options)
    return processor.attend(query, key, value, attn_mask, dense)


@torch.library.custom_op("vidsparse::attention", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, site: Tensor) -> Tensor:
    """`SparseProcessor.attend` as one node of a compiled graph; out [B, tokens, H, D]."""
    processor = _sites.get(int(site))
    if processor is None:
        raise RuntimeError(
            "this compiled or exported program belongs to an acceleration that was undone since: "
            "compile or export again"
        )
    backend = getattr(processor, "_attention_backend", None)
    dense = partial(processor.dense, attn_mask=mask, backend=backend)
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
        raise TypeError(f"{function.__qualname__} does not call {name}: vidsparse cannot enter it")
    scope = {**function.__globals__, name: meaning}
    scope.pop("__name__")  # by it torch.compile would look names up in the stock module
    new = FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
    new.__kwdefaults__ = function.__kwdefaults__
    return new


def _names(code: CodeType) -> set[str]:
    """Global names that the code and the functions inside it use."""
    inner = [_names(const) for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*inner)
