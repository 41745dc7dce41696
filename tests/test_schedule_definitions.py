"""Schedules against their definitions: which steps and layers are dense, how a ramp falls."""

import math
import random
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vidsparse import registry
from vidsparse.plan import StepContext

SHARE_OR_COUNT = st.integers(0, 30) | st.integers(0, 99).map(lambda n: n / 100)
LAYERS = st.integers(1, 6)
PLACES = st.lists(st.integers(-8, 8), max_size=3)


def whole(value, steps):
    """Steps that a count or a share means; a share is rounded up."""
    if isinstance(value, float):
        return math.ceil(Fraction(round(100 * value), 100) * steps)
    return min(value, steps)


def density_at(name, step, steps, layer, layers, **values):
    method = registry.method("schedule", name)
    context = StepContext(step, steps, layer, layers)
    return method.density_at(context, method.Params(**values))


@pytest.mark.parametrize("name", ["warmup", "ramp"])
@given(
    steps=st.integers(1, 60),
    first=SHARE_OR_COUNT,
    last=SHARE_OR_COUNT,
    layers=LAYERS,
    places=PLACES,
    density=st.sampled_from([0.01, 0.25, 0.999]),
)
@settings(max_examples=80, deadline=None)
def test_dense_steps_and_layers(name, steps, first, last, layers, places, density):
    values = {
        "density": density,
        "dense_steps": first,
        "last_dense_steps": last,
        "dense_layers": tuple(places),
    }
    dense_layers = {range(layers)[place % layers] for place in places}
    begin, end = whole(first, steps), steps - whole(last, steps)
    for step in range(steps):
        for layer in range(layers):
            found, reason = density_at(name, step, steps, layer, layers, **values)
            if step < begin or step >= end:
                assert (found, reason) == (1.0, "warmup-step")
            elif layer in dense_layers:
                assert (found, reason) == (1.0, "dense-layer")
            else:
                assert 0 < found <= 1 and reason == (None if found < 1 else "warmup-step")
                assert name == "ramp" or found == density


@given(
    steps=st.integers(1, 60),
    first=st.integers(0, 30),
    start=st.sampled_from([0.01, 0.5, 1.0]),
    final=st.sampled_from([0.01, 0.3, 0.99]),
    shape=st.sampled_from(["linear", "cosine"]),
    by_layer=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_a_ramp_goes_from_start_to_density_over_the_steps_that_are_not_dense(
    steps, first, start, final, shape, by_layer
):
    assume(first < steps)
    values = {"start": start, "shape": shape, "dense_steps": first, "dense_layers": ()}
    finals = [final, 0.5, 0.125] if by_layer else [final] * 3
    values |= {"density": 0.7, "layer_density": tuple(finals)} if by_layer else {"density": final}
    for layer, aim in enumerate(finals):
        for step in range(first, steps):
            part = (step - first) / (steps - 1 - first) if steps - 1 > first else 0.0
            if shape == "cosine":
                wanted = aim + (start - aim) * (1 + math.cos(math.pi * part)) / 2
            else:
                wanted = start + (aim - start) * part
            found, reason = density_at("ramp", step, steps, layer, 3, **values)
            assert found == pytest.approx(wanted, abs=1e-12)
            assert reason == (None if wanted < 1 else "warmup-step")


@pytest.mark.parametrize("name", registry.methods("schedule"))
def test_without_a_step_the_density_is_the_steady_one(name):
    method = registry.method("schedule", name)
    for density in (0.01, 0.5, math.nextafter(1, 0)):
        assert method.density_at(None, method.Params(density=density)) == (density, None)
    assert method.density_at(None, method.Params(density=1.0)) == (1.0, "user")


def test_a_constant_knows_no_steps():
    for step, layer in ((0, 0), (3, 1), (9, 5)):
        assert density_at("constant", step, 10, layer, 6, density=0.3) == (0.3, None)
        assert density_at("constant", step, 10, layer, 6, density=1.0) == (1.0, "user")


@pytest.mark.parametrize("name", registry.methods("schedule"))
@given(
    steps=st.integers(1, 20),
    first=st.integers(0, 5),
    density=st.sampled_from([0.25, 1.0]),
    start=st.sampled_from([0.5, 1.0]),
    by_layer=st.sampled_from([(), (0.5, 1.0), (1.0, 1.0)]),
)
@settings(max_examples=60, deadline=None)
def test_the_steps_that_are_told_are_those_in_which_every_layer_is_dense(
    name, steps, first, density, start, by_layer
):
    method = registry.method("schedule", name)
    values = {"density": density}
    if name != "constant":
        values |= {"dense_steps": first, "dense_layers": ()}
    if name == "ramp":
        values |= {"start": start, "layer_density": by_layer}
    if name == "table":
        values |= {"levels": (0.5, 1.0), "groups": ("01 11", "11 11", "00 11")}
    params = method.Params(**values)
    layers = len(by_layer) or 2
    wanted = [
        step
        for step in range(steps)
        if all(
            method.density_at(StepContext(step, steps, layer, layers), params)[1]
            for layer in range(layers)
        )
    ]
    assert params.dense_in(steps) == wanted


@given(
    steps=st.integers(1, 40),
    first=st.integers(0, 20),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_a_table_gives_each_group_layer_and_head_its_density(steps, first, sizes, seed):
    groups, layers, heads = sizes
    levels = (0.1, 0.25, 1.0)
    digits = random.Random(seed).choices("012", k=groups * layers * heads)
    of = iter(digits)
    table = [[[next(of) for _ in range(heads)] for _ in range(layers)] for _ in range(groups)]
    texts = [" ".join("".join(word) for word in group) for group in table]
    method = registry.method("schedule", "table")
    params = method.Params(levels=levels, groups=tuple(texts), dense_steps=first, dense_layers=())
    sparse = [*range(first, steps)]
    for place, step in enumerate(sparse):
        for layer in range(layers):
            at = StepContext(step, steps, layer, layers)
            group = math.floor(Fraction(place * groups, len(sparse)))
            wanted = [levels[int(digit)] for digit in table[group][layer]]
            assert method.head_densities(at, params) == tuple(wanted)
            density, reason = method.density_at(at, params)
            assert density == pytest.approx(sum(wanted) / heads)
            assert reason == ("dense-layer" if set(wanted) == {1.0} else None)
    assert method.head_densities(None, params) is None
    assert method.density_at(None, params) == (params.density, None)
