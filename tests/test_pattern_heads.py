"""Sparse-vDiT: patterns of heads by their definitions, and plan files."""

from collections.abc import Callable
from pathlib import Path

import masked
import pytest
import torch

from vidsparse.config import SparseConfig
from vidsparse.grid import TokenGrid
from vidsparse.layout import stride
from vidsparse.plan import StepContext


def place(grid: TokenGrid, at: tuple[int, int, int]) -> int:
    return at[1] * grid.width + at[2]


def token(grid: TokenGrid, at: tuple[int, int, int]) -> int:
    return at[0] * grid.height * grid.width + place(grid, at)


RULES: dict[str, Callable[[TokenGrid], masked.Pairs]] = {
    "dense": lambda grid: lambda a, b: True,
    "diagonal 20": lambda grid: lambda a, b: abs(token(grid, a) - token(grid, b)) <= 20,
    "multi-diagonal 3": lambda grid: lambda a, b: abs(place(grid, a) - place(grid, b)) <= 3,
    "stripe 1": lambda grid: lambda a, b: b[0] == 1,
    "diagonal 0 + stripe 2": lambda grid: lambda a, b: a == b or b[0] == 2,
}


def wanted(grid: TokenGrid, config: SparseConfig, names: list[str]) -> torch.Tensor:
    return torch.stack([masked.block_map(grid, config, RULES[one](grid)) for one in names])


@pytest.mark.parametrize("impl", masked.EXECUTORS)
@pytest.mark.parametrize("grid", masked.GRIDS.values(), ids=masked.GRIDS)
def test_heads_read_their_patterns(grid: TokenGrid, impl: str) -> None:
    names = [*RULES]
    config = masked.preset(
        "vdit",
        f"pattern.patterns=[{', '.join(names)}]",
        "schedule.density=0.99",
        "kernel.block_q=16",
    )
    qkv = masked.random(grid, heads=len(names))
    maps = wanted(grid, config, names)
    result = masked.call(config, qkv, grid, impl)
    masked.close(result, masked.dense_on(qkv, grid, config, maps), impl)
    assert result.density == pytest.approx([masked.share(one, grid, config) for one in maps])
    assert len(set(result.density)) >= 4 and result.density[0] == 1


def test_a_multi_diagonal_is_in_the_band_of_the_order_through_time() -> None:
    grid, width = TokenGrid(5, 7, 9), 2
    _, places = stride.candidates(grid, ("frame",), torch.device("cpu"))
    frame = torch.arange(grid.tokens) % 63
    inside = (frame[:, None] - frame).abs() <= width
    through = (places[0][:, None] - places[0]).abs()
    assert int(through[inside].max()) == (width + 1) * grid.frames - 1


def test_widths_that_are_left_out_follow_the_budget() -> None:
    grid = TokenGrid(6, 15, 16, text_tokens=13)
    qkv = masked.random(grid)
    for density in (0.3, 0.6, 0.9):
        config = masked.preset("vdit", f"schedule.density={density}")
        found = masked.call(config, qkv, grid, "cpu")
        assert found.plan is not None and (found.plan.levels == 0).any(-1).all()
        assert 0.6 * density < sum(found.density) / 2 <= density


def plan_file(folder: Path, text: str) -> str:
    file = folder / "plan.yaml"
    file.write_text(text)
    return f"pattern.file={file}"


def test_a_plan_file_has_patterns_for_layers_and_heads(tmp_path: Path) -> None:
    grid = masked.RAGGED
    text = "heads: 2\nlayers: [[diagonal 20, dense], [stripe 1, multi-diagonal 3]]\n"
    changes = "schedule.density=0.999", "kernel.block_q=16"
    config = masked.preset("vdit", plan_file(tmp_path, text), *changes)
    assert SparseConfig.from_dict(config.to_dict()) == config
    qkv = masked.random(grid)
    for layer, names in ((0, ["diagonal 20", "dense"]), (1, ["stripe 1", "multi-diagonal 3"])):
        result = masked.call(config, qkv, grid, context=StepContext(1, 2, layer, 4))
        assert result.plan is not None
        maps = wanted(grid, config, names).expand(result.plan.levels.shape)
        assert torch.equal(result.plan.levels == 0, maps)
    with pytest.raises(ValueError, match="layer 2: the plan has 2 layers"):
        masked.call(config, qkv, grid, context=StepContext(1, 2, 2, 4))
    with pytest.raises(ValueError, match="is for 2 heads, and the model has 3"):
        masked.call(config, masked.random(grid, heads=3), grid)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layers: [[dense]]\n", "heads: a number"),
        ("heads: 2\nlayers: [[dense]]\n", "2 patterns, each dense, diagonal W"),
        ("heads: 1\nlayers: [[spiral 3]]\n", "1 patterns, each dense, diagonal W"),
        ("heads: 1\nlayers: [[diagonal]]\n", "1 patterns, each dense, diagonal W"),
        ("heads: 1\nlayers: [[stripe 9]]\n", "pattern stripe=9: allowed is a frame, 0 .. 3"),
    ],
)
def test_files_that_say_something_else(tmp_path: Path, text: str, said: str) -> None:
    config = masked.preset("vdit", plan_file(tmp_path, text), "schedule.density=0.999")
    with pytest.raises(ValueError, match=said):
        masked.call(config, masked.random(masked.RAGGED, heads=1), masked.RAGGED)


def test_refusals() -> None:
    for change, said in (
        ("pattern.patterns=[spiral]", "a list of dense, diagonal W"),
        ("pattern.patterns=[stripe]", "a list of dense, diagonal W"),
        ("pattern.patterns=[]", "a list of dense, diagonal W"),
        ("layout.name=tile", "drawn over frames as they stand"),
        ("selector.name=topk", "maps of heads beside selector.name='topk'"),
    ):
        with pytest.raises(ValueError, match=said):
            SparseConfig.load("vdit", [change])
