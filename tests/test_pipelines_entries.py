"""Every kind of entry into the token order, on a transformer that is made for it.

What a wrapped forward gives is compared with the same transformer without us, and what its middle
sees with the same rows in the order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, RealText, Site
from vidsparse.pipelines.forward import Forward
from vidsparse.pipelines.hoist import Hoist
from vidsparse.plan import StepContext

GRID, TOKENS, WIDTH = TokenGrid(1, 2, 3), 6, 4
ORDER = torch.tensor([3, 5, 0, 4, 1, 2])


class Embed(nn.Linear):
    """Keeps what it got."""

    got: Tensor

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        self.got = hidden_states
        return super().forward(hidden_states) * scale


class Toy(nn.Module):
    """A row for each token comes in as tokens, as angles and as a place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = Embed(WIDTH, WIDTH), nn.Embedding(9, WIDTH)
        self.middle, self.last = nn.Identity(), nn.Linear(WIDTH, WIDTH)
        self.named = self.around = False

    def forward(
        self,
        hidden_states: Tensor,
        angles: Tensor | None = None,
        mask: Any = None,
        more: Any = None,
    ) -> Tensor:
        if self.named:
            x = self.embed(scale=2.0, hidden_states=hidden_states)
        else:
            x = self.embed(hidden_states, 2.0)
        if angles is not None:
            x = x * angles
        if self.place is not None and not self.around:
            x = x + self.place(torch.arange(TOKENS))
        return self.last(self.middle(x)) * (1 if more is None else more)


EMBED, PLACE = Site("output", "embed", 1), Site("output", "place", 0)
ANGLES, EXIT = Site("argument", "angles", 0), Site("input", "last", 1)


def adapter(*entries: Site, **more: Any) -> Adapter:
    return Adapter(
        pipelines=(),
        components=(),
        transformer=Toy,
        sparse=(),
        self_attention=lambda toy: [],
        grid=lambda toy, arguments: GRID,
        entries=entries,
        exit=EXIT,
        **more,
    )


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().requires_grad_(False)


def hoisted(model: Toy, *entries: Site, **more: Any) -> Hoist:
    hoist = Hoist(
        model, adapter(*entries, **more), lambda grid: (ORDER, ORDER.argsort()), Forward()
    )
    hoist.attach()
    return hoist


def inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, TOKENS, WIDTH, generator=generator)
    return x, torch.randn(TOKENS, WIDTH, generator=generator)


def middle(model: Toy, call: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The output of a forward, and what its middle got."""
    seen: list[Tensor] = []
    handle = model.middle.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out = call()
    handle.remove()
    return out, seen[0]


CALLS: dict[str, Callable[[Toy, Tensor, Tensor], Tensor]] = {
    "by position": lambda model, x, angles: model(x, angles),
    "by name": lambda model, x, angles: model(angles=angles, hidden_states=x, more=3),
    "mixed": lambda model, x, angles: model(x, more=3, angles=angles),
    "all by position": lambda model, x, angles: model(x, angles, None, 3),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("at", ["output", "input", "input by name"])
def test_all_that_comes_in_is_in_the_order_and_the_output_is_stock(at: str, call: str) -> None:
    model, (x, angles) = toy(), inputs()
    model.named = at == "input by name"
    right, raster = middle(model, lambda: CALLS[call](model, x, angles))
    hoist = hoisted(model, replace(EMBED, at=at.partition(" ")[0]), PLACE, ANGLES)
    out, seen = middle(model, lambda: CALLS[call](model, x, angles))
    assert torch.allclose(out, right, atol=1e-6)
    assert torch.allclose(seen, raster[:, ORDER], atol=1e-6)
    assert torch.equal(model.embed.got, x if at == "output" else x[:, ORDER])
    hoist.detach()
    assert torch.equal(CALLS[call](model, x, angles), right)
    modules = list(model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in modules)


def test_an_argument_that_is_not_there() -> None:
    """It is missed, unless it may be missing; then no forward is running."""
    model, (x, _) = toy(), inputs()
    right, alone = model(x), model.embed(x)
    hoist = hoisted(model, EMBED, PLACE, replace(ANGLES, optional=True))
    assert torch.allclose(model(x), right, atol=1e-6)
    assert torch.allclose(model(x, angles=None), right, atol=1e-6)
    hoist.detach()
    hoist = hoisted(model, EMBED, PLACE, ANGLES)
    for arguments in ({}, {"angles": None}):
        with pytest.raises(ValueError, match="angles is missing in a call of Toy"):
            model(x, **arguments)
        assert hoist.forward.order is None and torch.equal(model.embed(x), alone)


def test_a_submodule_that_is_not_there_or_does_not_run() -> None:
    model, (x, angles) = toy(), inputs()
    model.place = None  # type: ignore[assignment]
    right = model(x, angles)
    with pytest.raises(AttributeError, match="place"):
        hoisted(model, EMBED, PLACE, ANGLES)
    model = toy()
    model.place = None  # type: ignore[assignment]
    hoisted(model, EMBED, replace(PLACE, optional=True), ANGLES)
    assert torch.allclose(model(x, angles), right, atol=1e-6)


@pytest.mark.parametrize("optional", [True, False])
def test_an_entry_that_does_not_run_is_missed_unless_it_may(optional: bool) -> None:
    """It is there, but a forward goes around it."""
    model, (x, angles) = toy(), inputs()
    model.around = True
    right = model(x, angles)
    hoisted(model, EMBED, replace(PLACE, optional=optional), ANGLES)
    if optional:
        assert torch.allclose(model(x, angles), right, atol=1e-6)
    else:
        with pytest.raises(RuntimeError, match="hook on place did not run"):
            model(x, angles)


@pytest.mark.parametrize("at", ["output", "input"])
@pytest.mark.parametrize("once", [True, False])
def test_an_entry_that_embeds_other_rows_later(once: bool, at: str) -> None:
    """As many rows as the video has, but not its own."""
    model, (x, angles) = toy(), inputs()
    embed: Any = replace(EMBED, at=at, once=once)
    later: list[Tensor] = []
    model.middle.register_forward_hook(lambda *_: later.append(model.embed(x)))
    model(x, angles)
    hoisted(model, embed, PLACE, ANGLES)
    for _ in range(2):
        model(x, angles)
    for found in later[1:]:
        assert torch.allclose(found, later[0] if once else later[0][:, ORDER], atol=1e-6)


def test_modules_that_run_outside_of_a_forward_see_raster_order() -> None:
    for at in ("output", "input"):
        model, (x, angles) = toy(), inputs()
        alone = [model.embed(x), model.place(torch.arange(TOKENS)), model.last(x)]
        site: Any = replace(EMBED, at=at)
        hoist = hoisted(model, site, PLACE, ANGLES)
        for _ in range(2):
            found = [model.embed(x), model.place(torch.arange(TOKENS)), model.last(x)]
            assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
            model(x, angles)
        assert hoist.forward.grid is None


def test_a_hook_of_another_at_the_end_sees_raster_order() -> None:
    """Wherever it stands, ours has run before."""
    model, (x, angles) = toy(), inputs()
    alone, found = model.embed(x), []
    hoisted(model, EMBED, PLACE, ANGLES)
    model.register_forward_hook(lambda *_: found.append(model.embed(x)), prepend=True)
    model(x, angles)
    assert torch.equal(found[0], alone)


def test_a_forward_that_raises_or_leaves_the_exit_out_is_over(
    recwarn: pytest.WarningsRecorder,
) -> None:
    model, (x, angles) = toy(), inputs()
    alone, right = model.embed(x), model(x, angles)
    hoist = hoisted(model, EMBED, PLACE, ANGLES)
    handle = model.middle.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x, angles)
    handle.remove()
    assert not recwarn.list, "that the exit did not run is no fault then"
    assert hoist.forward.order is None and torch.equal(model.embed(x), alone)
    forward = model.forward
    model.forward = lambda x, angles: model.middle(model.embed(x))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="hook on last did not run"):
        model(x, angles)
    assert hoist.forward.order is None
    model.forward = forward  # type: ignore[method-assign]
    assert torch.allclose(model(x, angles), right, atol=1e-6)


def test_a_copy_that_shares_the_hooks_is_refused() -> None:
    """`copy.copy` keeps them, though they are those of the original."""
    model, (x, angles) = toy(), inputs()
    hoisted(model, EMBED, PLACE, ANGLES)
    with pytest.raises(RuntimeError, match="restore_pipeline, copy, then accelerate_pipeline"):
        copy.copy(model)(x, angles)


def test_what_a_forward_knows() -> None:
    """Position and real text are asked for when it starts; the text once for each prompt."""
    model, (x, angles) = toy(), inputs()
    asked: list[Any] = []

    def rows(*masks: Any) -> Tensor:
        asked.append(masks)
        return masks[0]

    contexts = [StepContext(n, 4) for n in range(4)]
    queue = iter(contexts)
    real = RealText(("mask", "more"), rows)
    hoist = Hoist(
        model,
        adapter(EMBED, PLACE, ANGLES, real_text=real),
        lambda grid: (ORDER, ORDER.argsort()),
        Forward(),
        lambda: next(queue),
    )
    hoist.attach()
    found: list[Any] = []
    model.middle.register_forward_hook(
        lambda *_: found.append((hoist.forward.context, hoist.forward.real_text))
    )
    mask, one = torch.tensor([[True, True, False], [True, False, False]]), torch.tensor(1)
    model(x, angles, mask, one)
    model(x, angles, mask=mask, more=one)
    assert len(asked) == 1 and asked[0][0] is mask and asked[0][1] is one
    model(x, angles, None)
    model(x, angles, mask)
    assert asked[1:] == [(mask, None)], "one of them may be enough"
    assert [context for context, _ in found] == contexts
    counts = [None if text is None else [rows.count for rows in text] for _, text in found]
    assert counts == [[2, 1], [2, 1], None, [2, 1]]
    assert hoist.forward.real_text is None


def test_a_program_that_is_exported_may_ask_for_gradients_and_knows_no_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, (x, angles) = toy(), inputs()
    right = model(x, angles)
    texts: list[Any] = []
    real = RealText(("mask",), lambda mask: mask)
    hoist = hoisted(model, EMBED, PLACE, ANGLES, real_text=real)
    model.middle.register_forward_hook(lambda *_: texts.append(hoist.forward.real_text))
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="the transformer or its input requires grad"):
        model(x, angles)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch.allclose(model(x, angles, torch.ones(2, 3) > 0), right, atol=1e-6)
    assert texts == [None]
