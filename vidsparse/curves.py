"""Orders of a 3-D cuboid, in which neighbours in the order are neighbours in space."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

Vector = tuple[int, int, int]

INNER = ("raster", "morton", "hilbert")
MAX_TILE = 1 << 20


def tile_faults(tile: tuple[int, ...], inner: str) -> dict[str, str]:
    """What is wrong with a tile and its inner order: the name -> what is allowed."""
    faults = {}
    if len(tile) != 3 or min(tile) < 1 or math.prod(tile) > MAX_TILE:
        axes = "three integers >= 1 (frames, rows, columns)"
        faults["tile"] = f"{axes}, a product of at most {MAX_TILE:,}"
    if inner not in INNER:
        faults["inner"] = ", ".join(INNER)
    return faults


def tiles(sizes: Vector, tile: tuple[int, ...], inner: str) -> Tensor:
    """Tile by tile. int64 [prod(sizes)]: raster indices.

    tile: its three sizes; tiles follow each other as a snake, inside one the order is `inner`.
    """
    number, inside = _in_tiles(sizes, tile)
    return torch.argsort((_rank(tile, inner)[inside] + math.prod(tile) * number).flatten())


def tile_counts(sizes: Vector, tile: tuple[int, ...]) -> Tensor:
    """int64 [tiles]: the tokens of each, in the order of `tiles`; the border cuts some short."""
    return _in_tiles(sizes, tile)[0].flatten().bincount()


def _in_tiles(sizes: Vector, tile: tuple[int, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """int64 [sizes]: the number of each token's tile, along a snake; and its place in the tile."""
    coords = torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij")
    counts = [-(-n // t) for n, t in zip(sizes, tile, strict=True)]
    place = [c // t for c, t in zip(coords, tile, strict=True)]
    row = place[0] * counts[1]
    row = row + torch.where(place[0] % 2 == 0, place[1], counts[1] - 1 - place[1])
    column = torch.where(row % 2 == 0, place[2], counts[2] - 1 - place[2])
    return row * counts[2] + column, tuple(c % t for c, t in zip(coords, tile, strict=True))


def _rank(tile: tuple[int, ...], inner: str) -> Tensor:
    """int64 [tile]: the position of each token inside a full tile; partial tiles keep the order."""
    sizes = tile[0], tile[1], tile[2]
    rank = torch.arange(math.prod(tile))
    if inner != "raster":
        curve = morton if inner == "morton" else hilbert
        rank[curve(sizes)] = torch.arange(math.prod(tile))
    return rank.view(sizes)


def morton(sizes: Vector) -> Tensor:
    """Z-order. int64 [prod(sizes)]: raster indices by the interleaved bits of their coordinates."""
    axes = torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij")
    code = torch.zeros(sizes, dtype=torch.int64)
    for bit in range(max(sizes).bit_length()):
        for place, axis in enumerate(reversed(axes)):  # the last axis varies fastest
            code |= ((axis >> bit) & 1) << (3 * bit + place)
    return torch.argsort(code.flatten())


def hilbert(sizes: Vector) -> Tensor:
    """Generalised Hilbert curve on any cuboid. int64 [prod(sizes)]: raster indices in curve order.

    The cuboid is cut in two, three or five parts that a path crosses end to end, recursively; parts
    are kept near-cubic and halves even, so that consecutive tokens are neighbours (a few diagonal
    steps remain for odd sizes). After J. Cerveny's generalisation of the Hilbert curve.
    """
    long, middle, short = sorted(range(3), key=lambda axis: -sizes[axis])
    edges = [_along(axis, sizes[axis]) for axis in (long, middle, short)]
    points = torch.tensor(list(_walk((0, 0, 0), *edges)), dtype=torch.int64)
    return (points[:, 0] * sizes[1] + points[:, 1]) * sizes[2] + points[:, 2]


def _along(axis: int, length: int) -> Vector:
    edge = [0, 0, 0]
    edge[axis] = length
    return edge[0], edge[1], edge[2]


def _add(*vectors: Vector) -> Vector:
    x, y, z = (sum(parts) for parts in zip(*vectors, strict=True))
    return x, y, z


def _neg(v: Vector) -> Vector:
    return -v[0], -v[1], -v[2]


def _length(v: Vector) -> int:
    return abs(sum(v))


def _resized(v: Vector, length: int) -> Vector:
    """The axis-parallel vector `v` with another length."""
    x, y, z = ((n > 0) * length - (n < 0) * length for n in v)
    return x, y, z


def _half(v: Vector) -> Vector:
    """Half of an edge, rounded to an even length where the edge allows it."""
    n = _length(v)
    half = n // 2
    return _resized(v, half + 1 if half % 2 and n > 2 else half)


def _walk(p: Vector, a: Vector, b: Vector, c: Vector) -> Iterator[Vector]:
    """Visit the cuboid with corner p and edges a, b, c, from p to the far end of a."""
    for edge, others in ((a, (b, c)), (b, (a, c)), (c, (a, b))):
        if all(_length(v) == 1 for v in others):
            yield from (_add(p, _resized(edge, i)) for i in range(_length(edge)))
            return
    w, h, d = _length(a), _length(b), _length(c)
    a2, b2, c2 = _half(a), _half(b), _half(c)
    rest_a, rest_b, rest_c = _add(a, _neg(a2)), _add(b, _neg(b2)), _add(c, _neg(c2))
    end_a, end_c = _resized(a, w - 1), _resized(c, d - 1)
    end_b2, end_c2 = _resized(b, _length(b2) - 1), _resized(c, _length(c2) - 1)
    if 2 * w > 3 * h and 2 * w > 3 * d:  # long: two parts, one after the other
        parts = [(p, a2, b, c), (_add(p, a2), rest_a, b, c)]
    elif 3 * h > 4 * d:  # flat in c: there along b, across, back along b
        parts = [
            (p, b2, c, a2),
            (_add(p, b2), a, rest_b, c),
            (_add(p, end_a, end_b2), _neg(b2), c, _neg(rest_a)),
        ]
    elif 3 * d > 4 * h:  # flat in b
        parts = [
            (p, c2, a2, b),
            (_add(p, c2), a, b, rest_c),
            (_add(p, end_a, end_c2), _neg(c2), _neg(rest_a), b),
        ]
    else:
        parts = [
            (p, b2, c2, a2),
            (_add(p, b2), c, a2, rest_b),
            (_add(p, end_b2, end_c), a, _neg(b2), _neg(rest_c)),
            (_add(p, end_a, b2, end_c), _neg(c), _neg(rest_a), rest_b),
            (_add(p, end_a, end_b2), _neg(b2), c2, _neg(rest_a)),
        ]
    for part in parts:
        if all(_length(v) for v in part[1:]):
            yield from _walk(*part)
