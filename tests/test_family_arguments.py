"""Arguments that a family's token order cannot carry, and masks that it can."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from zoo import Case, allegro, kandinsky5, ltx2

import vidsparse

REFUSED: dict[str, tuple[Case, dict[str, Any], str]] = {
    "allegro": (allegro.CASES[0], {"attention_mask": torch.ones(2, 3, 12, 16)}, "attention_mask"),
    "kandinsky5": (kandinsky5.CASES[0], {"sparse_params": {"to_fractal": True}}, "sparse_params"),
    "ltx2": (ltx2.CASES[0], {"num_frames": None}, "num_frames, height, width"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_carried_is_refused(name: str) -> None:
    case, more, said = REFUSED[name]
    subject = case.build()
    subject.arguments |= more
    vidsparse.accelerate_pipeline(subject.pipe, tiny.SPARSE)
    with vidsparse.step(0, 2), pytest.raises(ValueError, match=f"^{said}.* in a call of "):
        subject.forward()


def test_a_mask_over_the_video_of_ltx2_is_dense_and_right() -> None:
    case = ltx2.CASES[0]
    subject = case.build()
    subject.arguments = ltx2.masked(subject.model, case.grids[0], 2)
    plain = subject.forward()
    vidsparse.accelerate_pipeline(subject.pipe, tiny.SPARSE)
    with vidsparse.step(1, 2):
        out = subject.forward()
    assert 0 < (plain - out).abs().max() < 2e-5, "in another order"
    assert vidsparse.run_report(subject.pipe).dense_reasons == {"masked": 2}
    subject.arguments["video_self_attention_mask"] = None
    vidsparse.restore_pipeline(subject.pipe)
    assert (plain - subject.forward()).abs().max() > 1e-3, "the mask matters"
