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
from vidsparse.benching.patterns import at, filled, named_at, search
from vidsparse.capturing import files
from vidsparse.capturing.files import About, Capture
from vidsparse.cli import app
from vidsparse.config import SparseConfig, presets
from vidsparse.grid import TokenGrid
from vidsparse.pattern.heads import CANDIDATES
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
    for candidate, (name, _) in named.items():
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


TILED = TokenGrid(6, 16, 24)
TILE = """
layout: {name: tile, tile: [2, 4, 8], inner: raster}
pattern: {name: window, tile: [2, 4, 8]}
kernel: {block_q: 64, block_k: 64}
"""
SMALL = ("1 1 1", "3 3 3", "dense")
"""Of 3 x 4 x 3 tiles of 64 tokens, a block each."""


def tiled(layer: int, swap: bool) -> Capture:
    """A head whose queries look at their own tile alone, and one that looks at all alike."""
    generator = torch.Generator().manual_seed(layer)
    t = torch.arange(TILED.tokens)
    frame, row, column = torch.unravel_index(t, (6, 16, 24))
    tile = (frame // 2) * 12 + (row // 4) * 3 + column // 8
    local = 12 * torch.nn.functional.one_hot(tile, 36).float()
    rows = torch.stack([local, torch.zeros_like(local)][:: -1 if swap else 1])
    about = About("run", "made-up", "", 0, 4, layer, LAYERS, (0, 1), asdict(TILED))
    values = torch.randn(2, TILED.tokens, 36, generator=generator)
    return Capture(about, rows, rows, values)


def sta_of(folder: Path) -> str:
    file = folder / "tiled.yaml"
    text = (Path(str(presets()["sta"]))).read_text().splitlines()
    kept = [line for line in text if not line.startswith(("layout", "pattern", "kernel"))]
    file.write_text("\n".join(kept) + TILE)
    return str(file)


def test_a_local_head_gets_a_small_window_and_a_global_one_a_large_one(tmp_path: Path) -> None:
    """Under a bound, as Sliding Tile Attention spends less on heads that need less; and it runs."""
    folder, file, preset = tmp_path / "caps", tmp_path / "plan.yaml", sta_of(tmp_path)
    folder.mkdir()
    some = [tiled(0, swap=False), tiled(1, swap=True)]
    for one in some:
        files.write(folder, one.about, one.q, one.k, one.v)
    asked = ["bench", "patterns", "--captures", str(folder), "-o", str(file), "--preset", preset]
    for name in SMALL:
        asked += ["--candidate", name]
    found = CliRunner().invoke(app, [*asked, "--bound", "0.05", "--json"])
    assert found.exit_code == 0, found.stderr
    content = json.loads(found.stdout)
    assert content["patterns"] == [["1 1 1", "dense"], ["dense", "1 1 1"]]
    assert content["density"] == pytest.approx((1 / 36 + 1) / 2, abs=1e-3)
    changes = "schedule.name=constant", "schedule.min_tokens=0", "kernel.crossover=1"
    density = f"schedule.density={content['density']}"
    config = SparseConfig.load(preset, [*changes, density, f"pattern.file={file}"])
    for layer, one in enumerate(some):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (one.q, one.k, one.v))
        context = StepContext(0, 4, layer, LAYERS)
        result = attend(q, k, v, grid=TILED, config=config, context=context)
        assert result.reason is None
        wanted = [1 / 36, 1.0] if layer == 0 else [1.0, 1 / 36]
        assert result.density == pytest.approx(wanted, abs=1e-3)
        wide = [x.double() for x in (one.q, one.k, one.v)]
        dense = torch.softmax(wide[0] @ wide[1].mT / 6, -1) @ wide[2]
        off = result.out[0].transpose(0, 1).double() - dense
        assert float(off.norm(dim=(1, 2)).div(dense.norm(dim=(1, 2))).max()) <= 0.05
    equal = search(some, 0.6, SMALL, preset=preset)
    assert {name for layer in equal.patterns for name in layer} <= {"1 1 1", "3 3 3"}
    assert equal.density == 0.6, "at equal work what costs more is left out"
    loose = search(some, 0.6, SMALL, preset=preset, bound=0.999)
    assert "dense" not in {name for layer in loose.patterns for name in layer}


def test_windows_of_a_plan_file_that_say_something_else(tmp_path: Path) -> None:
    preset, file = sta_of(tmp_path), tmp_path / "plan.yaml"
    file.write_text("heads: 2\nlayers: [[3 3, dense]]\n")
    changes = "schedule.name=constant", "schedule.min_tokens=0", "schedule.density=0.9"
    config = SparseConfig.load(preset, [*changes, f"pattern.file={file}"])
    one = tiled(0, swap=False)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (one.q, one.k, one.v))
    with pytest.raises(ValueError, match="2 patterns, each tiles of frames, rows, columns"):
        attend(q, k, v, grid=TILED, config=config)
    with pytest.raises(ValueError, match="which has windows of its own: leave one of them out"):
        SparseConfig.load("sta", ["pattern.window=[3,3,3]", f"pattern.file={file}"])
    with pytest.raises(ValueError, match=r"pattern\.name='radial' has no plan files"):
        search([one], 0.3, preset="radial")
    with pytest.raises(ValueError, match="--candidate '3 3': expected tiles of frames"):
        search([one], 0.3, ["3 3"], preset="sta")
    asked = ["bench", "patterns", "--captures", str(tmp_path), "-o", str(file), "--bound", "1.5"]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 2 and "--bound 1.5: expected" in found.stderr
