"""`vidsparse bench patterns`: heads get the pattern that they have; the plan runs; refusals."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from typer.testing import CliRunner

from vidsparse.attention import attend
from vidsparse.benching.patterns import CANDIDATES, at, filled, named_at, search
from vidsparse.capturing import files
from vidsparse.capturing.files import About, Capture
from vidsparse.cli import app
from vidsparse.config import SparseConfig
from vidsparse.grid import TokenGrid
from vidsparse.plan import StepContext

GRID = TokenGrid(6, 16, 24)
LAYERS, DENSITY = 2, 0.3


def waves(x: Tensor, length: int) -> Tensor:
    """[n, 32], of which two are the more alike the nearer their numbers are on a ring."""
    angle = 2 * math.pi * x[:, None] / length * torch.arange(1, 17)
    return torch.cat([angle.cos(), angle.sin()], 1)


def capture(layer: int, step: int = 0) -> Capture:
    """A head that looks along the sequence, and one that looks through all frames; in the second
    layer they have changed places."""
    generator = torch.Generator().manual_seed(10 * layer + step)
    t, frame = torch.arange(GRID.tokens).float(), GRID.height * GRID.width
    kinds = [waves(t, 2 * GRID.tokens), waves(t % frame, 2 * frame)]
    rows = torch.stack(kinds if layer == 0 else kinds[::-1]) * 3
    noise = 0.1 * torch.randn(2, *rows.shape, generator=generator)
    about = About("run", "made-up", "", step, 4, layer, LAYERS, (0, 1), asdict(GRID))
    values = torch.randn(rows.shape, generator=generator)
    return Capture(about, rows + noise[0], rows + noise[1], values)


def captures() -> list[Capture]:
    return [capture(layer, step) for layer in range(LAYERS) for step in range(2)]


def test_each_head_gets_the_pattern_that_it_has() -> None:
    seen: list[None] = []
    plan = search(captures(), DENSITY, done=lambda: seen.append(None))
    assert len(seen) == 4
    kinds = [[name.split()[0] for name in layer] for layer in plan.patterns]
    assert kinds == [["diagonal", "multi-diagonal"], ["multi-diagonal", "diagonal"]]
    assert plan.errors["plan"] < 0.7 * min(v for k, v in plan.errors.items() if k != "plan")


def test_all_candidates_cost_about_the_same_and_errors_are_those_of_the_outputs() -> None:
    one = capture(0)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (one.q, one.k, one.v))
    wide = [x.double() for x in (one.q, one.k, one.v)]
    dense = torch.softmax(wide[0] @ wide[1].mT / 32**0.5, -1) @ wide[2]
    found = search([replace(one, about=replace(one.about, layers=1))], DENSITY).errors
    named = named_at(GRID, CANDIDATES, DENSITY)
    assert len(named) == 3
    for candidate, name in named.items():
        result = attend(q, k, v, grid=GRID, config=at(candidate, DENSITY))
        assert 0.5 * DENSITY < result.density[0] <= DENSITY
        out = result.out[0].transpose(0, 1).double()
        wanted = float((out - dense).norm() / dense.norm())
        assert found[name] == pytest.approx(wanted, rel=1e-3)


def test_the_command_writes_a_plan_that_runs(tmp_path: Path) -> None:
    folder, file = tmp_path / "caps", tmp_path / "plan.yaml"
    folder.mkdir()
    for one in captures():
        files.write(folder, one.about, one.q, one.k, one.v)
    asked = ["bench", "patterns", "--captures", str(folder), "-o", str(file), "--json"]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 0, found.stderr
    content = yaml.safe_load(file.read_text())
    assert content["heads"] == 2 and content["layers"] == json.loads(found.stdout)["patterns"]
    changes = "schedule.name=constant", "schedule.min_tokens=0", "kernel.crossover=1"
    config = SparseConfig.load("vdit", [*changes, f"pattern.file={file}"])
    one = capture(1)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (one.q, one.k, one.v))
    result = attend(q, k, v, grid=GRID, config=config, context=StepContext(0, 4, 1, LAYERS))
    alone = attend(q, k, v, grid=GRID, config=at(content["layers"][1][0], 0.99))
    assert result.reason is None
    assert torch.equal(result.out[:, :, 0], alone.out[:, :, 0])


def test_candidates_that_cost_more_at_their_least_are_left_out() -> None:
    """Of 18 blocks in six frames a place has three in every one: a third."""
    grid = TokenGrid(6, 12, 16)
    assert filled(grid, "multi-diagonal", 0.3) is None
    assert set(named_at(grid, CANDIDATES, 0.3)) == {"diagonal", "diagonal + stripe 0"}
    with pytest.raises(ValueError, match=r"--density 0\.01: every candidate reads more of 6 x 12"):
        named_at(grid, CANDIDATES, 0.01)


def test_refusals(tmp_path: Path) -> None:
    some = captures()
    for given, said in (
        ([], "no captures there"),
        (some[:2], "no capture of layer 1 head 0, and 1 more"),
        ([some[0], replace(some[1], about=replace(some[1].about, layers=5))], "of unlike runs"),
    ):
        with pytest.raises(ValueError, match=said):
            search(given, DENSITY)
    with pytest.raises(ValueError, match="--candidate 'spiral': expected dense, diagonal W"):
        search(some, DENSITY, ["spiral"])
    asked = ["bench", "patterns", "--captures", str(tmp_path), "-o", str(tmp_path / "plan.yaml")]
    for wrong, said in (
        (["--density", "1.5"], "--density 1.5: expected a number between 0 and 1"),
        ([], "no captures there; make some: vidsparse capture"),
    ):
        found = CliRunner().invoke(app, [*asked, *wrong])
        assert found.exit_code == 2 and said in " ".join(found.stderr.split())
    assert not (tmp_path / "plan.yaml").exists()
