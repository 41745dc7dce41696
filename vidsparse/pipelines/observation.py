"""What an observer of an accelerated pipeline is shown: every self-attention call, once it is done.

`vidsparse.accelerate.observing` puts one to work and takes it away again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vidsparse.grid import TokenGrid
from vidsparse.plan import StepContext
from vidsparse.result import AttentionResult


@dataclass(frozen=True)
class ObservedCall:
    """To be read, never written: these are the tensors of the running model.

    q, k, v: [B, tokens, H, D], after norm and RoPE, in layout order, as result.out is. grid: of
    the tokens.
    """

    context: StepContext
    grid: TokenGrid
    q: Tensor
    k: Tensor
    v: Tensor
    result: AttentionResult


Observer = Callable[[ObservedCall], None]
