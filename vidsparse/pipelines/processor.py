"""SparseProcessor: a model's stock attention processor with vidsparse as attention primitive.

Everything around the attention itself stays the model's own code: we run the stock `__call__`, in
which one global name, that of the attention primitive, means our function for the duration of the
call. So projections (LoRA, quantised, fused), norms, rotary embedding, type casts and output
projection are stock by construction and follow diffusers as it changes; a dense call is bit for
bit the stock one. A `__call__` of our own would have to repeat the rotary embedding, which the
stock code keeps in a nested function, and would rot. Nothing global is patched: the name is bound
in a copy of the function's globals, which takes microseconds.

torch.compile does not look inside: blocks around are compiled, attention is a graph break.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import CodeType, FunctionType
from typing import Any, Self

from torch import Tensor, nn

from vidsparse.attention import AttentionResult, attend
from vidsparse.config import SparseConfig
from vidsparse.pipelines import Forward
from vidsparse.pipelines.hooks import skips_scores
from vidsparse.plan import StepContext

PRIMITIVE = "dispatch_attention_fn"


@dataclass(frozen=True)
class Link:
    """What ties a processor to an accelerated pipeline.

    forward: of its transformer. layer: index of its module, 0-based. record: takes the context and
    the result of each call.
    """

    forward: Forward
    layer: int
    config: SparseConfig
    record: Callable[[StepContext, AttentionResult], None]


class SparseProcessor:
    """First base of a family's processor; the second is the stock class.

    A subclass defines `__call__` with the parameters of the stock one and hands them to `run`. Made
    without arguments, or unpickled, it has no link and is a stock processor.
    """

    link: Link | None = None

    @classmethod
    def replacing(cls, stock: Any, link: Link) -> Self:
        """A processor with the settings of `stock`."""
        new = cls()
        new.__dict__.update(stock.__dict__)
        new.link = link
        return new

    def settings(self) -> dict[str, Any]:
        """What others have set on this processor, for example the attention backend."""
        return {name: value for name, value in self.__dict__.items() if name != "link"}

    def __getstate__(self) -> dict[str, Any]:
        return self.settings()

    def run(self, stock: Callable[..., Any], attn: nn.Module, *args: Any) -> Any:
        """`stock(self, attn, *args)`, a self-attention call, with our attention primitive.

        args: as for the stock processor; the first is hidden_states [B, tokens, C].
        """
        if self.link is None:
            return stock(self, attn, *args)
        link, grid, context = self.link, self.link.forward.grid, self.link.forward.context
        if grid is None or context is None:
            raise RuntimeError(
                "accelerated attention ran outside a call of its transformer, where vidsparse "
                "learns grid and step: call transformer(...), not transformer.forward(...), or "
                "restore_pipeline first"
            )
        if getattr(self, "_parallel_config", None) is not None:
            raise RuntimeError(
                "vidsparse does not support context parallelism: restore_pipeline first"
            )
        grid.check(args[0].shape[1])
        context = replace(context, layer=link.layer)
        function = inspect.unwrap(stock)
        stock_primitive = function.__globals__.get(PRIMITIVE)

        def primitive(
            query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any
        ) -> Tensor:
            """query, key, value [B, tokens, H, D], after norm and RoPE."""
            dense = partial(stock_primitive, attn_mask=attn_mask, **options)
            reason = "masked" if attn_mask is not None else None
            reason = "layer-skip" if skips_scores(attn) else reason
            if reason:
                heads = query.shape[2]
                out = dense(query, key, value)
                result = AttentionResult(out, None, None, (1.0,) * heads, reason)
            else:
                result = attend(
                    query,
                    key,
                    value,
                    grid=grid,
                    config=link.config,
                    context=context,
                    hoisted=True,
                    dense_path=dense,
                )
            link.record(context, result)
            return result.out

        return rebound(function, PRIMITIVE, primitive)(self, attn, *args)


def rebound(function: Callable[..., Any], name: str, meaning: Callable[..., Any]) -> FunctionType:
    """The same code, in which a global name means something else.

    Raises TypeError if the code does not use the name: diffusers has moved its attention call.
    """
    code = function.__code__
    if name not in _names(code):
        raise TypeError(f"{function.__qualname__} does not call {name}: vidsparse cannot enter it")
    scope = {**function.__globals__, name: meaning}
    new = FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
    new.__kwdefaults__ = function.__kwdefaults__
    return new


def _names(code: CodeType) -> set[str]:
    """Global names that the code and the functions inside it use."""
    inner = [_names(const) for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*inner)
