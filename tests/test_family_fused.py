"""Projections are fused and unfused on an accelerated transformer: it goes on sparse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from test_families import SPARSE, distance
from torch import Tensor
from zoo import Case, Subject

import vidsparse
from vidsparse.pipelines.processor import SparseProcessor


def fusible(case: Case) -> bool:
    """Whether the stock transformer fuses the projections of its self-attention."""
    subject = case.build()
    fuse = getattr(subject.model, "fuse_qkv_projections", None)
    if fuse is None:
        return False
    try:
        fuse()
    except AttributeError:  # the cross-attention of Motif-Video lacks what fusing asks for
        return False
    return any(fused(module) for module in subject.adapter.self_attention(subject.model))


def fused(module: Any) -> bool:
    return bool(getattr(module, "fused_projections", False))


CASES = [case for case in zoo.cases() if fusible(case)]


def sparse(subject: Subject, case: Case) -> Tensor:
    """A forward in which no call is dense but those of the case."""
    with vidsparse.step(1, 2):
        out = subject.forward()
    report = vidsparse.run_report(subject.pipe)
    assert {call.reason for call in report.calls} <= {None, *case.dense}
    modules = subject.adapter.self_attention(subject.model)
    assert all(isinstance(module.processor, SparseProcessor) for module in modules)
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_after_accelerating(case: Case) -> None:
    subject = case.build()
    plain = subject.forward()
    vidsparse.accelerate_pipeline(subject.pipe, SPARSE)
    apart = sparse(subject, case)
    for _ in range(2):
        subject.model.fuse_qkv_projections()
        assert distance(apart, sparse(subject, case)) < case.rounding
        subject.model.unfuse_qkv_projections()
        assert torch.equal(apart, sparse(subject, case))
    vidsparse.restore_pipeline(subject.pipe)
    assert torch.equal(plain, subject.forward())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_restored_while_fused(case: Case) -> None:
    subject = case.build()
    plain = subject.forward()
    vidsparse.accelerate_pipeline(subject.pipe, SPARSE)
    subject.model.fuse_qkv_projections()
    with vidsparse.step(1, 2):
        subject.forward()
    vidsparse.restore_pipeline(subject.pipe)
    modules = subject.adapter.self_attention(subject.model)
    assert not any(isinstance(module.processor, SparseProcessor) for module in modules)
    assert distance(plain, subject.forward()) < case.rounding
    subject.model.unfuse_qkv_projections()
    assert torch.equal(plain, subject.forward())
