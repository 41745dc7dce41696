"""q, k, v of a call: what scaled_dot_product_attention makes of them, and what is refused."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vidsparse.grid import TokenGrid
from vidsparse.kernels.call_check import refuse_gradients

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def checked(q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, S, H, D] as they enter attention: of one shape, device and dtype of `DTYPES`.

    Raises TypeError for what is no tensor; ValueError for operands that do not belong together or
    to the grid, or that require grad.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x)
    q, k, v = as_autocast(q, k, v)
    _check(q, k, v, grid)
    return q, k, v


def as_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in the dtypes in which scaled_dot_product_attention computes under torch.autocast.

    All but float64 go to the autocast dtype: norms may leave q and k in float32 beside a bfloat16
    v. Outside autocast they stay as they are.
    """
    device = q.device.type
    if not _autocasts(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    q, k, v = (
        x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v)
    )
    return q, k, v


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Casts are done: what follows computes in the dtypes that it says."""
    return torch.autocast(device, enabled=False) if _autocasts(device) else nullcontext()


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}: expected a torch.Tensor")
    if x.ndim != 4:
        raise ValueError(
            f"{name}.shape={tuple(x.shape)}: expected [batch, tokens, heads, head_dim]"
        )
    if x.layout != torch.strided:
        raise ValueError(f"{name}.layout={x.layout}: expected a dense tensor, torch.strided")


def _check(q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> None:
    """Raise ValueError unless the operands, in the dtypes of autocast, belong together."""
    for name, x in (("k", k), ("v", v)):
        if x.shape[2] != q.shape[2] and x.shape[:2] == q.shape[:2]:
            raise ValueError(
                f"{name} has {x.shape[2]} heads, q has {q.shape[2]}: grouped queries are not "
                "supported; give every query head its keys and values (repeat_interleave on axis 2)"
            )
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}, q is {tuple(q.shape)} "
                f"{q.dtype} on {q.device}: self-attention needs one shape, dtype and device"
            )
    if q.dtype not in DTYPES:
        raise ValueError(f"q.dtype={q.dtype}: expected float32, bfloat16, float16 or float64")
    grid.check(q.shape[1])
    refuse_gradients("q, k or v", (q, k, v))


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
