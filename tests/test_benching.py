"""`vidsparse bench methods`: figures of a head by other means, equal work, files, refusals."""

import csv
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vidsparse.attention import attend
from vidsparse.benching import methods, results
from vidsparse.benching.methods import ORACLE, RANDOM, Head, Row, at_density, measured
from vidsparse.benching.synthetic import field
from vidsparse.cli import app
from vidsparse.config import SparseConfig, presets
from vidsparse.grid import TokenGrid

GRID = TokenGrid(3, 16, 20)
HEAD = Head("rank 4", "seed 0", GRID, *field(GRID, 4, 32, 0))
NAMES = ("tiles", "balanced")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    torch.set_num_threads(1)
    configs = {name: SparseConfig.load(name) for name in NAMES}
    return [*measured([HEAD], configs, (0.2, 0.5))]


def test_figures_are_those_of_the_attention_matrix(rows: list[Row]) -> None:
    q, k, v = (x.double() for x in (HEAD.q, HEAD.k, HEAD.v))
    weight = torch.softmax(q @ k.T / 32**0.5, -1)
    for name in NAMES:
        config = at_density(SparseConfig.load(name), 0.2)
        args = (x[None, :, None] for x in (HEAD.q, HEAD.k, HEAD.v))
        result = attend(*args, grid=GRID, config=config)
        (row,) = [row for row in rows if (row.method, row.asked) == (name, 0.2)]
        error = (result.out[0, :, 0].double() - weight @ v).norm() / (weight @ v).norm()
        assert row.error == pytest.approx(float(error), rel=1e-3)
        plan = result.plan
        assert plan is not None and row.density == pytest.approx(float(plan.density))
        if plan.order_q is None:
            from vidsparse.geometry import token_order

            order_q = order_k = token_order(GRID, config.layout)[0]
        else:
            assert plan.order_k is not None
            order_q, order_k = plan.order_q[0, 0], plan.order_k[0, 0]
        listed = (plan.levels[0, 0] == 0)[plan.q_blocks.owner][:, plan.k_blocks.owner]
        recall = (weight[order_q][:, order_k] * listed).sum(1).mean()
        assert row.recall == pytest.approx(float(recall), rel=1e-4)
        assert row.recall <= row.best + 1e-6 and 0 < row.planning < row.seconds


def test_all_pay_the_density_that_was_asked_for(rows: list[Row]) -> None:
    assert {row.method for row in rows} == {*NAMES, ORACLE, RANDOM}
    for row in rows:
        assert row.density == pytest.approx(row.asked, abs=1 / 15 + 0.01), "of 15 key blocks"
    error = {(row.method, row.asked): row.error for row in rows}
    assert error["balanced", 0.2] < 0.6 * error["tiles", 0.2]
    assert error["oracle", 0.2] < 0.9 * min(error["tiles", 0.2], error["random", 0.2])
    (best,) = [row for row in rows if (row.method, row.asked) == (ORACLE, 0.5)]
    assert best.recall == pytest.approx(best.best, rel=0.05)


@pytest.mark.parametrize("preset", presets())
def test_every_preset_can_be_measured(preset: str) -> None:
    found = measured([HEAD], {preset: SparseConfig.load(preset)}, (0.3,))
    (row,) = [row for row in found if row.method == preset]
    config = SparseConfig.load(preset)
    if config.pattern.name != "none":  # of three frames, and heads that look everywhere
        assert 0 < row.error < 1.3 and 0 < row.density <= 1
        return
    exact = config.estimator.name == "alike"  # of this field no block is: all are exact, unasked
    drops = config.compensation.name == "none"  # of values that sum to little, which may be worse
    assert 0 < row.error < (1.5 if drops else 1) and 0 < row.density <= (1 if exact else 0.45)


def test_fields_are_smooth_and_of_the_rank() -> None:
    for rank in (4, 32):
        q, _, v = field(GRID, rank, 64, 1)
        values = torch.linalg.svdvals(q)
        assert values[rank - 1] > 0.05 * values[0] and (values[rank:] < 1e-4 * values[0]).all()
        video = v.view(3, 16, 20, 64)
        apart = (video[:, :-1] - video[:, 1:]).square().mean()
        assert apart < 0.5 * 2 * v.var(), "neighbours are more alike than two of them by chance"
    assert torch.equal(field(GRID, 4, 64, 1)[0], field(GRID, 4, 64, 1)[0])


def test_table_and_files(rows: list[Row], tmp_path: Path) -> None:
    text = results.table(rows)
    assert text.splitlines()[0] == "rank 4, 1 heads: error at density"
    assert next(line.split()[0] for line in text.splitlines()[2:]) == "balanced"
    results.write_csv(tmp_path / "m.csv", rows)
    with (tmp_path / "m.csv").open() as file:
        read = [*csv.DictReader(file)]
    assert len(read) == len(rows) and float(read[0]["error"]) == pytest.approx(rows[0].error, 1e-4)
    line = next(one for one in results.summary(rows) if one["method"] == "balanced")
    assert line["heads"] == 1 and line["worst"] == pytest.approx(line["error"])
    assert results.plot(tmp_path / "m.png", rows).stat().st_size > 5000


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidsparse.benching.command._heads", lambda captures: [HEAD])
    asked = ["bench", "methods", "-o", str(tmp_path / "out"), "--preset", "balanced"]
    found = CliRunner().invoke(app, [*asked, "--density", "0.3", "--json"])
    assert found.exit_code == 0, found.stderr
    assert {row["method"] for row in json.loads(found.stdout)} == {"balanced", ORACLE, RANDOM}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["methods.csv", "methods.png"]
    for wrong, said in (
        (["--density", "1.5"], "--density 1.5: expected a number between 0 and 1"),
        (["--preset", "nope"], "no such preset"),
        (["--preset", "balanced"], "--preset balanced, balanced: expected presets of unlike names"),
    ):
        found = CliRunner().invoke(app, [*asked, *wrong])
        assert found.exit_code == 2 and said in found.stderr


def test_a_folder_without_captures_is_refused(tmp_path: Path) -> None:
    asked = ["bench", "methods", "-o", str(tmp_path / "out"), "--captures", str(tmp_path)]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 2 and "make some: vidsparse capture" in found.stderr
    assert methods.BASE in presets()


def test_a_preset_that_cannot_be_at_a_density_has_no_row_there_and_is_named() -> None:
    said: list[tuple[str, float, str]] = []
    wide = SparseConfig.load("sta", ["pattern.tile=[3,4,4]", "pattern.window=[1,3,3]"])
    rows = [*measured([HEAD], {"sta": wide}, (0.05, 0.95), lambda *why: said.append(why))]
    assert [row.asked for row in rows if row.method == "sta"] == [0.95]
    ((name, density, why),) = said
    assert (name, density) == ("sta", 0.05) and "schedule.density" in why


def test_a_picture_names_the_best_of_many_and_like_ones_once() -> None:
    def row(method: str, asked: float, density: float, error: float) -> Row:
        return Row("demo", "head", method, asked, density, error, 0.5, 0.5, 0.1, 0.2)

    errors = {"a": 0.3, "b": 0.1, "twin": 0.1, **{f"m{n}": 1.0 + n for n in range(9)}}
    rows = [row(m, at, at, e / at) for m, e in errors.items() for at in (0.1, 0.2)]
    rows += [row("greedy", at, 0.9, 1e-6) for at in (0.1, 0.2)]  # reads all: not at equal work
    found = results.named(rows)
    assert found["b"] == "b, twin" and found["twin"] == "" and found["a"] == "a"
    assert "greedy" not in found and "m8" not in found
    assert sum(bool(name) for name in found.values()) == results.MOST_NAMES + 2


def test_an_output_that_is_not_finite_is_no_small_error_and_few_methods_have_names() -> None:
    def row(method: str, head: str, error: float) -> Row:
        return Row("demo", head, method, 0.1, 0.05, error, 0.5, 0.5, 0.1, 0.2)

    rows = [row("bad", "0", 0.1), row("bad", "1", float("nan")), row("good", "0", 0.2)]
    assert results.mean_error([rows[2], row("good", "1", 0.0)]) == pytest.approx((0.2e-9) ** 0.5)
    worst = {one["method"]: one["worst"] for one in results.summary(rows)}
    assert worst["good"] == 0.2 and worst["bad"] != worst["bad"]
    lines = results.table(rows).splitlines()
    assert lines[2].startswith("good") and lines[3].startswith("bad") and "nan" in lines[3]
    assert {"bad", "good"} <= {*results.named(rows).values()}
