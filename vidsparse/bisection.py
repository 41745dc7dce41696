"""Bisection: an order of rows in which every run of equally many is close together in space.

Rows are halved at the median along the axis in which they differ most, the halves again, down to
blocks. Every cut falls between whole blocks, so that all of them but the last are full, for any
number of rows. All groups are ordered at once, in log2(blocks) passes.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor

from vidsparse.kernels.gpu import support

POWER = 4
"""Products with its covariance that turn a direction into the main axis of a part."""

SWEEPS = 6
"""The same for the main axes of all rows together."""

LEAST = 1e-5
"""Share of the largest variance, added to that of every axis: columns stay independent."""


Part = tuple[tuple[int, ...], Tensor, Tensor]
"""Parts of one length: their first rows, the rows [G, A, parts, n], and which they are [G, parts,
n]."""


def bisected(rows: Tensor, size: int, local: bool) -> Tensor:
    """int64 [G, n]: in this order, every `size` rows of a group are a block.

    rows: float [G, n, A], finite. local: a part is cut across its own main axis, any direction;
    else across that of the A axes in which it varies most. The same for the same rows; equal ones
    stay in their order.
    """
    groups, count, _ = rows.shape
    order = torch.arange(count, device=rows.device).repeat(groups, 1)
    rows = rows.mT.contiguous()  # what is compared stands together
    first: Part = (0,), rows.unsqueeze(2), order.unsqueeze(1)
    parts = {count: [first]}
    done: dict[int, list[tuple[tuple[int, ...], Tensor]]] = defaultdict(list)
    while parts:
        halves: dict[int, list[Part]] = defaultdict(list)
        for length, alike in parts.items():
            firsts, here, ids = _together(alike)
            if length <= size:
                done[length].append((firsts, ids))
                continue
            ranks = ranked(_main(here) if local else _widest(here))
            here = here.gather(-1, ranks.unsqueeze(1).expand(here.shape))
            ids = ids.gather(-1, ranks)
            for at, many in _halves(length, size):
                moved = tuple(one + at for one in firsts)
                of_half = here.narrow(-1, at, many), ids.narrow(-1, at, many)
                halves[many].append((moved, *of_half))
        parts = halves
    for length, ended in done.items():
        places = _rows(tuple(one for firsts, _ in ended for one in firsts), length, rows.device)
        order.index_copy_(1, places, torch.cat([ids for _, ids in ended], 1).flatten(1))
    return order


def _together(alike: list[Part]) -> Part:
    """Parts of one length as one."""
    firsts, rows, ids = zip(*alike, strict=True)
    return tuple(chain(*firsts)), torch.cat(rows, 2), torch.cat(ids, 1)


def ranked(x: Tensor) -> Tensor:
    """int64 like x [..., n], finite: places by rising value, equal ones as they stand.

    On a CPU a number and its place are one integer, all of them unlike, which NumPy sorts by vector
    instructions; a stable sort of torch takes five times as long.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return x.argsort(dim=-1, stable=True)
    bits = (x + 0.0).view(torch.int32)  # of -0.0, too, those of 0.0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = rising.long().bitwise_left_shift_(32).bitwise_or_(torch.arange(x.shape[-1]))
    keys.numpy().sort(axis=-1)
    return keys.bitwise_and_(0xFFFFFFFF)


def main_axes(covariance: Tensor, axes: int) -> Tensor:
    """[G, D, axes]: orthonormal, spanning the directions of largest variance; axes <= D.

    covariance: float [G, D, D], symmetric. By subspace iteration, which never waits for a GPU; each
    axis has the variance that is left for it to well within what a choice of axes needs. In Triton
    all of it is a launch. Elsewhere in float64 inside, so that a Cholesky factor of products can
    make them orthonormal: a few operations for all groups, where a QR takes hundreds.
    """
    depth = covariance.shape[-1]
    kernels = support.kernels("axes", covariance)
    if kernels is not None and depth <= support.MAX_HEAD_DIM:
        first = start(depth, axes, covariance.dtype, covariance.device)
        own: Tensor = kernels.main_axes(covariance, first, LEAST, SWEEPS)
        return own
    largest = covariance.diagonal(dim1=-2, dim2=-1).amax(-1).view(-1, 1, 1)
    scaled = (covariance / largest.clamp(min=torch.finfo(covariance.dtype).tiny)).double()
    basis = start(depth, axes, scaled.dtype, scaled.device).expand(len(scaled), depth, axes)
    for _ in range(SWEEPS):
        basis = _orthonormal(scaled @ basis + LEAST * basis)
    return _orthonormal(basis).to(covariance.dtype)


def _orthonormal(basis: Tensor) -> Tensor:
    """Q of the QR factors of float64 [G, D, A], A independent columns, but for rounding."""
    lower = torch.linalg.cholesky_ex(basis.mT @ basis).L
    found: Tensor = torch.linalg.solve_triangular(lower, basis.mT, upper=False).mT
    return found


def factor(covariance: Tensor) -> Tensor:
    """[G, D, D]: L with L L^T = covariance, but for a ridge of 1e-5 of its largest variance.

    |L^T x| is the length of x in the metric of the covariance.
    """
    largest = covariance.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1e-20)
    eye = torch.eye(covariance.shape[-1], device=covariance.device, dtype=covariance.dtype)
    ridge = eye * (1e-5 * largest).view(-1, 1, 1)
    found: Tensor = torch.linalg.cholesky_ex(covariance + ridge).L
    return found


@lru_cache(maxsize=16)
def start(depth: int, axes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[depth, axes] to begin `main_axes` from, in general position.

    Kept, as a copy would be a wait in every call.
    """
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(depth, axes, generator=generator, dtype=torch.float64, device="cpu")
        return drawn.to(device, dtype)


@lru_cache(maxsize=256)
def _rows(firsts: tuple[int, ...], length: int, device: torch.device) -> Tensor:
    """int64: rows of parts of one length, kept for the same reason."""
    with torch.inference_mode(False):
        begin = torch.tensor(firsts, device="cpu").unsqueeze(1)
        return (begin + torch.arange(length, device="cpu")).flatten().to(device)


def _halves(length: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(first row, rows) of both halves; the cut is between blocks."""
    left = -(-length // size) // 2 * size
    return (0, left), (left, length - left)


def _widest(x: Tensor) -> Tensor:
    """x [G, A, parts, n] -> [G, parts, n]: on the axis in which each part varies most."""
    apart = torch.linalg.vector_norm(x - x.mean(-1, keepdim=True), dim=-1)
    axis = apart.argmax(1, keepdim=True).unsqueeze(-1)
    return x.gather(1, axis.expand(-1, 1, -1, x.shape[-1])).squeeze(1)


def _main(x: Tensor) -> Tensor:
    """x [G, A, parts, n] -> [G, parts, n]: on the main axis of each part."""
    x = (x - x.mean(-1, keepdim=True)).transpose(1, 2)
    covariance = x @ x.mT
    widest = covariance.diagonal(dim1=-2, dim2=-1).argmax(-1).view(*x.shape[:2], 1, 1)
    axis = covariance.gather(-1, widest.expand(*covariance.shape[:3], 1))
    for _ in range(POWER):
        axis = covariance @ axis
        axis = axis / axis.norm(dim=-2, keepdim=True).clamp(min=1e-20)
    return (axis.mT @ x).squeeze(-2)
