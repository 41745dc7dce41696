"""Inside blocks: the tokens of every block side by side, for estimators that look at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.draft import Draft, strips


@lru_cache(maxsize=16)
def slots(blocks: Blocks, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64, bool [n, size]: the token at each place of a block, and whether there is one.

    A place that a short block does not have names its first token.
    """
    with torch.inference_mode(False):  # the cached tensors must serve every grad mode
        place = torch.arange(blocks.size)
        real = place < blocks.count[:, None]
        token = blocks.start[:, None] + torch.where(real, place, 0)
        return token.to(device), real.to(device)


def head(x: Tensor, order: Tensor | None, b: int, h: int, places: Tensor) -> Tensor:
    """[*places.shape, D] of one head of x [B, H, S, D], float32 (float64 stays float64).

    places: int64, positions in an order of x as `Draft` has them.
    """
    at = places.flatten()
    if order is not None:
        own = order if order.ndim == 1 else order.select(0, b).select(0, h)
        at = own.index_select(0, at)
    found: Tensor = x.select(0, b).select(0, h).index_select(0, at).unflatten(0, places.shape)
    return found if x.dtype == torch.float64 else found.float()


def keys(draft: Draft, b: int, h: int) -> Tensor:
    """[nk, size, D], 0 at places that a block does not have."""
    return _tokens(draft.k, draft.order_k, draft.k_blocks, b, h)


def values(draft: Draft, b: int, h: int) -> Tensor:
    """As `keys`."""
    return _tokens(draft.v, draft.order_k, draft.k_blocks, b, h)


def queries(draft: Draft, b: int, h: int) -> Tensor:
    """[nq, size, D], 0 at places that a block does not have."""
    return _tokens(draft.q, draft.order_q, draft.q_blocks, b, h)


def by_head(draft: Draft, one: Callable[[int, int], Tensor]) -> Tensor:
    """[B, H, ...], a head after the other: what is held of the tokens is of one head."""
    batch, heads = draft.q.shape[:2]
    every = torch.stack([one(b, h) for b in range(batch) for h in range(heads)])
    found: Tensor = every.unflatten(0, (batch, heads))
    return found


def parts(x: Tensor, numbers: int) -> Iterator[tuple[int, int]]:
    """(first, how many) rows of x, as many at a time as may have so many numbers each."""
    return ((one.start, one.stop - one.start) for one in strips(len(x), numbers))


def _tokens(x: Tensor, order: Tensor | None, blocks: Blocks, b: int, h: int) -> Tensor:
    token, real = slots(blocks, x.device)
    found = head(x, order, b, h, token)
    return found.masked_fill(real.logical_not().unsqueeze(-1), 0.0)


def pieces(draft: Draft, wanted: int) -> tuple[Tensor, Tensor]:
    """[B, H, nk, m, D], bool [nk, m]: means of keys over equal pieces of each block, m of them at
    most `wanted`, and whether a short block has the piece; 0 where it has not."""
    blocks = draft.k_blocks
    many = min(wanted, blocks.size)
    _, real = slots(blocks, draft.q.device)
    count = real.unflatten(1, (many, -1)).sum(-1)

    def means(b: int, h: int) -> Tensor:
        each: Tensor = keys(draft, b, h).unflatten(1, (many, -1))
        sums = each.sum(2)
        found: Tensor = sums / count.clamp(min=1).to(sums).unsqueeze(-1)
        return found

    return by_head(draft, means), count > 0


def split_logits(draft: Draft) -> Tensor:
    """float32 [B, H, nq, nk]: logarithm of the mass that the mean query of a row gives each block,
    up to a constant of the row: of video blocks that of their means, of text that of its tokens.
    """
    found = draft.logits + draft.k_blocks.on(draft.q.device).count.to(draft.logits).log()
    place = _text(draft.k_blocks, draft.q.device)
    if place is None:
        return found
    ids, token, real = place
    scaled = draft.q_means * draft.scale

    def text(b: int, h: int) -> Tensor:
        near = head(draft.k, draft.order_k, b, h, token).to(scaled)
        logits = scaled.select(0, b).select(0, h) @ near.flatten(0, 1).mT
        inner: Tensor = logits.unflatten(1, real.shape)
        return inner.masked_fill(real.logical_not(), float("-inf")).logsumexp(-1)

    return found.index_copy(-1, ids, by_head(draft, text).to(found))


@lru_cache(maxsize=16)
def _text(blocks: Blocks, device: torch.device) -> tuple[Tensor, Tensor, Tensor] | None:
    """The blocks of text, and their `slots`."""
    with torch.inference_mode(False):  # the cached tensors must serve every grad mode
        if not bool(blocks.text.any()):
            return None
        ids = blocks.text.nonzero().flatten()
        token, real = (x.index_select(0, ids) for x in slots(blocks, torch.device("cpu")))
        return ids.to(device), token.to(device), real.to(device)
