"""Densities of each head: the plan is that of every head alone, and wrong tables are refused."""

from dataclasses import replace

import pytest
import torch

import vidsparse
from vidsparse import SparseConfig, StepContext, TokenGrid, registry

GRID = TokenGrid(5, 9, 11, text_tokens=7)
LEVELS = (0.1, 0.3, 1.0)
SELECTORS = {name: [name] for name in registry.methods("selector") if name != "static"} | {
    "greedy of errors": ["greedy", "estimator.name=ear"],
    "pyramid with caps": [
        *("pyramid", "selector.mode=mass", "selector.levels=[0,1]", "selector.mass=[0.3,0.9]"),
        *("estimator.name=sampled", "estimator.share=1", "estimator.similarity=[0.1]"),
    ],
    "topp of what is alike": ["topp", "estimator.name=alike", "estimator.least=0.05"],
}


def table(groups, **more):
    schedule = {"name": "table", "levels": list(LEVELS), "groups": groups, "dense_steps": 0}
    schedule |= {"dense_layers": [], "min_tokens": 0, **more}
    return SparseConfig.from_dict({"schedule": schedule, "kernel": {"crossover": 1}})


def operands(heads, batch=2):
    generator = torch.Generator().manual_seed(3)
    shape = batch, GRID.tokens, heads, 32
    return [torch.randn(shape, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("selector", SELECTORS)
def test_each_head_is_planned_as_if_it_were_alone(selector):
    q, k, v = operands(3)
    name, *others = SELECTORS[selector]
    config = table(["021", "102"]).override(f"selector.name={name}", *others)
    at = StepContext(7, 10)
    out, plan = vidsparse.sparse_attention(
        q, k, v, grid=GRID, config=config, context=at, return_plan=True
    )
    for head, digit in enumerate("102"):
        alone = config.override("schedule.name=constant", f"schedule.density={LEVELS[int(digit)]}")
        if LEVELS[int(digit)] == 1:  # would not be planned, and a dense head of a plan reads all
            assert bool((plan.levels[:, head] == 0).all())
            continue
        one = [x[:, :, head : head + 1] for x in (q, k, v)]
        wanted, single = vidsparse.sparse_attention(*one, grid=GRID, config=alone, return_plan=True)
        assert torch.equal(single.levels[:, 0], plan.levels[:, head])
        torch.testing.assert_close(out[:, :, head : head + 1], wanted)


def test_a_layer_of_dense_heads_is_a_dense_call():
    q, k, v = operands(2)
    config = table(["22", "02"])
    attend = dict(grid=GRID, config=config, return_plan=True)
    _, plan = vidsparse.sparse_attention(q, k, v, **attend, context=StepContext(0, 4))
    assert plan is None
    _, plan = vidsparse.sparse_attention(q, k, v, **attend, context=StepContext(2, 4))
    density = plan.density.mean(0)
    assert density[1] == 1 and density[0] < 0.2


def test_tables_of_other_models_are_refused():
    q, k, v = operands(2)
    with pytest.raises(ValueError, match=r"heads of schedule.groups=3.*2, the heads of the model"):
        vidsparse.sparse_attention(
            q, k, v, grid=GRID, config=table(["010"]), context=StepContext(0, 4)
        )
    with pytest.raises(ValueError, match=r"layers of schedule.groups=1.*4, the layers"):
        vidsparse.sparse_attention(
            q, k, v, grid=GRID, config=table(["01"]), context=StepContext(0, 4, 0, 4)
        )


def test_a_pattern_has_one_size_for_all_heads():
    changes = "selector.name=static", "pattern.name=window"
    with pytest.raises(ValueError, match=r"schedule\.name='table': a pattern has one size"):
        table(["01"]).override(*changes)


def test_outside_a_run_all_heads_have_one_density():
    q, k, v = operands(2)
    config = table(["01"], density=0.3)
    _, plan = vidsparse.sparse_attention(q, k, v, grid=GRID, config=config, return_plan=True)
    once = registry.method("schedule", "constant").Params(density=0.3, min_tokens=0)
    plain = replace(config, schedule=once)
    _, wanted = vidsparse.sparse_attention(q, k, v, grid=GRID, config=plain, return_plan=True)
    assert torch.equal(plan.levels, wanted.levels)
