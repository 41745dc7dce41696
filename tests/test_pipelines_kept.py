"""Answers about the values of tensors: kept while the tensors live unwritten, and asked once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vidsparse.pipelines import kept
from vidsparse.pipelines.kept import SIZE, Kept


class Asked:
    """Sums of tensors through a `Kept`. count: how often they had to be computed."""

    def __init__(self) -> None:
        self.kept: Kept[float] = Kept()
        self.count = 0

    def __call__(self, *tensors: Tensor | None) -> float:
        def ask() -> float:
            self.count += 1
            return sum(float(x.sum()) for x in tensors if x is not None)

        return self.kept.get(tensors, ask)


def test_a_tensor_that_was_written_to_is_a_new_question() -> None:
    asked, x = Asked(), torch.ones(3)
    assert [asked(x), asked(x), asked.count] == [3.0, 3.0, 1]
    x[0] = 5
    assert [asked(x), asked(x), asked.count] == [7.0, 7.0, 2]


def test_equal_tensors_are_two_questions_and_places_count() -> None:
    asked, x, y = Asked(), torch.ones(3), torch.ones(3)
    for tensors in ((x,), (y,), (x, y), (y, x), (x, None), (None, x), (None, None)):
        before = asked.count
        assert asked(*tensors) == asked(*tensors) == sum(3.0 for t in tensors if t is not None)
        assert asked.count == before + 1


@pytest.mark.parametrize("place", [0, 1])
def test_a_tensor_in_the_memory_of_one_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """Python gives the id of a freed object to a later one."""
    monkeypatch.setattr(kept, "id", lambda tensor: 7, raising=False)
    asked, tensors = Asked(), [torch.zeros(3), torch.zeros(3)]
    assert asked(*tensors) == 0.0
    tensors[place] = torch.ones(3)
    assert [asked(*tensors), asked(*tensors), asked.count] == [3.0, 3.0, 2]


def filled(asked: Asked) -> list[Tensor]:
    """As many tensors as are remembered, asked about in their order."""
    tensors = [torch.full((1,), float(n)) for n in range(SIZE)]
    for n, tensor in enumerate(tensors):
        assert asked(tensor) == n
    assert asked.count == SIZE
    return tensors


def again(asked: Asked, tensor: Tensor) -> bool:
    """Whether the answer for a tensor has to be computed."""
    before = asked.count
    asked(tensor)
    return asked.count > before


def test_the_answer_that_was_needed_last_long_ago_is_forgotten() -> None:
    asked = Asked()
    tensors = filled(asked)
    assert not again(asked, tensors[0])
    assert again(asked, torch.ones(1)), "one more than is remembered"
    assert not any([again(asked, tensor) for tensor in (*tensors[2:], tensors[0])])
    assert again(asked, tensors[1])


def test_a_new_answer_in_an_old_place_is_the_youngest(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[int, int] = {}
    number: Callable[[object], int] = id
    monkeypatch.setattr(kept, "id", lambda t: names.get(number(t), number(t)), raising=False)
    asked = Asked()
    tensors = filled(asked)
    later = torch.ones(1)
    names[number(later)] = number(tensors[0])
    assert again(asked, later) and again(asked, torch.ones(1))
    assert not again(asked, later) and again(asked, tensors[1])


def test_tensors_of_inference_mode_have_no_count_of_writes() -> None:
    asked = Asked()
    with torch.inference_mode():
        x = torch.ones(3)
    assert [asked(x), asked(x), asked.count] == [3.0, 3.0, 1]
