"""The running forward and the text rows of its samples, without a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Site
from vidsparse.pipelines.call import _cut, _uncut
from vidsparse.pipelines.forward import Forward, RealRows, real_rows
from vidsparse.pipelines.order import Order

GRID = TokenGrid(1, 2, 3, text_tokens=4, before=1)
EXIT = Site("input", "proj_out", 1)


def begun(*entries: str) -> Forward:
    forward = Forward()
    forward.begin(Order(GRID, None, None), entries)
    return forward


def test_every_entry_is_needed_before_the_exit() -> None:
    forward = begun("patch", "rope")
    with pytest.raises(RuntimeError, match=r"hook on patch, rope did not run .*do not match"):
        forward.require_entries()
    forward.arrive("patch")
    with pytest.raises(RuntimeError, match="hook on rope did not run"):
        forward.require_entries()
    forward.arrive("rope")
    forward.require_entries()
    assert forward.arrived == {"patch", "rope"}
    forward.leave()
    assert not forward.arrived
    with pytest.raises(RuntimeError, match="hook on patch, rope did not run"):
        forward.require_entries()


def test_outside_of_a_forward_nothing_is_needed() -> None:
    forward = Forward()
    forward.require_entries()
    forward.end(EXIT)
    forward = begun("patch")
    forward.clear()
    forward.require_entries()
    assert (forward.grid, forward.order, forward.context, forward.report) == (None,) * 4


def test_a_forward_that_has_entered_must_have_left() -> None:
    begun("patch").end(EXIT)  # no hook ran: an exported program
    forward = begun("patch")
    forward.arrive("patch")
    forward.leave()
    forward.end(EXIT)
    assert forward.grid is None and forward.order is None
    for again in (False, True):
        forward = begun("patch")
        forward.arrive("patch")
        if again:  # the second half of a batch, say
            forward.leave()
            forward.arrive("patch")
        with pytest.raises(RuntimeError, match=r"hook on proj_out did not run .*raster order"):
            forward.end(EXIT)
        assert forward.order is None, "no forward is running, also then"
    forward = begun("patch")
    forward.arrive("patch")
    forward.end(None)


def test_a_new_forward_knows_nothing_of_one_that_broke_off() -> None:
    forward = begun("patch")
    forward.arrive("patch")
    forward.real_text = (RealRows(3),)
    forward.begin(Order(GRID, None, None), ("rope",))
    assert forward.real_text is None and (forward.missing, forward.arrived) == ({"rope"}, set())
    forward.end(EXIT)


def plain(found: tuple[RealRows, ...]) -> list[tuple[int, list[int] | None, int | None]]:
    return [(r.count, None if r.index is None else r.index.tolist(), r.of) for r in found]


def test_real_rows_of_masks_and_of_counts() -> None:
    masks = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    found = plain(real_rows(masks))
    assert found == [(2, None, 4), (2, [1, 3], 4), (4, None, 4), (0, None, 4)]
    assert plain(real_rows(torch.tensor([3, 0]))) == [(3, None, None), (0, None, None)]


@pytest.mark.parametrize(
    ("rows", "fits"),
    [
        (RealRows(4), True),
        (RealRows(5), False),
        (RealRows(2, None, 4), True),
        (RealRows(2, None, 5), False),
        (RealRows(0), True),
    ],
)
def test_rows_that_can_be_those_of_a_text(rows: RealRows, fits: bool) -> None:
    assert rows.fit(4) == fits


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("real", [[0, 1], [1, 3], [0, 1, 2, 3], [], [0]], ids=str)
def test_padding_is_cut_out_and_its_rows_are_not_written(real: list[int], text_first: bool) -> None:
    """Rows that carry their number: 4 of text and 7 others, in either order."""
    grid = TokenGrid(1, 2, 3, text_tokens=4, before=1, text_first=text_first)
    text, others = range(4), range(4, 11)
    if not text_first:
        text, others = range(7, 11), range(7)
    kept = [text[n] for n in real]
    wanted = [*kept, *others] if text_first else [*others, *kept]
    x = torch.arange(1.0, 12).view(1, 11, 1, 1).expand(2, 11, 2, 3)
    indices: list[Tensor | None] = [torch.tensor(real, dtype=torch.int64)]
    if real == [*range(len(real))]:
        indices.append(None)
    for index in indices:
        rows = RealRows(len(real), index)
        short = _cut(x, grid, rows)
        assert torch.equal(short, x[:, wanted])
        copied = short.data_ptr() != x.data_ptr()
        assert copied == (text_first or index is not None), "the end of a sequence is cut off"
        out = torch.zeros(2, 11, 2, 3)
        _uncut(out, grid, rows, 10 * short)
        right = torch.zeros(2, 11, 2, 3)
        right[:, wanted] = 10 * x[:, wanted]
        assert torch.equal(out, right)
