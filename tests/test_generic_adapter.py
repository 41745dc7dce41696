"""The generic adapter: the same attention as a family's own file, for models that have none."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

import vidsparse
from vidsparse import TokenGrid, generic_adapter

CASES = {case.name: case for case in zoo.cases()}
SPARSE: dict[str, Any] = {
    "layout": {"name": "tile", "tile": [2, 2, 4]},
    "selector": {"name": "topk"},
    "compensation": {"name": "none"},
    "schedule": {"name": "constant", "density": 0.4, "min_tokens": 0},
    "kernel": {"block_q": 16, "block_k": 16, "impl": "reference"},
}


def generic(pipe: Any, **known: Any) -> Any:
    with pytest.warns(RuntimeWarning, match="Not known: whether the model treats some frames"):
        return generic_adapter(pipe, **known)


def out(subject: zoo.Subject, adapter: Any = None, *overrides: str) -> Tensor:
    vidsparse.accelerate_pipeline(subject.pipe, SPARSE, overrides, adapter=adapter)
    with vidsparse.step(1, 2):
        return subject.forward()


@pytest.mark.parametrize(
    "name, known",
    [("wan", {}), ("wan token times", {}), ("cogvideox", {"text": "first"})],
)
def test_what_the_family_computes(name: str, known: dict[str, Any]) -> None:
    """Hoisted or permuted in each call is the same method, so only rounding differs."""
    subject = CASES[name].build()
    plain = subject.forward()
    own = out(subject)
    calls = vidsparse.run_report(subject.pipe).calls
    adapter = generic(subject.pipe, **known)
    assert float((own - out(subject, adapter)).abs().max()) < 2e-5
    report = vidsparse.run_report(subject.pipe)
    assert [call.density for call in report.calls] == [call.density for call in calls]
    assert not report.dense_reasons
    assert torch.equal(plain, out(subject, adapter, "schedule.density=1.0"))
    vidsparse.restore_pipeline(subject.pipe)
    assert torch.equal(plain, subject.forward())


def test_masked_calls_are_dense_and_say_so() -> None:
    subject = CASES["hunyuan_video"].build()
    plain = subject.forward()
    adapter = generic(subject.pipe, text="last")
    assert torch.equal(plain, out(subject, adapter))
    assert set(vidsparse.run_report(subject.pipe).dense_reasons) == {"masked"}


def test_rows_that_nobody_has_explained() -> None:
    subject = CASES["cogvideox"].build()
    with pytest.raises(ValueError, match=r'160 rows, of which 144 are video.*text="first"'):
        out(subject, generic(subject.pipe))


def test_a_grid_that_the_arguments_do_not_show() -> None:
    subject = CASES["cogvideox"].build()
    subject.model.register_to_config(in_channels=5)
    with pytest.raises(ValueError, match=r"in_channels=5 and patch_size=2 does not show.*grid="):
        out(subject, generic(subject.pipe, text="first"))
    given = generic(subject.pipe, text="first", grid=lambda model, arguments: TokenGrid(3, 6, 8))
    assert out(subject, given).isfinite().all()


def test_by_name_and_what_is_no_adapter() -> None:
    subject = CASES["wan"].build()
    with pytest.warns(RuntimeWarning, match="generic adapter takes WanAttnProcessor of Wan"):
        out(subject, "generic")
    with pytest.raises(TypeError, match=r"adapter='wan': expected an Adapter, \"generic\", or"):
        out(subject, "wan")
    other = CASES["cogvideox"].build().adapter
    with pytest.raises(ValueError, match="holds no CogVideoXTransformer3DModel as transformer"):
        out(subject, other)
    subject.pipe.transformer = None
    with pytest.raises(ValueError, match="has no transformer or transformer_2"):
        generic_adapter(subject.pipe)


def test_a_known_family_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        out(CASES["wan"].build())
