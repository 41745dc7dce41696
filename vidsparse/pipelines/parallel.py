"""One video on several processes: our attention inside the all-to-all of diffusers' Ulysses.

`transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=n))` leaves each process
a share of the tokens. In self-attention the processes exchange: each gets all tokens of a share of
the heads. No head looks at another, so each process plans and computes its heads as one process
would, whatever the method, and the result is the same.

Tokens come into their order before diffusers splits them and leave it after they are gathered
(`hoist.py`), so each process holds a run of the layout order. Head h of a process is head
rank * H / n + h of the model in every call: what a run keeps for its heads stays theirs.

Models that attend over text and video together split each by itself, so the exchange gives [text 0,
video 0, text 1, video 1, ...]. A call sorts them, [text, video], and its output back; a mask of all
keys stands in that order already, one of the own tokens is gathered and sorted with them.

Ring attention is refused, alone and with Ulysses. There a process sees its own queries and one
chunk of the keys at a time: every chunk would have to get a share of the budget before anybody has
seen the scores of the others, and rows whose mass lies in one chunk would lose what they need. That
is another method than the one whose quality was measured, at the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from vidsparse.grid import TokenGrid
from vidsparse.pipelines import private
from vidsparse.pipelines.adapter import Adapter, Arguments, Split
from vidsparse.pipelines.recognition import adapter_for
from vidsparse.pipelines.report import RunReport
from vidsparse.pipelines.share import Share, imbalance_of

Inside = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q, k, v, mask) -> out, each [B, tokens, H, D]."""


class Unshared(ValueError):
    """A forward that the processes cannot share; why and the cure, in one line."""


@dataclass(frozen=True)
class Ulysses:
    """How the running transformer is split. degree: processes. rank: of this one among them.

    config: diffusers' own of it.
    """

    degree: int
    rank: int
    config: Any
    split: Split

    def check(self, adapter: Adapter, model: nn.Module, grid: TokenGrid, given: Arguments) -> None:
        """Raise Unshared if a forward with these arguments cannot be split, before it begins."""
        name = type(model).__name__
        lacks = self.split.lacks(model, given)
        if lacks:
            raise Unshared(
                f"{lacks}, which diffusers does not split for a {name}: it cannot run with "
                f"ulysses_degree={self.degree}; run it in one process"
            )
        if grid.cuts and not self.split.cuts:
            raise Unshared(
                f"ulysses_degree={self.degree}: a {name} treats the first {grid.cuts[0]} frames of "
                "this video apart by their place, which it loses when the tokens are split; run it "
                "in one process"
            )
        heads = {int(module.heads) for module in adapter.self_attention(model)}
        words = 0 if adapter.text == "none" else given["encoder_hidden_states"].shape[1]
        sizes = [(heads_, "attention heads") for heads_ in sorted(heads)]
        if self.split.together:
            sizes.append((words + grid.other_tokens, "tokens"))
        else:
            sizes += [(grid.other_tokens, "video tokens"), (words, "text tokens")]
        for size, what in sizes:
            if size % self.degree:
                able = [n for n in range(2, self.degree) if all(s % n == 0 for s, _ in sizes)]
                cure = f"ulysses_degree={max(able)} does" if able else "run it in one process"
                raise Unshared(
                    f"{size} {what} of a {name} do not divide into ulysses_degree={self.degree}: "
                    f"{cure}, or change the size of the video"
                )

    def share_in(self, report: RunReport) -> None:
        """Note in the report of a run that this is one process of several."""
        if report.share is None:
            report.share = Share(self.rank, self.degree)
            report.settle = partial(self._settle, report)

    def _settle(self, report: RunReport) -> None:
        """A run has ended, in all processes: tell the report how evenly their heads fell."""
        if report.share is None or report.share.imbalance is not None:
            return
        each = [1.0 if call.reason else call.mean_density for call in report.calls]
        density = torch.tensor(each, dtype=torch.float64, device="cpu")
        of_all = private.gathered(density, self.config)
        report.share = replace(report.share, imbalance=imbalance_of(of_all))

    def exchange(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grid: TokenGrid, inside: Inside
    ) -> Tensor:
        """Attention of this process's tokens [B, tokens / degree, H, D], as one process would give
        it. grid: of all tokens. inside: is given all tokens of a share of the heads."""
        local = mask is not None and mask.shape[-1] == q.shape[1]
        if local and mask is not None and mask.ndim > 2 and mask.shape[-2] != 1:
            raise ValueError(
                f"attention mask of shape {tuple(mask.shape)} with ulysses_degree={self.degree}: "
                "diffusers gathers masks of keys alone; run it in one process"
            )
        text = 0 if self.split.together else grid.text_tokens
        order, back = shares(grid.tokens, text, grid.text_first, self.degree, q.device)

        def attend(
            _: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *__: Any, **___: Any
        ) -> Tensor:
            if order is None or back is None:
                return inside(q, k, v, mask)
            q, k, v = (x.index_select(1, order) for x in (q, k, v))
            if local and mask is not None:
                mask = mask.index_select(-1, order)
            return inside(q, k, v, mask).index_select(1, back)

        return private.ulysses_attention(q, k, v, mask, attend, self.config)


def ulysses_of(adapter: Adapter, model: nn.Module) -> Ulysses | None:
    """How `enable_parallelism` has split a transformer; None if it has not.

    Raises ValueError for what is not supported.
    """
    whole = private.context_parallel(model)
    if whole is None:
        return None
    config, kind, split = whole.context_parallel_config, type(model).__name__, adapter.split
    if config.ring_degree > 1:
        raise ValueError(
            f"a {kind} with ring_degree={config.ring_degree}: ring attention shows each process "
            "one chunk of the keys at a time, so blocks could not be chosen among all; use "
            "ContextParallelConfig(ulysses_degree=...)"
        )
    if config.ulysses_anything:
        raise ValueError(
            f"a {kind} with ulysses_anything=True, which vidsparse does not support: shares of "
            "unlike sizes cannot be tested without several GPUs; leave it out"
        )
    if not isinstance(split, Split):
        raise ValueError(_unsplit(model, split))
    plan = split.plan or private.own_plan(model) or {}
    if private.split_plan(model) != private.normalised_plan(plan):
        raise ValueError(
            f"this {kind} is split by another cp_plan than the one that vidsparse knows: call "
            "enable_parallelism without cp_plan"
            + (", after accelerate_pipeline" if split.plan else "")
        )
    return Ulysses(config.ulysses_degree, private.rank_of(whole), whole, split)


def split_pipeline(pipe: Any, degree: int, *, stock: bool = False) -> None:
    """Have all processes of the default group share the transformers of an accelerated pipeline.

    Those that are split stay so. stock: they will also run with stock attention. Raises ValueError.
    """
    adapter = adapter_for(pipe)
    for model in adapter.transformers(pipe).values():
        if not isinstance(adapter.split, Split):
            raise ValueError(_unsplit(model, adapter.split))
        if stock and adapter.split.plan is not None:
            raise ValueError(
                f"the stock attention of a {type(model).__name__} cannot be split between "
                "processes: leave out --compare-dense, or run it in one process"
            )
        if private.context_parallel(model) is None:
            private.enable_ulysses(model, degree)
        ulysses_of(adapter, model)


def _unsplit(model: nn.Module, why: str) -> str:
    return f"a {type(model).__name__} cannot be split between processes: {why}"


@lru_cache(maxsize=16)
def shares(
    tokens: int, text: int, text_first: bool, degree: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """From the shares of all processes, one behind the other, each with its part of the text, to
    the sequence with its text together, and back: int64 [tokens] each; None if they are the same.
    """
    if not text or degree == 1:
        return None, None
    with torch.inference_mode(False):  # the cached tensors must serve every grad mode
        pieces = torch.arange(tokens).view(degree, -1)
        first = text // degree if text_first else (tokens - text) // degree
        order = torch.cat([pieces[:, :first].flatten(), pieces[:, first:].flatten()])
        return order.to(device), order.argsort().to(device)
