"""Layer-skip guidance on the first self-attention of every family: as on the stock transformer."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import zoo
from diffusers.hooks import HookRegistry
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from test_families import SPARSE, accelerated, distance
from zoo import Case, Subject

import vidsparse

CASES = [
    next(case for case in file.CASES if case.sparse and not case.dense)
    for file in zoo.files().values()
]
RASTER_DENSE = ("schedule.density=1.0", "layout.name=raster")


def given_back(attn: Any, *args: Any, **kwargs: Any) -> Any:
    """What a skipped attention gives: its input, as the module would return it."""
    names = list(inspect.signature(attn.forward).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given.get("encoder_hidden_states") is None:
        return given["hidden_states"]
    return given["hidden_states"], given["encoder_hidden_states"]


def skip(subject: Subject, output: Any, scores: bool) -> Any:
    """Hook the first self-attention as `apply_layer_skip` does; returns what takes it off."""
    module = subject.adapter.self_attention(subject.model)[0]
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(AttentionProcessorSkipHook(output, scores), "skip")
    return lambda: registry.remove_hook("skip")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_skipped_scores(case: Case) -> None:
    """The layer gives its values, padding included; the others go on sparse."""
    subject = case.build()
    usual = subject.forward()
    skip(subject, None, scores=True)
    plain = subject.forward()
    assert distance(usual, plain) > 1e-4
    assert torch.equal(plain, accelerated(subject, *RASTER_DENSE))
    assert distance(plain, accelerated(subject, "schedule.density=1.0")) < case.rounding
    accelerated(subject)
    calls = vidsparse.run_report(subject.pipe).calls
    assert {call.reason for call in calls if call.layer == 0} == {"layer-skip"}
    assert {call.reason for call in calls if call.layer} == {None}


def registered(case: Case) -> bool:
    """Whether diffusers says itself what a skipped attention of this family gives."""
    module = (subject := case.build()).adapter.self_attention(subject.model)[0]
    try:
        return bool(AttentionProcessorRegistry.get(type(module.processor)))
    except ValueError:
        return False


@pytest.mark.parametrize("case", [case for case in CASES if not registered(case)], ids=str)
def test_skipped_attention(case: Case) -> None:
    """The layer gives its input, video and text, and makes no call."""
    subject = case.build()
    undo = skip(subject, given_back, scores=False)
    plain = subject.forward()
    undo()
    vidsparse.accelerate_pipeline(subject.pipe, SPARSE)
    module = subject.adapter.self_attention(subject.model)[0]
    ours = AttentionProcessorRegistry.get(type(module.processor)).skip_processor_output_fn
    skip(subject, ours, scores=False)
    assert distance(plain, accelerated(subject, "schedule.density=1.0")) < case.rounding
    assert 0 not in {call.layer for call in vidsparse.run_report(subject.pipe).calls}
