"""Bisection into blocks: against the definition, one part after the other in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vidsparse import bisection


def by_definition(rows: Tensor, size: int) -> list[set[int]]:
    """The blocks of one group, cut across the axis of largest variance, as sets of rows."""
    found: list[set[int]] = []

    def split(ids: Tensor) -> None:
        blocks = -(-len(ids) // size)
        if blocks == 1:
            found.append(set(ids.tolist()))
            return
        part = rows[ids].double()
        by_value = ids[part[:, part.var(0).argmax()].argsort(stable=True)]
        split(by_value[: blocks // 2 * size])
        split(by_value[blocks // 2 * size :])

    split(torch.arange(len(rows)))
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 330), st.integers(1, 5), st.sampled_from([1, 4, 16, 64]), st.integers(0, 9))
def test_blocks_are_those_of_the_definition(rows: int, axes: int, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, rows, axes) * torch.rand(axes)
    order = bisection.bisected(x, size, local=False)
    for group, own in zip(x, order, strict=True):
        blocks = [set(block.tolist()) for block in own.split(size)]
        assert blocks == by_definition(group, size)


def test_a_part_is_cut_across_its_own_main_axis() -> None:
    """Two clouds on slanted lines: every half of one is an end of its line."""
    torch.manual_seed(3)
    along = torch.randn(2, 64)
    slants = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    clouds = along[..., None] * slants[:, None] + 0.01 * torch.randn(2, 64, 2)
    clouds[1] += 100.0
    order = bisection.bisected(clouds.flatten(0, 1)[None], 32, local=True)[0]
    for block in order.split(32):
        cloud = int(block[0]) // 64
        place = along[cloud].argsort().argsort()[block - 64 * cloud]
        assert place.max() < 32 or place.min() >= 32


@pytest.mark.parametrize("local", [False, True])
def test_rows_that_are_alike_stay_in_order(local: bool) -> None:
    order = bisection.bisected(torch.ones(3, 100, 4), 16, local)
    assert torch.equal(order, torch.arange(100).expand(3, 100))


@pytest.mark.parametrize("rank", [2, 12, 64])
def test_main_axes_hold_the_variance_that_there_is(rank: int) -> None:
    torch.manual_seed(rank)
    x = torch.randn(3, 500, rank) * torch.linspace(3, 0.3, rank) @ torch.randn(3, rank, 64)
    covariance = x.mT @ x / 500
    axes = bisection.main_axes(covariance, 6)
    torch.testing.assert_close(axes.mT @ axes, torch.eye(6).expand(3, 6, 6), rtol=0, atol=1e-5)
    held = (axes.mT @ covariance @ axes).diagonal(dim1=1, dim2=2).sum(-1)
    most = np.linalg.eigvalsh(covariance.double().numpy())[:, -6:].sum(-1)
    assert (held.numpy() >= 0.95 * most).all() and (held.numpy() <= 1.0001 * most).all()


@pytest.mark.parametrize("rank", [0, 3, 64])
def test_a_factor_measures_in_the_metric(rank: int) -> None:
    torch.manual_seed(rank)
    x = torch.randn(2, 300, rank) @ torch.randn(2, rank, 64)
    covariance = x.mT @ x / 300
    found = bisection.factor(covariance)
    bound = 2e-5 * max(1e-20, float(covariance.diagonal(dim1=1, dim2=2).max()))
    torch.testing.assert_close(found @ found.mT, covariance, rtol=0, atol=bound)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70),
    st.integers(1, 3),
)
def test_places_are_those_of_a_stable_sort(values: list[float], times: int) -> None:
    """Of any numbers, -0 beside 0, the smallest and the largest, each several times."""
    values = values * times
    wanted = sorted(range(len(values)), key=lambda n: values[n])
    x = torch.tensor([values, values[::-1]])
    backwards = sorted(range(len(values)), key=lambda n: values[::-1][n])
    assert bisection.ranked(x).tolist() == [wanted, backwards]
    assert bisection.ranked(x.double()).tolist() == [wanted, backwards]


def test_places_in_views_are_those_of_copies() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    x[::3] = 0.5
    assert torch.equal(bisection.ranked(x.T), x.T.contiguous().argsort(dim=-1, stable=True))
