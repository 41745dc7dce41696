"""What the order of a family cannot carry is refused, with the argument and the cure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from test_family_pipelines import run

import vidsparse
from vidsparse.pipelines.families import flux

CASES = {case.name: case for case in zoo.cases()}


def refuse(case: str, named: str, **arguments: Any) -> None:
    """The forward of a case with other arguments raises; after that, the usual one runs."""
    subject = CASES[case].build(batch=1, grid=CASES[case].grids[0])
    vidsparse.accelerate_pipeline(subject.pipe, "tiles")
    usual = subject.arguments
    subject.arguments = {**usual, **arguments}
    with vidsparse.step(1, 2), pytest.raises(ValueError, match=named):
        subject.forward()
    subject.arguments = usual
    with vidsparse.step(1, 2):
        subject.forward()


def test_hunyuan_image_without_a_second_text() -> None:
    refuse(
        "hunyuan_image refiner", "encoder_attention_mask_2", encoder_attention_mask_2=zoo.words(1)
    )


def test_wan_vace_with_a_control_of_another_size() -> None:
    shorter = zoo.noise(1, 96, 2, 12, 16)
    refuse("wan_vace", "control_hidden_states of .2, 12, 16.*black", control_hidden_states=shorter)


def test_minimax_h3_with_rows_in_another_order() -> None:
    rows = CASES["minimax_h3 frames"].build(batch=1).arguments
    positions = rows["position_ids"].clone()
    positions[[-2, -1]] = positions[[-1, -2]]
    refuse("minimax_h3 frames", "position_ids.*raster order", position_ids=positions)
    last = len(positions) - 1
    sound = torch.cat([rows["audio_indices"][:-1], torch.tensor([last])])
    refuse("minimax_h3 frames", "audio_indices", audio_indices=sound)
    text = rows["text_indices"] + 1
    refuse("minimax_h3 frames", "text_indices", text_indices=text)


@pytest.mark.parametrize("case", ["flux", "flux2"])
def test_flux_with_a_mask(case: str) -> None:
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    refuse(case, "attention_mask", joint_attention_kwargs={"attention_mask": mask})


def test_flux_out_of_raster_order() -> None:
    ids = zoo.flux.places(12, 12)
    refuse("flux", "img_ids.*12 x 12", img_ids=ids[torch.randperm(144)])


@pytest.mark.parametrize("mode", ["extract", "cached"])
def test_flux2_with_cached_keys(mode: str) -> None:
    refuse("flux2 klein kv", f"kv_cache_mode='{mode}'.*Flux2KleinPipeline", kv_cache_mode=mode)


def test_qwen_image_with_layers_of_unlike_size() -> None:
    shapes = [[(1, 6, 8), (1, 8, 6), (1, 5, 7)]]
    refuse("qwen_image layered", "img_shapes", img_shapes=shapes)


def test_flux_waits_for_its_grid_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    read, reads = flux._read, []
    monkeypatch.setattr(flux, "_read", lambda ids: reads.append(1) or read(ids))
    pipe, call = zoo.pipelines()["flux"]()
    vidsparse.accelerate_pipeline(pipe, "tiles")
    run(pipe, call)
    assert len(reads) == 1
    run(pipe, call)
    assert len(reads) == 2


def test_allegro_with_a_mask_over_the_video() -> None:
    refuse("allegro", "^attention_mask in a call", attention_mask=torch.ones(1, 3, 12, 16))


def test_kandinsky5_that_selects_blocks_by_itself() -> None:
    refuse("kandinsky5", "^sparse_params.*regular", sparse_params={"to_fractal": True})


def test_ltx2_without_the_size_of_its_video() -> None:
    refuse("ltx2", r"num_frames, height, width = \[None, 6, 8\]", num_frames=None)
