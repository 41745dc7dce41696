"""Selection in Triton against the selectors in torch, in Triton's CPU interpreter.

TRITON_INTERPRET=1 pytest tests/test_triton_select.py
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.plan import SKIP, Scores
from vidsparse.selector import pyramid, topk, topp

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)


from vidsparse.kernels.gpu import select as triton_select
from vidsparse.kernels.gpu import support

pytestmark = [
    pytest.mark.interp,
    pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN slice"),
]

SIZES = {1: 0.4, 2: 0.6, 5: 0.4, 33: 0.1, 100: 0.4, 128: 0.1, 257: 0.25}
"""Key blocks, density."""

METHODS: dict[str, Any] = {
    "topk": topk.Params(),
    "topk at least 7": topk.Params(min_blocks=7),
    "topp": topp.Params(),
    "topp at least 7": topp.Params(p=0.4, min_blocks=7),
    "quota": pyramid.Params(levels=(0, 1, 4), shares=(0.5, 0.3, 0.2), min_blocks=2),
    "mass": pyramid.Params(mode="mass", levels=(0, 2, 5), mass=(0.3, 0.6, 0.95), min_blocks=2),
}
SHARES = (0.0, 0.2, 0.7)
"""Share of forced blocks in the rows of a test."""

BOUNDARY = 1e-5
"""Share of a row's mass, so near to a bound float32 and float64 sums may differ."""


def cut(blocks: int, size: int = 512) -> Blocks:
    """Key blocks of any length, some of them full."""
    count = torch.randint(1, 2 * size, (blocks,)).clamp(max=size)
    return Blocks(count.cumsum(0) - count, count, torch.zeros(blocks, dtype=torch.bool), size)


def random_forced(blocks: int, rows: int = 3) -> Tensor:
    """bool [rows, nk]: none, some and most blocks of a row by turns."""
    share = torch.tensor([SHARES[row % len(SHARES)] for row in range(rows)])
    return torch.rand(rows, blocks) < share[:, None]


def random_scores(
    kind: str, blocks: int, rows: int = 3, step: float = 0.0, scale: float = 2.0
) -> Scores:
    """Scores [1, 1, rows, nk]; step > 0: logits are its multiples, so that many of them tie."""
    value = torch.randn(1, 1, rows, blocks) * scale
    if step:
        value = (value / step).round() * step
    return Scores(value if kind == "logit" else value.softmax(-1), kind)


def kinds(method: str) -> tuple[str, ...]:
    """The kinds of scores that a method tells apart."""
    return ("logit", "mass") if method.startswith(("topp", "mass")) else ("logit",)


def select(params: Any, scores: Scores, forced: Tensor, density: float, blocks: Blocks) -> Tensor:
    method = {topk.Params: topk, topp.Params: topp, pyramid.Params: pyramid}[type(params)]
    return method.select(scores, forced, density, blocks, params)


def expected(params: Any, scores: Scores, forced: Tensor, *rest: Any) -> Tensor:
    """The level map of the selector in torch, as attention uses it."""
    return select(params, scores, forced, *rest).masked_fill(forced, 0)


def selected(*arguments: Any) -> Tensor:
    """The level map that the selector takes from the kernel."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "kernels", lambda name, _: asked.append(name) or triton_select)
        levels = select(*arguments)
    assert asked == ["select"]
    return levels


def assert_equal(params: Any, scores: Scores, forced: Tensor, density: float, blocks: Blocks):
    want = expected(params, scores, forced, density, blocks)
    got = selected(params, scores, forced, density, blocks)
    assert got.dtype == torch.int8 and got.shape == scores.value.shape
    wrong = (got != want).flatten(0, 2).any(-1).nonzero().flatten().tolist()
    assert not wrong, f"rows {wrong}: got {got.flatten(0, 2)[wrong]}, {want.flatten(0, 2)[wrong]}"


@pytest.mark.parametrize("blocks", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_random_rows(method: str, blocks: int) -> None:
    keys, forced = cut(blocks), random_forced(blocks)
    for kind in kinds(method):
        assert_equal(METHODS[method], random_scores(kind, blocks), forced, SIZES[blocks], keys)


@pytest.mark.parametrize("method", METHODS)
def test_ties(method: str) -> None:
    """Rows of a few distinct scores; the prefixes end inside runs of equal ones."""
    for blocks in (33, 257):
        keys, forced = cut(blocks), random_forced(blocks)[:2]
        for kind in kinds(method):
            scores = random_scores(kind, blocks, rows=2, step=2.0)
            assert len(scores.value[0, 0, 0].unique()) < 10
            assert_equal(METHODS[method], scores, forced, 0.3, keys)


def test_batches_and_heads() -> None:
    """Every row of every head gets its own map; the last rows are forced altogether."""
    forced = torch.tensor([[False], [True]]).expand(2, 33)
    scores = Scores(torch.randn(2, 3, 2, 33), "logit")
    assert_equal(METHODS["topk"], scores, forced, 0.3, cut(33))


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(
    ("method", "kind"),
    [("topk", "logit"), ("topp", "logit"), ("topp", "mass"), ("quota", "logit"), ("mass", "mass")],
)
def test_bad_rows(method: str, kind: str) -> None:
    """NaN, infinities, zeros of both signs, the largest and the smallest numbers, equal scores."""
    nan, inf, most = float("nan"), float("inf"), torch.finfo(torch.float32).max
    rows: list[tuple[float, ...]] = [
        (nan,), (nan, nan, nan), (nan,) * 33, (inf,), (inf, inf), (inf, inf, inf, most), (nan, inf),
        (inf, nan) * 16, (-inf,), (-inf,) * 33, (inf,) * 33, (most, inf), (0.0,) * 33,
        (-0.0, 0.0) * 16 + (-0.0,),
        (1e-45, -1e-45, 0.0, 2e-45, -0.0), (-most, -inf) * 16, (-3.0,) * 33,
    ]  # fmt: skip
    if kind == "mass":  # no finite number is negative or large
        rows = [row for row in rows if not {-3.0, -1e-45, most} & {*row}] + [(1 / 33,) * 33]
    value = random_scores(kind, 33, rows=1).value.repeat(1, 1, len(rows), 1)
    for i, row in enumerate(rows):
        value[0, 0, i, torch.randperm(33)[: len(row)]] = torch.tensor(row)
    forced = torch.rand(len(rows), 33) < 0.1
    assert_equal(METHODS[method], Scores(value, kind), forced, 0.4, cut(33))


@pytest.mark.parametrize("density", [0.02, 0.3])
@pytest.mark.parametrize("mode", pyramid.MODES)
def test_ten_levels(mode: str, density: float) -> None:
    levels = tuple(range(10))
    mass = tuple(0.1 + 0.09 * level for level in levels)
    params = pyramid.Params(mode=mode, levels=levels, shares=(0.1,) * 10, mass=mass)
    forced = torch.rand(1, 257) < 0.05
    scores, keys = random_scores("logit", 257, rows=1, scale=0.5), cut(257)
    assert density < 0.1 or len(expected(params, scores, forced, density, keys).unique()) >= 6
    assert_equal(params, scores, forced, density, keys)


def test_the_budget_cuts_inside_a_level() -> None:
    """Blocks cost 1, 1/2 and 1/16; the first one too many ends the row."""
    params = pyramid.Params(mode="mass", levels=(0, 1, 4), mass=(0.3, 0.6, 1.0))
    scores, keys = random_scores("logit", 100, rows=1, scale=0.3), cut(100)
    forced = torch.zeros(1, 100, dtype=torch.bool)
    whole = expected(params, scores, forced, 1.0, keys)
    exact, half = (int((whole == level).sum()) for level in (0, 1))
    ends = (exact - 0.5, exact + half / 2 - 0.75, exact + half / 2 + 1.3)
    for level, budget in zip(params.levels, ends, strict=True):
        levels = expected(params, scores, forced, budget / 100, keys)
        assert int(levels.max()) == level and bool((levels[whole == level] == SKIP).any())
        assert_equal(params, scores, forced, budget / 100, keys)


def test_mass_that_ends_at_a_bound() -> None:
    """Equal masses add up to the bound but for rounding, which must not add a block."""
    for blocks, bounds in ((110, (0.1, 0.4, 0.7, 0.8)), (150, (0.1, 0.2, 0.4, 0.6))):
        scores = Scores(torch.full((1, 1, 1, blocks), 1 / blocks), "mass")
        forced = torch.zeros(1, blocks, dtype=torch.bool)
        for p in bounds:
            assert_equal(topp.Params(p=p), scores, forced, 1 - 1e-9, cut(blocks))


@pytest.mark.parametrize("p", [0.9, 1.0])
def test_differences_stay_at_the_bound(p: float) -> None:
    """float32 sums may end a row earlier or later only where float64 sums almost would."""
    params, keys = topp.Params(p=p), cut(257)
    forced = torch.zeros(12, 257, dtype=torch.bool)
    scores = random_scores("logit", 257, rows=12, scale=3.0)
    got = selected(params, scores, forced, 1 - 1e-9, keys)
    differs = got != expected(params, scores, forced, 1 - 1e-9, keys)
    mass, ranked = scores.mass(keys).double(), scores.weighted(keys).ranked(forced)
    front = mass.gather(-1, ranked).cumsum(-1) - mass.gather(-1, ranked)
    short = (p * mass.sum(-1, keepdim=True) - front).abs()
    assert (short[differs.gather(-1, ranked)] <= BOUNDARY).all()
    assert p == 1.0 or not differs.any()


def test_long_rows() -> None:
    """The widest row, and rows that are not quite."""
    for blocks in (1030, 8191, 8192):
        value = torch.randn(1, 1, 1, blocks).round(decimals=1)
        forced = torch.rand(1, blocks) < 0.01
        keys = cut(blocks)
        for method in ("topk", "mass"):
            assert_equal(METHODS[method], Scores(value, "logit"), forced, 0.2, keys)


@pytest.mark.parametrize("method", METHODS)
def test_touches_its_own_memory_only(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors inside larger ones: what lies around is neither read nor written; same bits again."""
    scores, forced, keys, edge = random_scores("logit", 33), random_forced(33), cut(33), 512
    plain = selected(METHODS[method], scores, forced, 0.3, keys)

    def inside(content: Tensor, around: float) -> tuple[Tensor, Tensor]:
        memory = torch.full((content.numel() + 2 * edge,), around, dtype=content.dtype)
        memory[edge:-edge] = content.flatten()
        return memory, memory[edge:-edge].view(content.shape)

    _, value = inside(scores.value, float("nan"))
    _, there = inside(forced, True)
    keys = replace(keys, count=inside(keys.count, 10**6)[1])
    memory, out = inside(torch.full(scores.value.shape, 77, dtype=torch.int8), 77)
    monkeypatch.setattr(torch, "empty_like", lambda *_, **__: out)
    again = selected(METHODS[method], Scores(value, "logit"), there, 0.3, keys)
    assert again is out and torch.equal(again, plain)
    assert bool((memory[:edge] == 77).all()) and bool((memory[-edge:] == 77).all())
    assert torch.equal(value, scores.value) and torch.equal(there, forced)


def test_any_strides_of_forced() -> None:
    scores, keys = random_scores("logit", 33), cut(33)
    for forced in (
        torch.rand(33) < 0.2,
        (torch.rand(33, 3) < 0.2).T,
        (torch.rand(6, 66) < 0.2)[::2, 1::2],
    ):
        assert_equal(METHODS["topk"], scores, forced.expand(3, 33), 0.3, keys)


def test_counts_in_int32() -> None:
    scores, keys = random_scores("logit", 100), cut(100)
    forced = torch.zeros(3, 100, dtype=torch.bool)
    given = (scores.value, "logit", forced)
    wide = triton_select.select_topp(*given, keys.count, 0.7, 1, 90)
    narrow = triton_select.select_topp(*given, keys.count.int(), 0.7, 1, 90)
    assert torch.equal(wide, narrow)


OFFSETS = """
import sys
sys.path[:0] = [{tests!r}, {package!r}]
import resource
import interpreter
import torch
interpreter.install()
from vidsparse.kernels.gpu.select import select_kernel
FAR, NK = 2**30 + 64, 128  # row 2 starts past 2^31 elements
memory = [torch.empty(2 * FAR + NK, dtype=t) for t in (torch.float32, torch.bool, torch.int8)]
value, forced, level = (x.as_strided((3, NK), (FAR, 1)) for x in memory)
torch.manual_seed(0)
value.copy_(torch.randn(3, NK))
forced.copy_(torch.eye(3, NK))
select_kernel[(3,)](
    value, forced, forced, level, 3, FAR, 0, NK << 9, (5.0,), LEVELS=(0,), RULE="rank", NK=NK
)
want = torch.full((3, NK), -1, dtype=torch.int8)
ranked = torch.where(forced, 9.0, value).argsort(-1, descending=True)
assert torch.equal(level, want.scatter_(-1, ranked[:, :5], 0))
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 * 2**20
print("right")
"""


def test_offsets_past_2_31_elements() -> None:
    """13 GB of address space, of which only the pages in use are committed."""
    package = Path(triton_select.__file__).parents[2]
    code = OFFSETS.format(tests=str(Path(__file__).parent), package=str(package))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "right", done.stderr


def test_no_rows() -> None:
    value, forced = torch.zeros(2, 0, 3, 5), torch.zeros(3, 5, dtype=torch.bool)
    assert triton_select.select_topk(value, forced, 2).shape == value.shape


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    value, forced, count = torch.zeros(1, 1, 2, 5), torch.zeros(2, 5).bool(), torch.ones(5).long()
    topk_of, topp_of = triton_select.select_topk, triton_select.select_topp
    with pytest.raises(ValueError, match=r"8193 key blocks.*1 \.\. 8192.*block_k"):
        topk_of(torch.zeros(1, 1, 1, 8193), torch.zeros(1, 8193).bool(), 3)
    with pytest.raises(ValueError, match="0 key blocks"):
        topk_of(torch.zeros(1, 1, 2, 0), torch.zeros(2, 0).bool(), 3)
    with pytest.raises(ValueError, match=r"float64.*float32 \[B, H, nq, nk\]"):
        topk_of(value.double(), forced, 3)
    with pytest.raises(ValueError, match=r"contiguous; use value\.float\(\)\.contiguous\(\)"):
        topk_of(torch.zeros(1, 1, 5, 2).mT, forced, 3)
    with pytest.raises(ValueError, match=r"forced is torch\.bool \(1, 5\).*bool \(2, 5\)"):
        topk_of(value, forced[:1], 3)
    with pytest.raises(ValueError, match=r"forced is torch\.int64"):
        topk_of(value, forced.long(), 3)
    with pytest.raises(ValueError, match=r"key_counts is \(torch\.int64, 4\).*\[5\]"):
        topp_of(value, "logit", forced, count[1:], 0.9, 1, 5)
    with pytest.raises(ValueError, match=r"key_counts is \(torch\.float32, 5\)"):
        topp_of(value, "logit", forced, count.float(), 0.9, 1, 5)
    with pytest.raises(ValueError, match="kind='rank'"):
        topp_of(value, "rank", forced, count, 0.9, 1, 5)
    for levels, ends in (((0, 10), (1, 2)), ((1, 2), (1, 2)), ((0,), (1, 2))):
        with pytest.raises(ValueError, match=r"levels ascending from 0 to at most 9"):
            triton_select.select_quota(value, forced, levels, ends, 1, 2.0)
    monkeypatch.setattr(support, "refusal", lambda device: f"nothing runs on {device}")
    with pytest.raises(ValueError, match=r"nothing runs on cpu; use vidsparse\.selector"):
        topk_of(value, forced, 3)
