"""Dense attention: torch's scaled_dot_product_attention, with the LSE when it is asked for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_AT_ONCE = 256


def execute(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """q, k, v [B, S, H, D] -> out [B, S, H, D] and, if asked for, LSE [B, H, S] (natural log)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return out, (log_sum_exp(q, k) if return_lse else None)


def log_sum_exp(q: Tensor, k: Tensor) -> Tensor:
    """LSE of the dense scores [B, H, Sq], a strip of rows at a time."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k.to(dtype).mT * q.shape[-1] ** -0.5
    strips = [torch.logsumexp(rows.to(dtype) @ keys, -1) for rows in q.split(ROWS_AT_ONCE, dim=-2)]
    return torch.cat(strips, -1)
