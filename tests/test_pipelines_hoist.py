"""Token order: hoisted equals plain, for any order; whatever goes missing is noticed."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import vidsparse
from vidsparse import TokenGrid
from vidsparse.attention import attend
from vidsparse.config import SparseConfig
from vidsparse.geometry import token_order
from vidsparse.pipelines.adapter import Site
from vidsparse.pipelines.families.wan import ADAPTER
from vidsparse.pipelines.forward import Forward
from vidsparse.pipelines.hoist import KEPT_ORDERS, Hoist


def shuffled(grid: TokenGrid) -> tuple[Tensor, Tensor]:
    order = torch.randperm(grid.tokens, generator=torch.Generator().manual_seed(7))
    return order, order.argsort()


def tiled(grid: TokenGrid) -> tuple[Tensor, Tensor]:
    return token_order(grid, SparseConfig.from_dict(tiny.SPARSE).layout)


def raster(grid: TokenGrid) -> tuple[Tensor, Tensor]:
    return torch.arange(grid.tokens), torch.arange(grid.tokens)


def hoists(pipe: Any, order: Any, adapter: Any = ADAPTER) -> list[Hoist]:
    made = [Hoist(m, adapter, order, Forward()) for m in ADAPTER.transformers(pipe).values()]
    for hoist in made:
        hoist.attach()
    return made


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("order", [shuffled, tiled])
@pytest.mark.parametrize("name", tiny.WAN)
def test_hoisted_equals_plain(name: str, order: Any) -> None:
    pipe, call = tiny.build(name)
    plain = tiny.run(pipe, call)
    made = hoists(pipe, order)
    moved = tiny.run(pipe, call)
    assert 0 < distance(plain, moved) < 1e-5
    for hoist in made:
        hoist.detach()
    assert torch.equal(plain, tiny.run(pipe, call))


@pytest.mark.parametrize("grid", [(21, 3, 5), (1, 1, 1), (2, 7, 1)], ids=str)
def test_any_grid(grid: tuple[int, int, int]) -> None:
    model, latents = tiny.transformer(), tiny.forward_arguments(grid)["hidden_states"]
    plain = tiny.forward(model, hidden_states=latents)
    seen, forward = [], Forward()
    Hoist(model, ADAPTER, shuffled, forward).attach()
    model.blocks[0].register_forward_pre_hook(lambda *_: seen.append(forward.grid))
    assert distance(plain, tiny.forward(model, hidden_states=latents)) < 1e-5
    assert seen == [TokenGrid(*grid)]


def test_raster_order_is_bit_identical() -> None:
    pipe, call = tiny.build("wan")
    plain = tiny.run(pipe, call)
    (hoist,) = hoists(pipe, raster)
    assert torch.equal(plain, tiny.run(pipe, call))
    assert [order.forward for order in hoist.kept.values()] == [None], "nothing is gathered"


@pytest.mark.parametrize("site", ADAPTER.entries, ids=str)
def test_a_forgotten_entry_is_caught(site: Site) -> None:
    pipe, call = tiny.build("wan_ti2v_image")
    plain = tiny.run(pipe, call)
    hoists(pipe, shuffled, replace(ADAPTER, entries=tuple({*ADAPTER.entries} - {site})))
    assert distance(plain, tiny.run(pipe, call)) > 1e-3


def test_positional_arguments() -> None:
    model, arguments = tiny.transformer(), tiny.forward_arguments()
    names = ("hidden_states", "timestep", "encoder_hidden_states")
    positional = [arguments.pop(name) for name in names]
    with tiny.one_thread(), torch.no_grad():
        plain = model(*positional, **arguments)[0]
        Hoist(model, ADAPTER, shuffled, Forward()).attach()
        assert distance(plain, model(*positional, **arguments)[0]) < 1e-5


def test_tokens_that_do_not_match_the_grid() -> None:
    model = tiny.transformer()
    Hoist(model, ADAPTER, shuffled, Forward()).attach()
    with pytest.raises(ValueError, match=r"71 tokens.*= 72"):
        tiny.forward(model, timestep=torch.full((1, 71), 500))
    model.patch_embedding.register_forward_hook(lambda *a: a[2][..., :-1], prepend=True)
    with pytest.raises(ValueError, match=r"patch_embedding: 60 tokens.*3 x 4 x 6 = 72"):
        tiny.forward(model)


def test_latents_without_frames() -> None:
    model = tiny.transformer()
    Hoist(model, ADAPTER, shuffled, Forward()).attach()
    with pytest.raises(ValueError, match=r"expected \[batch, channels, frames, height, width\]"):
        tiny.forward(model, hidden_states=torch.zeros(1, 16, 8, 12))


def test_one_timestep_for_all_tokens_is_left_alone() -> None:
    model, timestep = tiny.transformer(), torch.full((1, 1), 500)
    plain = tiny.forward(model, timestep=timestep)
    Hoist(model, ADAPTER, shuffled, Forward()).attach()
    assert distance(plain, tiny.forward(model, timestep=timestep)) < 1e-5


def test_orders_are_kept_and_bounded() -> None:
    asked = []

    def order(grid: TokenGrid) -> tuple[Tensor, Tensor]:
        asked.append(grid)
        return shuffled(grid)

    model = tiny.transformer()
    hoist = Hoist(model, ADAPTER, order, Forward())
    hoist.attach()
    with tiny.one_thread(), torch.inference_mode():
        for width in [1, 1, *range(1, KEPT_ORDERS + 3)]:
            model(**tiny.forward_arguments((1, 1, width)))
    assert len(asked) == KEPT_ORDERS + 2
    assert len(hoist.kept) == KEPT_ORDERS
    kept = [order.forward for order in hoist.kept.values() if order.forward is not None]
    assert kept and not any(order.is_inference() for order in kept)


def test_orders_are_kept_by_grid_and_device_the_last_used_ones() -> None:
    made: list[TokenGrid] = []

    def order(grid: TokenGrid) -> tuple[Tensor, Tensor]:
        made.append(grid)
        return torch.arange(grid.tokens).flip(0), torch.arange(grid.tokens).flip(0)

    hoist = Hoist(tiny.transformer(), ADAPTER, order, Forward())
    cpu, meta = torch.device("cpu"), torch.device("meta")
    grids = [TokenGrid(1, 1, n, before=1, after=2, text_first=True) for n in range(2, 12)]
    kept = [hoist._order(grid, cpu) for grid in grids[:KEPT_ORDERS]]
    assert hoist._order(grids[0], cpu) is kept[0], "used again, so it stays longer"
    assert made == [TokenGrid(1, 1, n) for n in range(2, 2 + KEPT_ORDERS)], "of the video alone"
    assert [order.grid for order in kept] == grids[:KEPT_ORDERS]
    hoist._order(grids[KEPT_ORDERS], cpu)
    assert hoist._order(grids[0], cpu) is kept[0] and hoist._order(grids[2], cpu) is kept[2]
    assert hoist._order(grids[1], cpu) is not kept[1]
    there = hoist._order(grids[0], meta)
    assert there.forward is not None and there.inverse is not None
    assert there.forward.device == there.inverse.device == meta
    assert len(hoist.kept) == KEPT_ORDERS


def test_copying_an_accelerated_transformer_raises() -> None:
    pipe, call = tiny.build("wan")
    plain = tiny.run(pipe, call)
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    with pytest.raises(RuntimeError, match="restore_pipeline, copy"):
        copy.deepcopy(pipe.transformer)
    with pytest.raises(RuntimeError, match="restore_pipeline, copy"):
        torch.save(pipe.transformer, io.BytesIO())
    vidsparse.restore_pipeline(pipe)
    pipe.transformer = copy.deepcopy(pipe.transformer)
    assert torch.equal(plain, tiny.run(pipe, call))


def test_hooks_read_no_tensor_value() -> None:
    """Reading one would wait for the GPU in every forward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    pipe, _ = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.DENSE)
    arguments = tiny.forward_arguments()
    pipe.scheduler.set_timesteps(2)
    with tiny.one_thread(), torch.no_grad():
        pipe.transformer(**arguments)  # fills the caches
        with NoReading():
            pipe.transformer(**arguments)
            with pytest.raises(AssertionError):
                torch.ones(1).item()
    assert len(vidsparse.run_report(pipe).calls) == 4


def test_hoisted_blocks_are_those_of_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same method with tokens in raster order, permuted inside each attention call instead."""
    pipe, call = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    hoisted = tiny.run(pipe, call)
    assert "permute" not in vidsparse.run_report(pipe).seconds

    def attend_in_raster_order(*args: Any, hoisted: bool, **kwargs: Any) -> Any:
        return attend(*args, hoisted=False, **kwargs)

    monkeypatch.setattr("vidsparse.pipelines.call.attend", attend_in_raster_order)
    monkeypatch.setattr("vidsparse.pipelines.installation.token_order", lambda g, layout: raster(g))
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    assert distance(hoisted, tiny.run(pipe, call)) < 1e-5
    assert "permute" in vidsparse.run_report(pipe).seconds
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE, ["layout.name=raster"])
    assert distance(hoisted, tiny.run(pipe, call)) > 1e-3
