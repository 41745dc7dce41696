"""Every preset, and every preset with one key changed: it runs, or is refused at the first call."""

from __future__ import annotations

from dataclasses import fields

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vidsparse
from vidsparse import registry
from vidsparse.config import SparseConfig, presets
from vidsparse.plan import SKIP

# what a field may be changed to; a value that a method refuses at load is skipped
CHANGES: dict[str, tuple[str, ...]] = {
    "kernel.qk": ("int8",),
    "kernel.form": ("pointer", "tma"),
    "kernel.impl": ("reference", "cpu", "triton"),
    "kernel.block_q": ("16", "64", "512"),
    "kernel.block_k": ("16", "64", "512"),
    "kernel.cpu_route": ("native",),
    "compensation.scope": ("global", "block"),
    "selector.levels": ("[0,4]", "[0,9]"),
    "selector.mode": ("mass",),
    "selector.p": ("0.01", "1"),
    "selector.inclusive": ("false",),
    "selector.apart": ("true",),
    "selector.anchor": ("row", "zero"),
    "selector.reserve": ("0", "0.5"),
    "force.neighbours": ("1",),
    "force.sinks": ("2",),
    "estimator.similarity": ("[0.2,0.1]",),
    "estimator.stride": ("1", "32"),
    "estimator.bits": ("8",),
    "compensation.gate": ("false",),
    "selector.min_blocks": ("1000000000000",),
    "estimator.sub_blocks": ("8",),
    "layout.tile": ("[1,1,1]", "[64,64,64]"),
    "layout.inner": ("raster", "hilbert"),
    "schedule.density": ("0.001", "0.999", "1"),
    "schedule.sparsity": ("0.5",),
    "schedule.dense_layers": ("[-1]", "[7]"),
}


def changes(config: SparseConfig) -> list[str]:
    """One changed key each, methods and switches included."""
    found = [f"{key}={value}" for key, values in CHANGES.items() for value in values]
    for stage in registry.STAGES:
        found += [f"{stage}.name={name}" for name in registry.methods(stage)]
    found += [f"force.{f.name}={not getattr(config.force, f.name)}" for f in fields(config.force)]
    return found


QUICK = ("balanced", "psa")
"""Of unlike stages; the other presets change the same keys of some of them."""


@pytest.mark.parametrize(
    "preset", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in presets()]
)
def test_one_changed_key_runs_or_is_refused_before_the_sparse_steps(preset: str) -> None:
    base = SparseConfig.load(preset, ["schedule.min_tokens=0", "schedule.dense_steps=1"])
    qkv = [torch.randn(1, 72, 2, 16) for _ in range(3)]
    late, ran = [], 0

    def call(config: SparseConfig, step: int) -> str | None:
        """What a step of two says against a config; the first one is dense."""
        at = vidsparse.StepContext(step, 2, layer=1, layers=8)
        try:
            out = vidsparse.sparse_attention(*qkv, grid=tiny.GRID, config=config, context=at)
        except ValueError as error:
            return str(error)
        assert bool(out.isfinite().all())
        return None

    for change in changes(base):
        try:
            config = base.override(change)
        except ValueError:
            continue
        refusal = call(config, 1)
        ran += refusal is None
        if refusal != call(config, 0):
            late.append(f"{change}: {refusal}")
    assert not late and ran > 15


@given(
    preset=st.sampled_from([*presets()]),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 11)),
    text=st.sampled_from([(0, False), (1, True), (13, False), (37, True)]),
    form=st.tuples(st.integers(1, 2), st.integers(1, 3), st.sampled_from([8, 24])),
    blocks=st.tuples(st.sampled_from([16, 32, 64]), st.sampled_from([16, 32])),
    density=st.sampled_from([0.02, 0.25, 0.6, 0.97, 1.0]),
    gain=st.sampled_from([0.0, 0.3, 2.0, 12.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=120, deadline=None)
def test_any_preset_on_any_grid(preset, sizes, text, form, blocks, density, gain, seed) -> None:
    """No NaN, whatever the logits, and no error; density 1 is dense attention."""
    changes = "schedule.name=constant", "schedule.min_tokens=0", f"schedule.density={density}"
    own = f"kernel.block_q={blocks[0]}", f"kernel.block_k={blocks[1]}"
    config = SparseConfig.load(preset, [*changes, *own])
    grid = vidsparse.TokenGrid(*sizes, text_tokens=text[0], text_first=text[1])
    generator = torch.Generator().manual_seed(seed)
    shape = form[0], grid.tokens, form[1], form[2]
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    q, k = gain * q, gain * k
    how = {"grid": grid, "config": config, "impl": "cpu", "return_lse": True, "return_plan": True}
    out, lse, plan = vidsparse.sparse_attention(q, k, v, **how)
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all())
    assert (plan is None) == (density == 1)
    if plan is None:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        dense = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)
        torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)
        return
    assert bool((plan.level_map() != SKIP).any(-1).all()) and bool((plan.density <= 1).all())
    if config.compensation.name in ("none", "centroid", "rectify"):  # weighted means of values
        assert bool((out.abs() <= v.abs().amax() * (1 + 1e-4)).all())


FIXED = ("gna", "lvsa", "mminference", "radial", "sta", "svg1", "vdit")
"""They do not look at scores."""
BY_HEAD = ("balanced", "fast", "quality", "pbs", "svg2", "svg_ear", "vmoba")
"""Their blocks are not those of the video."""


@pytest.mark.parametrize("text", [(20, False), (77, True)], ids=["20-last", "77-first"])
@pytest.mark.parametrize("preset", sorted({*presets()} - {*FIXED, *BY_HEAD}))
def test_the_block_of_the_mass_is_read_beside_what_is_forced(
    preset: str, text: tuple[int, bool]
) -> None:
    """Each block of queries looks at one of keys, another one, and not at the text: nearly dense
    attention, however few tokens that block has beside those of the text."""
    grid = vidsparse.TokenGrid(8, 8, 8, text_tokens=text[0], text_first=text[1])
    small = "schedule.name=constant", "schedule.min_tokens=0", "schedule.density=0.8"
    blocks = "kernel.block_q=64", "kernel.block_k=64", "layout.name=raster"
    config = SparseConfig.load(preset, [*small, *blocks])
    generator = torch.Generator().manual_seed(1)
    ways = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    shape, seen = (grid.tokens, 64), torch.arange(512) // 64
    q, k, v = (0.1 * torch.randn(shape, generator=generator) for _ in range(3))
    video = slice(grid.video_start, grid.video_start + 512)
    q[video] += 12 * ways[(seen + 3) % 8]
    k[video] += 12 * ways[seen]
    v[video] += 3 * ways[seen]
    q, k, v = (x[None, :, None] for x in (q, k, v))
    out = vidsparse.sparse_attention(q, k, v, grid=grid, config=config, impl="cpu")
    heads = (x.transpose(1, 2) for x in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)
    assert (out - dense)[:, video].norm() < 1e-4 * dense[:, video].norm()


REFUSED = {
    "kernel.qk=int8": "kernel.qk='int8'",
    "kernel.form=tma": "kernel.form='tma'",
    "compensation.scope=block": "compensation.scope='block'",
    "kernel.impl=triton": "impl 'triton' on cpu",
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_dense_first_step_hides_no_refusal(change: str) -> None:
    pipe, _ = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, "tiles", change)
    with vidsparse.step(0, 4), pytest.raises(ValueError, match=REFUSED[change]):
        tiny.forward(pipe.transformer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_density_one_under_autocast_is_stock(dtype: torch.dtype) -> None:
    pipe, _ = tiny.build("wan")
    with torch.autocast("cpu", dtype), vidsparse.step(3, 4):
        stock = tiny.forward(pipe.transformer)
        vidsparse.accelerate_pipeline(pipe, tiny.DENSE, "layout.name=raster")
        ours = tiny.forward(pipe.transformer)
        vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
        sparse = tiny.forward(pipe.transformer)
    assert torch.equal(stock, ours) and sparse.dtype == stock.dtype
    assert not torch.equal(sparse, stock)
