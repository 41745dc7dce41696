"""LTX-Video where only coordinates tell the grid, and a video is made in windows."""

from __future__ import annotations

from collections import Counter

import pytest
import tiny
import torch
from zoo import ltx

import vidsparse
from vidsparse import TokenGrid
from vidsparse.pipelines.families import ltx as family


def coordinates(times: list[int], height: int = 2, width: int = 3) -> torch.Tensor:
    axes = torch.meshgrid(
        torch.tensor(times), 32 * torch.arange(height), 32 * torch.arange(width), indexing="ij"
    )
    return torch.stack(axes).flatten(1).float()[None] / 25


@pytest.mark.parametrize(
    "times, frames, before, after",
    [
        ([0, 1, 9], 3, 0, 0),
        ([8, 16, 0, 1, 9], 3, 2, 0),
        ([8, 9, 24, 0], 1, 3, 0),
        ([0, 1, 9, 0, 1, 9, -8], 3, 0, 4),
        ([16, 24, 32], 3, 0, 0),
    ],
)
def test_the_video_among_frames(times: list[int], frames: int, before: int, after: int) -> None:
    expected = TokenGrid(frames, 2, 3, before=6 * before, after=6 * after)
    assert family.grid_of(coordinates(times)) == expected


@pytest.mark.parametrize(
    "rows", [slice(17), [*range(6), 7, 6, *range(8, 18)]], ids=["part", "order"]
)
def test_rows_that_are_no_frames_are_refused(rows: slice | list[int]) -> None:
    with pytest.raises(ValueError, match=r"video_coords of shape .* whole frames of 2 x 3"):
        family.grid_of(coordinates([0, 1, 9])[:, :, rows])


def test_sizes_are_asked_for() -> None:
    subject = ltx.CASES[0].build()
    vidsparse.accelerate_pipeline(subject.pipe, tiny.SPARSE)
    subject.arguments["height"] = None
    with (
        vidsparse.step(0, 2),
        pytest.raises(ValueError, match=r"num_frames, height, width = \[3, None, 8\] .* video_coo"),
    ):
        subject.forward()


def test_one_wait_for_the_coordinates_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    grid_of = family.grid_of
    monkeypatch.setattr(family, "grid_of", lambda rows: asked.append(1) or grid_of(rows))
    pipe, call = ltx.PIPELINES["ltx condition"]()
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    tiny.run(pipe, call)
    assert len(asked) == 1


def test_windows_of_many_prompts() -> None:
    """Each window is a run; the pipeline leaves its last step out."""
    pipe, call = ltx.long_multi_prompt()
    pipe.set_progress_bar_config(disable=True)
    plain = tiny.run(pipe, call)
    vidsparse.accelerate_pipeline(pipe, tiny.DENSE)
    assert (plain - tiny.run(pipe, call)).abs().max() < 1e-4
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    assert (plain - tiny.run(pipe, call)).abs().max() > 1e-4
    report = vidsparse.run_report(pipe)
    assert Counter(call.step for call in report.calls) == dict.fromkeys(range(tiny.STEPS), 2)
    assert report.dense_reasons == {"warmup-step": 2} and report.density < 0.75
    vidsparse.restore_pipeline(pipe)
    assert torch.equal(plain, tiny.run(pipe, call))
