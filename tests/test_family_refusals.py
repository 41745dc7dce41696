"""What the order of a family cannot carry is refused, with the argument and the cure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo

import vidsparse

CASES = {case.name: case for case in zoo.cases()}


def refuse(case: str, named: str, **arguments: Any) -> None:
    """The forward of a case with other arguments raises; after that, the usual one runs."""
    subject = CASES[case].build(batch=1, grid=CASES[case].grids[0])
    vidsparse.accelerate_pipeline(subject.pipe, "balanced")
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
