"""Every executor, found by its file: one contract, one place to name it."""

import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from plans import GRID

import vidsparse.kernels
from vidsparse import SparseConfig, StepContext, TokenGrid, doctor, registry, sparse_attention
from vidsparse.attention import attend
from vidsparse.decision import Choice, choose, decide
from vidsparse.kernels import reference
from vidsparse.kernels.executor import Form, Refusal
from vidsparse.pipelines.report import RunReport

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", registry.executors())
def test_what_the_facts_take_is_run_and_what_they_refuse_names_the_cure(name: str) -> None:
    """A setting that one executor knows and another does not is never ignored."""
    executor = registry.executor(name)
    assert executor.name == name and executor.about and "\n" not in executor.about
    for key in ("qk", "form"):
        every = {value for e in registry.executors().values() for value in e.takes[key]}
        for value in every:
            config = SparseConfig.load("tiles", [f"kernel.{key}={value}"])
            refusal = executor.refuses(Form(config, TokenGrid(1, 8, 8), CPU))
            if value in executor.takes[key]:
                assert refusal is None or f"kernel.{key}=" not in refusal.why
                continue
            assert f"kernel.{key}={value!r}" in refusal.why and refusal.code is None
            (cure,) = [e.name for e in registry.executors().values() if value in e.takes[key]]
            assert cure in refusal.why


@pytest.mark.parametrize("name", registry.executors())
def test_a_first_order_that_a_config_asks_for_is_refused_before_any_plan(name: str) -> None:
    executor = registry.executor(name)
    for order in ("none", "block", "global", "row"):
        config = replace(
            SparseConfig.load("tiles"), compensation=SimpleNamespace(first_order=order)
        )
        refusal = executor.refuses(Form(config, TokenGrid(1, 8, 8), CPU))
        if order in executor.executes.first_orders:
            assert refusal is None or "compensation" not in refusal.why
        else:
            assert re.fullmatch(rf"compensation.scope='{order}': .*use impl='\w+'.*", refusal.why)
            assert refusal.code is None


# a new one ---------------------------------------------------------------------------------------

MINE = """
from vidsparse.kernels import executor, reference


class Executor(executor.Executor):
    name = "mine"
    about = "a definition of mine"
    preferred = {"cpu": -1}
    executes = executor.Executes(("none", "global", "row"), rest_bias=True, head_orders=True)

    def refuses(self, form):
        if form.head_dim == 24:
            return executor.Refusal("head dim 24: mine has no kernel for it")
        return super().refuses(form)

    def crossover(self, form):
        return 0.8

    def route(self, form):
        return "by heart"

    def query_block(self, form):
        return 32

    def execute(self, q, k, v, plan, *, kernel, order=None, return_lse=False):
        return reference.execute(q, k, v, plan, return_lse=return_lse)


EXECUTOR = Executor()
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A new executor: one file in the folder of kernels, and nothing else."""
    (tmp_path / "mine.py").write_text(MINE)
    path = [*vidsparse.kernels.__path__, str(tmp_path)]
    monkeypatch.setattr(vidsparse.kernels, "__path__", path)
    registry.executors.cache_clear()
    yield
    registry.executors.cache_clear()
    sys.modules.pop("vidsparse.kernels.mine", None)


def call(depth: int = 16, **options: object):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1024, 2, depth) for _ in range(3))
    config = SparseConfig.load("tiles", ["schedule.name=constant", "schedule.density=0.7"])
    return attend(q, k, v, grid=TokenGrid(4, 16, 16), config=config, **options)


def test_a_new_executor_is_one_file(mine: None) -> None:
    """Chosen by auto and by name, in YAML too; in the report, in doctor, in errors."""
    found = call()
    assert found.choice.executor == "mine" and found.choice.route == "by heart"
    assert found.choice.crossover == 0.8 and found.choice.passed == ()
    assert found.plan.q_blocks.size == 32
    assert torch.allclose(found.out, call(impl="reference").out, atol=1e-5) is False  # other blocks
    named = SparseConfig.from_dict({"kernel": {"impl": "mine"}})
    assert decide(named, GRID, device=CPU).reason in ("too-short", "warmup-step")
    assert SparseConfig.from_dict({"kernel": {"impl": "mine"}}).kernel.impl == "mine"
    facts = json.loads(json.dumps(doctor.examine()))
    assert facts["executors"]["mine"]["about"] == "a definition of mine"
    assert {cell["executor"] for cell in facts["auto"] if cell["device"] == "cpu"} == {"mine"}
    text = doctor.report(facts)
    assert "engine mine     a definition of mine" in text and "by heart" in text
    with pytest.raises(ValueError, match=r"kernel\.impl='other': .*auto, cpu, mine, reference"):
        SparseConfig.from_dict({"kernel": {"impl": "other"}})


def test_what_a_new_executor_refuses_goes_to_the_next_one_with_the_reason(mine: None) -> None:
    why = "head dim 24: mine has no kernel for it"
    found = call(24)
    assert found.choice.executor == "cpu" and found.choice.passed == (("mine", why),)
    report = RunReport("tiles", SparseConfig.load("tiles"))
    report.add(StepContext(0, 4), found)
    assert f"not mine: {why}" in str(report)
    with pytest.raises(ValueError, match="^" + why):
        call(24, impl="mine")


# a choice ----------------------------------------------------------------------------------------


class Fixed(reference.Executor):
    """Takes or refuses what it is told."""

    def __init__(self, name: str, missing: str | None = None, refusal: Refusal | None = None):
        self.name, self.missing, self.refusal = name, missing, refusal  # type: ignore[misc]
        self.preferred = {"cpu": ord(name)}  # type: ignore[misc]

    def available(self, device: torch.device) -> str | None:
        return self.missing

    def refuses(self, form: Form) -> Refusal | None:
        return self.refusal


def chosen(monkeypatch: pytest.MonkeyPatch, *executors: Fixed) -> Choice:
    monkeypatch.setattr(registry, "executors", lambda: {e.name: e for e in executors})
    return choose(Form(SparseConfig.load("tiles"), GRID, CPU))


def test_auto_takes_the_first_that_can_and_says_why_not_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow, wide = Refusal("D 999: up to 128", "unsupported-head-dim"), Refusal("qk=int8: no")
    last, lost = Fixed("d"), Fixed("a", missing="no such package: pip install it")
    every = last, Fixed("c", refusal=wide), lost, Fixed("b", refusal=slow)
    found = chosen(monkeypatch, *every)
    assert (found.executor, found.code) == ("d", None)
    assert found.passed == (("a", lost.missing), ("b", slow.why), ("c", wide.why))
    assert str(found).startswith("d; not a: no such package: pip install it; not b: D 999")


def test_without_one_that_can_calls_are_dense_unless_a_setting_is_at_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    narrow = Refusal("D 999: up to 128", "unsupported-head-dim")
    none = chosen(monkeypatch, Fixed("a", missing="not here"))
    assert (none.executor, none.code) == ("", "no-kernel") and str(none) == "dense; not a: not here"
    assert chosen(monkeypatch).code == "no-kernel"
    found = chosen(monkeypatch, Fixed("a", missing="not here"), Fixed("b", refusal=narrow))
    assert (found.executor, found.code) == ("", "unsupported-head-dim")
    with pytest.raises(ValueError, match=r"^qk=int8: no"):
        chosen(monkeypatch, Fixed("a", refusal=narrow), Fixed("b", refusal=Refusal("qk=int8: no")))


def test_a_call_by_name_is_executed_or_refused() -> None:
    q = torch.randn(1, GRID.tokens, 1, 16)
    with pytest.raises(ValueError, match="impl='fast': allowed is auto, cpu, reference, triton"):
        sparse_attention(q, q, q, grid=GRID, config="tiles", impl="fast")
