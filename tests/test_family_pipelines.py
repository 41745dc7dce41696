"""Whole pipelines of every family: stock, at density 1, sparse, interrupted, restored."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import tiny
import torch
import zoo
from torch import Tensor

import vidsparse
from vidsparse.accelerate import observing
from vidsparse.pipelines.observation import ObservedCall
from vidsparse.pipelines.recognition import adapter_for
from vidsparse.pipelines.report import RunReport

ROUNDING = 1e-4
"""At density 1, of the largest latent, after four steps: the order of summation."""

PIPELINES = zoo.pipelines()


def run(pipe: Any, call: dict[str, Any]) -> Tensor:
    """The latents; of a pipeline that makes a video in sections, with the last of them."""
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)  # some encode what they are given with noise of the global generator
    with tiny.one_thread():
        out = pipe(**{"output_type": "latent", **call}, generator=torch.Generator().manual_seed(0))
    first = out[0][-1] if isinstance(out[0], list) else out[0]
    assert isinstance(first, Tensor) and first.isfinite().all()
    return first


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp(min=1))


class Stop(Exception):
    """Ends a run in its middle."""


SLOW = (
    *("ltx2 i2v", "ltx2 in context", "ltx2 conditions", "ltx2 hdr", "flux2 klein"),
    *("qwen_image edit", "qwen_image edit plus", "qwen_image edit inpaint", "qwen_image layered"),
    *("wan_vace two", "wan_vace modular", "lucy_edit", "helios pyramid", "helios modular"),
    *("cosmos 2 image", "cosmos 2.5 video", "cosmos 2.5 transfer", "easyanimate inpaint"),
    *("cogvideox v2v", "cogvideox fun control", "skyreels_v2 forcing, video"),
)
"""Take long; another one of the family is quick."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in PIPELINES]
)
def test_a_pipeline(name: str) -> None:
    pipe, call = PIPELINES[name]()
    plain = run(pipe, call)

    vidsparse.accelerate_pipeline(pipe, tiny.DENSE)
    assert distance(plain, run(pipe, call)) < ROUNDING
    assert set(vidsparse.run_report(pipe).dense_reasons) == {"user"}

    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    sparse = run(pipe, call)
    assert distance(plain, sparse) > 1e-4
    check_calls(pipe, vidsparse.run_report(pipe))

    left = [len(vidsparse.run_report(pipe).calls) // 2]

    def stop(call: ObservedCall) -> None:
        left[0] -= 1
        if not left[0]:
            raise Stop

    with observing(pipe, stop), pytest.raises(Stop):
        run(pipe, call)
    assert torch.equal(sparse, run(pipe, call))
    check_calls(pipe, vidsparse.run_report(pipe))

    vidsparse.restore_pipeline(pipe)
    assert torch.equal(plain, run(pipe, call))


def check_calls(pipe: Any, report: RunReport) -> None:
    """Every step is seen, with as many calls as the others; the first is dense, and nothing else.

    Sparse calls are as sparse as asked, but for text, which is read by all. Where padding of unlike
    length is cut out, each sample of a batch is a sparse call.
    """
    steps = report.steps
    by_step = Counter(call.step for call in report.calls)
    assert set(by_step) == set(range(steps)), "a step was not counted"
    assert 1 < steps <= zoo.STEPS
    calls = {count for step, count in by_step.items() if step}
    assert len(calls) <= len(adapter_for(pipe).transformers(pipe))
    assert min(calls) >= by_step[0]
    assert report.dense_reasons == {"warmup-step": by_step[0]}
    assert report.density < 0.75
