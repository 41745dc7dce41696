"""Projections are fused and unfused on an accelerated transformer: it goes on sparse."""

from __future__ import annotations

import pytest
import torch
import zoo
from test_families import SPARSE, distance
from torch import Tensor
from zoo import Case, Subject

import vidsparse
from vidsparse.pipelines.processor import SparseProcessor

CASES = [file.CASES[0] for file in zoo.files().values()]


@pytest.fixture(autouse=True)
def fusible(case: Case) -> None:
    """Skips what stock diffusers cannot fuse."""
    subject = case.build()
    fuse = getattr(subject.model, "fuse_qkv_projections", None)
    if fuse is None:
        pytest.skip("the stock transformer has no fuse_qkv_projections")
    try:
        fuse()
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"fuse_qkv_projections of the stock transformer fails: {error}")
    modules = subject.adapter.self_attention(subject.model)
    if not any(getattr(module, "fused_projections", False) for module in modules):
        pytest.skip("fuse_qkv_projections of the stock transformer leaves self-attention out")


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
