"""xattn, sparge, absdiff, lowbit, blasst, hier: level maps by the papers' formulas in float64."""

import math

import pytest
import torch
from by_formula import GRID, HEADS, Call, call, ordered
from torch import Tensor

from vidsparse.grid import TokenGrid
from vidsparse.plan import SKIP

TEXT_FIRST = TokenGrid(2, 9, 13, text_tokens=5, text_first=True)
FREE = "schedule.density=0.99999999999"  # so many blocks as there are


def assert_kept(made: Call, b: int, h: int, i: int, wanted: list[bool]) -> None:
    levels = made.plan.levels[b, h, i].tolist()
    assert levels == [0 if one else SKIP for one in wanted], (b, h, i)


def below(mass: Tensor, forced: list[bool], p: float, inclusive: bool = True) -> list[bool]:
    """Forced blocks, then those of the largest mass, until the share p; if the one that reaches it
    is left out, those of the largest mass of all, at least one, and what is forced."""
    first = forced if inclusive else [False] * len(forced)
    order, front, found = ordered(mass.tolist(), first), 0.0, forced[:]
    for rank, j in enumerate(order):
        reached = front + float(mass[j])
        inside = front < p * float(mass.sum()) if inclusive else reached <= p * float(mass.sum())
        found[j] = found[j] or rank == 0 or inside
        front = reached
    return found


@pytest.mark.parametrize("grid", [GRID, TEXT_FIRST], ids=["text-last", "text-first"])
def test_xattn_takes_the_mass_of_antidiagonals(grid: TokenGrid) -> None:
    stride = 4
    made = call("xattn", f"estimator.stride={stride}", "selector.p=0.8", FREE, grid=grid)

    def groups(part: Tensor, turned: bool) -> list[tuple[Tensor, float]]:
        found = []
        for start in range(0, len(part), stride):
            own = part[start : start + stride]
            places = range(stride)[::-1] if turned else range(stride)
            whole = torch.stack([own[place % len(own)] for place in places])
            found.append((whole, len(own) / stride))
        return found

    for b, h in HEADS:
        scale = 1 / (stride * made.q.shape[-1] ** 0.5)
        keys = [groups(part, False) for part in made.blocks("k", b, h)]
        for i, part in enumerate(made.blocks("q", b, h)):
            total, weight = torch.zeros(len(keys), dtype=torch.float64), 0.0
            for own, w in groups(part, True):
                cell = torch.stack(
                    [sum(n * ((own * x).sum() * scale).exp() for x, n in block) for block in keys]
                )
                total += w * cell / cell.sum()
                weight += w
            forced = made.forced[i].tolist()
            assert_kept(made, b, h, i, below(total / weight, forced, 0.8))


def test_an_antidiagonal_meets_every_row_and_column_once() -> None:
    """Of whole groups the logit is the mean of the antidiagonal of Q K^T."""
    from vidsparse.blocks import Blocks
    from vidsparse.estimator import antidiagonal

    cut, device = Blocks.cut(TokenGrid(1, 1, 37), 16), torch.device("cpu")
    (q, ours), (k, weight) = (antidiagonal.groups(cut, 4, turn, device) for turn in (True, False))
    assert q[0, 1].tolist() == [7, 6, 5, 4] and k[0, 1].tolist() == [4, 5, 6, 7]
    assert k[2].tolist() == [[32, 33, 34, 35], [36] * 4, [32] * 4, [32] * 4]
    assert weight[2].tolist() == [1.0, 0.25, 0.0, 0.0] and torch.equal(ours, weight)
    assert float(weight.sum()) * 4 == 37


def test_a_block_without_mass_is_not_kept_by_accident() -> None:
    """Of XAttention's code, which fills lists with block 0."""
    made = call("xattn", "selector.p=0.5", "force.text=false", FREE)
    rows = made.plan.levels == 0
    assert not bool(rows[..., 0].all()) and bool(rows.any(-1).all())


@pytest.mark.parametrize("least", [0.3, 0.6, 0.9])
def test_sparge_trusts_means_of_blocks_that_are_alike(least: float) -> None:
    made = call("sparge", f"estimator.least={least}", "selector.p=0.9", FREE)
    alike = []
    for b, h in HEADS:

        def stands(part: Tensor) -> bool:
            unit = part / part.norm(dim=1, keepdim=True)
            return float((unit @ unit.T).mean()) > least

        centre = made.k[b, h].mean(0)
        keys = torch.tensor([stands(part - centre) for part in made.blocks("k", b, h)])
        count = made.plan.k_blocks.count
        for i, part in enumerate(made.blocks("q", b, h)):
            own = stands(part)
            alike.append(own)
            forced = [
                f or not own or not bool(k) for f, k in zip(made.forced[i], keys, strict=True)
            ]
            mass = (made.logits(b, h)[i].exp() * count).masked_fill(~keys, 0.0)
            wanted = [True] * len(keys) if all(forced) else below(mass, forced, 0.9, False)
            assert_kept(made, b, h, i, wanted)
    assert least != 0.6 or (any(alike) and not all(alike))


def test_sparge_is_dense_where_nothing_is_alike_and_poor_where_all_is() -> None:
    made = call("sparge", "estimator.least=1", FREE)
    assert bool((made.plan.levels == 0).all())
    dense = torch.nn.functional.scaled_dot_product_attention(made.q, made.k, made.v)
    torch.testing.assert_close(made.out, dense, rtol=1e-9, atol=1e-10)
    made = call("sparge", "estimator.least=-1", "selector.p=0.3", "force.text=false", FREE)
    assert float(made.plan.density.mean()) < 0.3


def test_blocks_of_equal_tokens_and_of_zeros_are_alike() -> None:
    from vidsparse.estimator.alike import likeness

    x = torch.randn(4, 8, 5)
    x[0], x[1], x[2, 3:] = x[0, 0].clone(), 0.0, 0.0
    real = torch.ones(4, 8, dtype=torch.bool)
    real[3, 1:] = False
    found = likeness(x.masked_fill(~real.unsqueeze(-1), 0.0), real)
    unit = torch.nn.functional.normalize(x[2, :3], dim=-1)
    wanted = float((unit @ unit.T).sum() + 25) / 64
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0, wanted, 1.0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("theta", [0.5, 2.0])
def test_absdiff_keeps_what_its_hottest_piece_brings_near_the_anchor(theta: float) -> None:
    made = call("absdiff", f"selector.theta={theta}", FREE)
    scale = made.q.shape[-1] ** -0.5
    for b, h in HEADS:
        for i, part in enumerate(made.blocks("q", b, h)):
            mean, forced = part.mean(0) * scale, made.forced[i].tolist()
            score = torch.stack(
                [
                    max(piece.mean(0) @ mean for piece in keys.split(4))
                    for keys in made.blocks("k", b, h)
                ]
            )
            anchor = max(x for x, one in zip(score.tolist(), forced, strict=True) if one)
            wanted = [f or x >= anchor - theta for f, x in zip(forced, score.tolist(), strict=True)]
            assert_kept(made, b, h, i, wanted)


def test_absdiff_does_not_see_what_all_keys_share_and_has_its_ends() -> None:
    from by_formula import SMALL, field

    from vidsparse.attention import attend
    from vidsparse.config import SparseConfig

    config = SparseConfig.load("absdiff", [*SMALL, "selector.theta=1"])
    q, k, v = field(GRID, 0)
    plans = [
        attend(q, keys, v, grid=GRID, config=config, impl="cpu").plan
        for keys in (k, k + torch.linspace(-1, 1, 16).double())
    ]
    assert plans[0] is not None and plans[1] is not None
    assert torch.equal(plans[0].levels, plans[1].levels)
    assert bool(
        (call("absdiff", "selector.theta=1000", FREE).plan.levels == 0).sum(-1).amin() >= 15
    )
    made = call("absdiff", "selector.theta=-1000")
    assert torch.equal((made.plan.levels == 0), made.forced.expand(made.plan.levels.shape))


def quantised(part: Tensor, bits: int) -> Tensor:
    step = part.abs().max() / (2 ** (bits - 1) - 1)
    return (part / step).round() * step


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_lowbit_compares_every_product_with_the_first_and_the_own_block(bits: int) -> None:
    made = call("lowbit", f"estimator.bits={bits}", "selector.theta=1.5", "force.text=false", FREE)
    rows, cut, scale = made.plan.q_blocks, made.plan.k_blocks, made.q.shape[-1] ** -0.5
    for b, h in HEADS:
        keys = [quantised(x, bits) if bits else x for x in made.blocks("k", b, h)]
        for i, part in enumerate(made.blocks("q", b, h)):
            part = quantised(part * scale, bits) if bits else part * scale
            start, end = int(rows.start[i]), int(rows.start[i] + rows.count[i])
            own = [
                j for j in range(len(cut))
                if j == 0 or (cut.start[j] < end and cut.start[j] + cut.count[j] > start)
            ]  # fmt: skip
            top = torch.stack([(part @ x.T).amax(1) for x in keys], 1)
            score = (top - top[:, own].amax(1, keepdim=True)).amax(0)
            forced = made.forced[i].tolist()
            wanted = [f or x >= -1.5 for f, x in zip(forced, score.tolist(), strict=True)]
            assert_kept(made, b, h, i, wanted)


@pytest.mark.parametrize("grid", [GRID, TEXT_FIRST], ids=["text-last", "text-first"])
def test_blasst_is_the_online_softmax_that_skips_tiles(grid: TokenGrid) -> None:
    """Tile by tile with a running maximum: what is skipped, the output, and what that loses."""
    theta = 1.0
    made = call("blasst", f"selector.theta={theta}", FREE, grid=grid)
    scale, skipped = made.q.shape[-1] ** -0.5, 0
    for b, h in HEADS:
        keys, values = made.blocks("k", b, h), made.blocks("v", b, h)
        for i, part in enumerate(made.blocks("q", b, h)):
            highest = torch.full((len(part),), -math.inf, dtype=part.dtype)
            top, down, lost = torch.zeros_like(part), torch.zeros_like(highest), 0
            wanted = []
            for k, v in zip(keys, values, strict=True):
                tile = part @ k.T * scale
                taken = bool((tile.amax(1) - highest >= -theta).any())
                wanted.append(taken)
                lost += 0 if taken else len(k)
                if not taken:
                    continue
                new = torch.maximum(highest, tile.amax(1))
                turn, weight = (highest - new).exp(), (tile - new[:, None]).exp()
                top, down = top * turn[:, None] + weight @ v, down * turn + weight.sum(1)
                highest = new
            assert_kept(made, b, h, i, wanted)
            first = int(made.plan.q_blocks.start[i])
            out = made.out[b, h, first : first + len(part)]
            torch.testing.assert_close(out, top / down[:, None], rtol=1e-9, atol=1e-10)
            full = (part @ made.k[b, h].T * scale).logsumexp(1)
            most = torch.log(1 + lost * math.exp(-theta) / down)
            assert bool((full - highest - down.log() <= most + 1e-9).all()), "n_skipped lambda"
            skipped += lost
    assert skipped > 100


def test_blasst_without_a_threshold_reads_everything() -> None:
    made = call("blasst", "selector.theta=10000", FREE, "selector.min_blocks=99")
    assert bool((made.plan.levels == 0).all())


@pytest.mark.parametrize("keep", [0.34, 0.6, 1.0])
def test_hier_scores_pieces_inside_the_best_super_blocks(keep: float) -> None:
    made = call("hier", "estimator.span=3", f"estimator.keep={keep}", "schedule.density=0.3")
    scale, nk = made.q.shape[-1] ** -0.5, len(made.plan.k_blocks)
    for b, h in HEADS:
        keys = made.blocks("k", b, h)
        spans = [range(first, min(first + 3, nk)) for first in range(0, nk, 3)]
        for i, part in enumerate(made.blocks("q", b, h)):
            mean, forced = part.mean(0) * scale, made.forced[i].tolist()
            coarse = [float(torch.cat([keys[j] for j in span]).mean(0) @ mean) for span in spans]
            few = math.ceil(keep * len(spans))
            best = sorted(range(len(spans)), key=lambda s: -coarse[s])[:few]
            value = [-math.inf] * nk
            for j in (j for s in best for j in spans[s]):
                pieces = keys[j].split(4)
                total = sum(len(x) * (x.mean(0) @ mean).exp() for x in pieces)
                value[j] = math.log(float(total) / len(keys[j]))
            first = ordered(value, forced)[: max(1, math.floor(0.3 * nk))]
            wanted = [forced[j] or j in first for j in range(nk)]
            assert_kept(made, b, h, i, wanted)


def test_hier_over_everything_is_flat_and_nearly_so_over_half() -> None:
    def kept(*changes: str) -> Tensor:
        return call("hier", "estimator.span=2", "schedule.density=0.3", *changes).plan.levels == 0

    flat = kept("estimator.keep=1")
    assert torch.equal(flat, kept("estimator.keep=1", "estimator.span=5"))
    half = kept("estimator.keep=0.6")
    assert float((half & flat).sum() / flat.sum()) > 0.9
