"""What the order of a family cannot carry is refused, with the argument and the cure."""

from __future__ import annotations

from typing import Any

import pytest
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
