"""Wrappers and hooks of others whose work depends on where a token stands: what stock gives.

They mix tokens (a roll, a sum over all tokens before), so a token order that reached them would
show. They sit on every module that we hook, and on the transformer, put on before us or after.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import vidsparse
from vidsparse.pipelines.families.wan import ADAPTER

TOKENS = 72
TIMES = 10 * torch.arange(TOKENS)[None]
HOOKED = tuple(site.name for site in (*ADAPTER.entries, ADAPTER.exit))


def token_axis(x: object) -> int | None:
    """Of [B, C, *grid] (the axis after flattening), [.., tokens, ..]; None without tokens."""
    if not isinstance(x, Tensor):
        return None
    if tuple(x.shape[2:]) == tiny.GRID:
        return 2
    return next((axis for axis in (1, 0) if x.ndim > axis and x.shape[axis] == TOKENS), None)


def rolled(x: Tensor, axis: int) -> Tensor:
    return x.roll(5, axis)


def summed(x: Tensor, axis: int) -> Tensor:
    """Each token plus the mean of those before it."""
    shape = [1] * x.ndim
    shape[axis] = -1
    count = torch.arange(1, x.shape[axis] + 1).view(shape)
    return (x + x.cumsum(axis) / count).to(x.dtype)


def scaled(x: Tensor, axis: int) -> Tensor:
    shape = [1] * x.ndim
    shape[axis] = -1
    return (x * torch.linspace(0.5, 1.5, x.shape[axis]).view(shape)).to(x.dtype)


MIXES: tuple[Callable[[Tensor, int], Tensor], ...] = (rolled, summed, scaled)


def mixed(mix: Callable[[Tensor, int], Tensor], values: Any) -> Any:
    """The mix of whatever has tokens, in a tensor, a tuple or a dict."""
    if isinstance(values, dict):
        return {name: mixed(mix, value) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(mixed(mix, value) for value in values)
    axis = token_axis(values)
    if axis is None:
        return values
    return mix(values.flatten(axis) if axis == 2 else values, axis).view(values.shape)


class Mixed(nn.Module):
    """A module between two mixes."""

    def __init__(self, inner: nn.Module, mix: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.inner, self.mix = inner, mix

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*mixed(self.mix, args), **mixed(self.mix, kwargs))
        return mixed(self.mix, out)


def put_on(pipe: Any, name: str, kind: str, mix: Callable[[Tensor, int], Tensor]) -> None:
    """What another tool does to a module; "" is the transformer, which cannot be replaced."""
    module = pipe.transformer.get_submodule(name)
    if kind == "wrapper" and name:
        pipe.transformer.set_submodule(name, Mixed(module, mix))
    elif kind in ("wrapper", "forward"):
        inner = module.forward

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return mixed(mix, inner(*mixed(mix, args), **mixed(mix, kwargs)))

        module.forward = forward
    else:
        first = kind.endswith("first")
        module.register_forward_hook(lambda m, args, out: mixed(mix, out), prepend=first)
        module.register_forward_pre_hook(
            lambda m, args, kwargs: (mixed(mix, args), mixed(mix, kwargs)),
            with_kwargs=True,
            prepend=first,
        )


KINDS = ("wrapper", "forward", "hook", "hook first")


def outputs(pipes: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
    """Of a stock pipeline and an accelerated one, with a timestep for each token."""
    right = tiny.forward(pipes[0].transformer, timestep=TIMES)
    with vidsparse.step(1, 2):
        return right, tiny.forward(pipes[1].transformer, timestep=TIMES)


def check(pipes: tuple[Any, Any], what: object) -> Tensor:
    right, out = outputs(pipes)
    bound = 2e-5 * max(1.0, float(right.abs().max()))
    assert float((right - out).abs().max()) <= bound, what
    return right


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["", *HOOKED])
def test_each_place(name: str, kind: str) -> None:
    """Before accelerating, and one more after it; each has an effect."""
    pipes = tiny.build("wan")[0], tiny.build("wan")[0]
    plain = tiny.forward(pipes[0].transformer, timestep=TIMES)
    for pipe in pipes:
        put_on(pipe, name, kind, rolled)
    vidsparse.accelerate_pipeline(pipes[1], tiny.DENSE)
    before = check(pipes, "before")
    for pipe in pipes:
        put_on(pipe, name, kind, summed)
    after = check(pipes, "after")
    assert float((plain - before).abs().max()) > 1e-3 < float((before - after).abs().max())
    vidsparse.restore_pipeline(pipes[1])
    assert torch.equal(*outputs(pipes))


@pytest.mark.parametrize("seed", range(4))
def test_many_at_once(seed: int) -> None:
    draw, pipes = random.Random(seed), (tiny.build("wan")[0], tiny.build("wan")[0])
    acts: list[Any] = []
    for moment in range(8):
        if moment in (2, 5):
            vidsparse.accelerate_pipeline(pipes[1], tiny.DENSE)
        acts.append((draw.choice(["", *HOOKED]), draw.choice(KINDS), draw.choice(MIXES)))
        for pipe in pipes:
            put_on(pipe, *acts[-1])
        if moment >= 2:
            check(pipes, acts)
    vidsparse.restore_pipeline(pipes[1])
    assert torch.equal(*outputs(pipes))
