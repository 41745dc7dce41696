"""Triton's CPU interpreter as `interpreter.install` leaves it.

TRITON_INTERPRET=1 pytest tests/test_interpreter.py
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

import interpreter
import triton
import triton.language as tl

pytestmark = pytest.mark.interp


@triton.jit
def cast_and_back(p_x, p_down, p_up, N: tl.constexpr):
    o_n = tl.arange(0, N)
    b_x = tl.load(p_x + o_n)
    tl.store(p_down + o_n, b_x.to(p_down.dtype.element_ty))
    tl.store(p_up + o_n, tl.load(p_down + o_n).to(tl.float32))


@triton.jit
def dot_and_add(p_a, p_b, p_dot, p_sum, N: tl.constexpr):
    o_n = tl.arange(0, N)
    o_2 = o_n[:, None] * N + o_n[None, :]
    b_a, b_b = tl.load(p_a + o_2), tl.load(p_b + o_2)
    tl.store(p_dot + o_2, tl.dot(b_a, b_b))
    tl.store(p_sum + o_2, tl.where(b_a > b_b, b_a + b_b, b_a * b_b))


@triton.jit
def combine(p_a, p_b, p_out, OPERATION: tl.constexpr):
    o_n = tl.arange(0, 2)
    b_a, b_b = tl.load(p_a + o_n), tl.load(p_b + o_n)
    if OPERATION == "add":
        b_out = b_a + b_b
    elif OPERATION == "sub":
        b_out = b_a - b_b
    else:
        b_out = b_a * b_b
    tl.store(p_out + o_n, b_out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_interpreter_casts_like_torch(dtype: torch.dtype) -> None:
    x = torch.randn(1024) * 2.0 ** torch.randint(-12, 12, (1024,))
    x[:6] = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1.00390625, 1.01171875])
    down, up = torch.empty(1024, dtype=dtype), torch.empty(1024)
    cast_and_back[(1,)](x, down, up, N=1024)
    assert torch.equal(down.view(torch.int16), x.to(dtype).view(torch.int16))
    assert torch.equal(up.view(torch.int32), x.to(dtype).float().view(torch.int32))


def test_interpreter_computes_with_bfloat16() -> None:
    a, b = torch.randn(2, 32, 32).bfloat16()
    product, mixed = torch.empty(32, 32), torch.empty(32, 32, dtype=torch.bfloat16)
    dot_and_add[(1,)](a, b, product, mixed, N=32)
    assert (product - a.float() @ b.float()).abs().max() < 1e-5
    assert torch.equal(mixed, torch.where(a > b, a + b, a * b))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int8], ids=str)
@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
def test_integers_that_overflow_are_noticed(operation: str, dtype: torch.dtype) -> None:
    """At the bound, and one beyond it; int64 wraps around, and has nothing wider to be seen in."""
    most, least = torch.iinfo(dtype).max, torch.iinfo(dtype).min
    within = {"add": (most - 1, 1), "sub": (least + 1, 1), "mul": (least // 2, 2)}[operation]
    beyond = {"add": (most, 1), "sub": (least, 1), "mul": (least // 2, -2)}[operation]
    for pair, fits in ((within, True), (beyond, False)):
        a, b = (torch.tensor([1, value], dtype=dtype) for value in pair)
        out = torch.empty_like(a)
        try:
            combine[(1,)](a, b, out, OPERATION=operation)
        except Exception as error:
            assert not fits and f"{operation} of {str(dtype)[6:]}" in str(error)
        else:
            assert fits or dtype == torch.int64
            assert torch.equal(out, getattr(torch, operation)(a, b))


def test_interpreter_refuses_unknown_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("3.5.1", "3.10.0", "4.0.0"):
        monkeypatch.setattr(triton, "__version__", version)
        with pytest.raises(RuntimeError, match=rf"{version}.*3\.6 to 3\.9"):
            interpreter.install()
