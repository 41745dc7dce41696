"""How a tensor is brought into an order: rows that carry their own number, moved by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Site
from vidsparse.pipelines.order import Order

GRID = TokenGrid(2, 2, 3, before=2, after=1)
PLACES = [7, 0, 11, 3, 2, 10, 5, 1, 9, 4, 8, 6]  # of the 12 video tokens
IN_SEQUENCE = Site("argument", "x", 1)
ON_GRID = Site("output", "x", (2, 3, 4))


def order(grid: TokenGrid = GRID, places: list[int] | None = None) -> Order:
    forward = torch.tensor(PLACES if places is None else places)
    return Order(grid, forward, forward.argsort())


def rows(count: int, axis: int, ndim: int) -> Tensor:
    """A tensor whose every row along an axis carries its number."""
    shape = [2, 3, 4][:ndim]
    shape[axis] = count
    view = [1] * ndim
    view[axis] = count
    return torch.arange(count).view(view).expand(shape).contiguous()


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize(
    ("text_first", "others", "words"),
    [(False, False, 0), (False, True, 0), (False, True, 4), (True, True, 0), (True, True, 1)],
)
def test_only_the_video_moves(text_first: bool, others: bool, words: int, axis: int) -> None:
    """Sequences: text, before, video, after; or before, video, after, text; or video alone."""
    grid = replace(GRID, text_first=text_first)
    first = (2 if others else 0) + (words if text_first else 0)
    count = (15 if others else 12) + words
    wanted = [*range(first), *(first + place for place in PLACES), *range(first + 12, count)]
    x, site = rows(count, axis, 3), Site("argument", "x", axis, joint=bool(words))
    moved = order(grid).move(site, x)
    assert torch.equal(moved, x.index_select(axis, torch.tensor(wanted)))
    assert torch.equal(order(grid).move(site, moved, back=True), x)
    assert Order(grid, None, None).move(site, x) is x


def test_the_three_axes_of_the_video() -> None:
    x = torch.arange(12).view(1, 1, 2, 2, 3).expand(2, 4, 2, 2, 3).contiguous()
    moved = order().move(ON_GRID, x)
    assert moved.shape == x.shape and moved.flatten(2)[1, 3].tolist() == PLACES
    assert torch.equal(order().move(ON_GRID, moved, back=True), x)
    last = x.movedim((0, 1), (-2, -1)).contiguous()  # frames, height, width come first
    for axes in ((0, 1, 2), (-5, -4, -3)):
        assert (
            order().move(Site("input", "x", axes), last).flatten(0, 2)[:, 0, 0].tolist() == PLACES
        )
    assert Order(GRID, None, None).move(ON_GRID, x) is x


def test_what_is_expanded_is_moved_once() -> None:
    """A mask of all pairs of tokens is the largest tensor of a forward."""
    alone = torch.arange(15 * 15).view(1, 15, 15)
    mask = alone.expand(3, -1, -1)
    moved = order().move(Site("argument", "x", 2), order().move(IN_SEQUENCE, mask))
    wanted = torch.tensor([0, 1, *(2 + place for place in PLACES), 14])
    assert torch.equal(moved, mask[:, wanted][:, :, wanted])
    assert moved.untyped_storage().nbytes() == alone.untyped_storage().nbytes()
    same = torch.arange(2).view(2, 1, 1).expand(2, 15, 4)
    assert order().move(IN_SEQUENCE, same) is same, "all rows are alike"


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize(
    ("site", "shape", "tokens"),
    [
        (IN_SEQUENCE, (2, 11), 11),
        (IN_SEQUENCE, (2, 13), 13),
        (IN_SEQUENCE, (2, 16), 16),
        (IN_SEQUENCE, (2, 1), 1),
        (replace(IN_SEQUENCE, joint=True), (2, 14), 14),
        (replace(IN_SEQUENCE, joint=True), (2, 11), 11),
        (replace(IN_SEQUENCE, optional=True), (2, 11), 11),
        (replace(IN_SEQUENCE, dims=2), (2, 11), 11),
        (ON_GRID, (1, 1, 2, 2, 4), 16),
        (ON_GRID, (1, 1, 2, 3, 2), 12),
        (ON_GRID, (1, 1, 1, 2, 3), 6),
    ],
)
def test_other_tokens_are_refused(
    site: Site, shape: tuple[int, ...], tokens: int, identity: bool
) -> None:
    """In raster order too: what does not fit is wrong whatever the order is."""
    which = Order(GRID, None, None) if identity else order()
    message = (
        rf"{site}: {tokens} tokens, but the latent video has 2 x 2 x 3 = 12 and 3 other rows; its"
    )
    with pytest.raises(ValueError, match=message):
        which.move(site, torch.zeros(shape))


def test_what_is_left_alone() -> None:
    optional, some = replace(IN_SEQUENCE, optional=True), replace(IN_SEQUENCE, dims=2)
    cases: list[tuple[Site, Any]] = [
        (IN_SEQUENCE, None),
        (IN_SEQUENCE, "text"),
        (optional, torch.zeros(12)),
        (replace(optional, axes=-3), torch.zeros(2, 12)),
        (optional, torch.zeros(2, 1)),
        (some, torch.zeros(2, 1)),
        (some, torch.zeros(2, 12, 4)),
        (some, torch.zeros(12)),
    ]
    for site, value in cases:
        assert order().move(site, value) is value
    with pytest.raises(IndexError):
        order().move(IN_SEQUENCE, torch.zeros(12))
    for site in (optional, some):
        assert order().move(site, rows(12, 1, 2))[0].tolist() == PLACES
    assert order().move(replace(optional, axes=-2), rows(12, 0, 2))[:, 0].tolist() == PLACES


def test_one_row_is_that_of_a_video_of_one_token() -> None:
    one = order(TokenGrid(1, 1, 1, before=1), [0])
    for site in (IN_SEQUENCE, replace(IN_SEQUENCE, optional=True)):
        assert one.move(site, rows(1, 1, 2)).tolist() == [[0], [0]]
        assert one.move(site, rows(2, 1, 2)).tolist() == [[0, 1], [0, 1]]


def test_inside_of_tuples_lists_and_dicts() -> None:
    x = rows(12, 1, 2)
    moved = order().move(IN_SEQUENCE, (x, [x, None], {"a": x}))
    assert isinstance(moved, tuple) and isinstance(moved[1], list) and moved[1][1] is None
    for found in (moved[0], moved[1][0], moved[2]["a"]):
        assert found[0].tolist() == PLACES
    back = order().move(IN_SEQUENCE, moved, back=True)
    assert all(torch.equal(found, x) for found in (back[0], back[1][0], back[2]["a"]))
    chosen = order().move(replace(IN_SEQUENCE, items=(0, 2)), [x, x, (x, x)])
    assert chosen[1] is x and chosen[0][0].tolist() == PLACES
    assert [each[0].tolist() for each in chosen[2]] == [PLACES, PLACES], (
        "items are of the outer one"
    )
