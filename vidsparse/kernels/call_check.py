"""What every fast executor refuses: operands that do not fit a plan, plans that none executes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from vidsparse.kernels.executor import Executes, cure
from vidsparse.plan import SKIP, BlockPlan


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    engine: str,
    dtypes: tuple[torch.dtype, ...],
    executes: Executes,
) -> None:
    """Raise ValueError unless q, k, v and the plan belong together and can be executed.

    q [B, H, Sq, D], k, v [B, H, Sk, D], one device, one of `dtypes`; rest SKIP or the centroid;
    first order only with centroids; no gradient wanted. engine: name in messages. executes: its
    facts.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.device != q.device or x.dtype != q.dtype or x.dtype not in dtypes:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}: the {engine} engine expects "
                f"[B, H, S, D] tensors of one device and one dtype of {allowed}; convert them or "
                "use impl='reference'"
            )
    expected = (*q.shape[:2], plan.k_blocks.tokens, q.shape[3])
    if k.shape != expected or v.shape != expected or q.shape[2] != plan.q_blocks.tokens:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit a plan of "
            f"{plan.q_blocks.tokens} queries and {plan.k_blocks.tokens} keys"
        )
    rows = (*q.shape[:2], len(plan.q_blocks), len(plan.k_blocks))
    if tuple(plan.levels.shape) != rows or plan.levels.device != q.device:
        raise ValueError(
            f"plan.levels of shape {tuple(plan.levels.shape)} on {plan.levels.device}: "
            f"expected {rows} on {q.device}"
        )
    top = plan.k_blocks.levels
    if plan.rest not in (SKIP, top):
        raise ValueError(f"plan.rest={plan.rest}: expected {SKIP} (skip) or {top} (centroid)")
    if lacking := executes.lacks(plan):
        able = cure(q.device, lambda executes: not executes.lacks(plan))
        raise ValueError(f"{lacking}: the {engine} engine does not execute it; {able}")
    if plan.first_order != "none" and plan.rest == SKIP:
        raise ValueError(
            f"plan.first_order={plan.first_order!r} with plan.rest={SKIP} (skip): expected 'none', "
            f"or plan.rest={top} (centroid)"
        )
    refuse_gradients("q, k or v", (q, k, v))


def refuse_gradients(what: str, *tensors: Iterable[Tensor]) -> None:
    """Raise ValueError if autograd would record what is computed from the tensors.

    what: names them in the message.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in chain(*tensors)):
        raise ValueError(
            f"{what} requires grad: sparse attention is inference only; call it under "
            "torch.no_grad(), and train without vidsparse (restore_pipeline)"
        )
