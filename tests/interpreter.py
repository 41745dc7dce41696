"""Makes bfloat16 honest in Triton's CPU interpreter, for tests of kernels without a GPU.

The interpreter keeps bfloat16 as uint16 and, without an error, multiplies, adds and compares those
bits, and truncates float32 to bfloat16. `install` replaces four methods of its builder: casts then
equal torch's bit for bit, products and element-wise operations are computed in float32. Reductions
of bfloat16 stay wrong: a kernel casts to float32 before it reduces.

It also patches the language once for a launch, not again at every call of a function inside, makes
each type once, and notices integers that overflow, which the interpreter computes and drops.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

TESTED = ((3, 6), (3, 9))
"""First and last minor version whose private interpreter interface this file fits."""

TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}


def install() -> None:
    """Patch the interpreter of this process; a second call does nothing.

    Raises RuntimeError for a version of Triton that this file was not tested with, and if the
    interpreter is not on.
    """
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not TESTED[0] <= version <= TESTED[1]:
        raise RuntimeError(
            f"triton {triton.__version__}: the interpreter patch fits 3.6 to 3.9; "
            "check tests/interpreter.py against triton/runtime/interpreter.py"
        )
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "honest_bfloat16", False):
        return
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(builder, name, _cast(getattr(builder, name)))
    for name in ("create_fp_ext", "create_fp_trunc", "create_si_to_fp", "create_fp_to_si"):
        setattr(builder, name, lambda self, src, dst: self.cast_impl(src, dst))
    builder.create_dot = _dot(builder.create_dot)
    builder.binary_op = _binary(builder.binary_op)
    interpreter._patch_lang = _once_in_a_launch(interpreter._patch_lang)
    interpreter._get_np_dtype = _once_for_a_type(interpreter._get_np_dtype)
    _once(tl.block_type, lambda element_ty, shape: (element_ty.name, *map(_value, shape)))
    _once(tl.tensor, lambda handle, type: type.name, handle=0)
    semantic = type(interpreter.interpreter_semantic)
    semantic.binary_op_sanitize_overflow_impl = _assert_in_range
    builder.honest_bfloat16 = True
    if version == (3, 6):
        _accept_loaded_loop_bounds()


def _to_torch(handle: Any) -> torch.Tensor:
    data = np.array(handle.data)
    if handle.dtype.scalar == tl.bfloat16:
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(data)


def _handle(values: torch.Tensor, dtype: Any) -> Any:
    if dtype == tl.bfloat16:
        data = values.contiguous().view(torch.int16).numpy().view(np.uint16)
    else:
        data = values.numpy()
    return interpreter.TensorHandle(data, dtype)


def _float32(handle: Any) -> Any:
    return interpreter.TensorHandle(_to_torch(handle).float().numpy(), tl.float32)


def _cast(original: Any) -> Any:
    def cast(self: Any, src: Any, dst_type: Any, *rounding: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 in (source, target):
            if source in TORCH and target in TORCH:
                return _handle(_to_torch(src).to(TORCH[target]), target)
            if source == tl.bfloat16:
                return original(self, _float32(src), dst_type, *rounding)
            middle = interpreter.TensorHandle(src.data.astype(np.float32), tl.float32)
            return cast(self, middle, dst_type)
        return original(self, src, dst_type, *rounding)

    return cast


def _dot(original: Any) -> Any:
    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = _float32(a), _float32(b)
        return original(self, a, b, *rest)

    return dot


def _binary(original: Any) -> Any:
    def binary(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not lhs.dtype.scalar == rhs.dtype.scalar == tl.bfloat16:
            return original(self, lhs, rhs, op)
        result = op(_float32(lhs).data, _float32(rhs).data)
        if result.dtype == np.bool_:
            return interpreter.TensorHandle(result, tl.int1)
        return _handle(torch.from_numpy(np.asarray(result)).to(torch.bfloat16), tl.bfloat16)

    return binary


def _once_in_a_launch(original: Any) -> Any:
    """Patching is looking through the whole language: a third of the time of a launch."""
    patched: set[ModuleType] = set()

    @cache
    def modules(fn: Callable[..., Any]) -> frozenset[ModuleType]:
        return frozenset(x for x in fn.__globals__.values() if x is tl or x is tl.core)

    class Scope:
        """Of a launch; those of the functions inside are dropped by the interpreter."""

        def __init__(self, scope: Any) -> None:
            self.scope = scope

        def restore(self) -> None:
            patched.clear()
            self.scope.restore()

    def patch(fn: Callable[..., Any]) -> Scope:
        new = modules(fn) - patched
        patched.update(new)
        return Scope(original(fn) if new else interpreter._LangPatchScope())

    return patch


def _assert_in_range(self: Any, lhs: Any, rhs: Any, operation: Callable[..., Any]) -> None:
    """Instead of the interpreter's own: the same in int64, many times faster, and it fails."""
    kind = lhs.type.scalar
    if kind.int_bitwidth >= 64:
        return
    wide = (x.handle.data.astype(np.int64) for x in (lhs, rhs))
    found = OPERATIONS[operation.__name__](*wide)
    low, high = kind.get_int_min_value(), kind.get_int_max_value()
    if found.min() < low or found.max() > high:
        raise OverflowError(f"{operation.__name__} of {kind}: {found.min()} .. {found.max()}")


OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _value(size: Any) -> Any:
    return getattr(size, "value", size)


def _once(made: type, key: Callable[..., Any], **own: int) -> None:
    """Objects of equal keys share their attributes, but for their `own`: name -> argument."""
    known: dict[Any, dict[str, Any]] = {}
    original = made.__init__

    def init(self: Any, *args: Any) -> None:
        found = known.get(name := key(*args))
        if found is None:
            original(self, *args)
            known[name] = {at: value for at, value in vars(self).items() if at not in own}
        else:
            self.__dict__.update(found)
            for at, argument in own.items():
                setattr(self, at, args[argument])

    made.__init__ = init


def _once_for_a_type(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    def of(kind: Any) -> Any:
        if kind.name not in known:
            known[kind.name] = original(kind)
        return known[kind.name]

    return of


def _accept_loaded_loop_bounds() -> None:
    """Triton 3.6 with numpy 2.4: tl.range(0, loaded scalar) raises a TypeError otherwise."""
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> Any:
        result = original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())
        return result

    interpreter._patch_lang_tensor = patch
