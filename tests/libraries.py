"""What stands for the libraries of the exact engines: their documented functions, in float64.

They take and check what the libraries document and check, on tensors of any device: shapes, dtypes,
memory layouts, values of lists. `install` puts them where an import finds them.

Sources: docs.nvidia.com/cudnn, block sparse attention, of nvidia-cudnn-frontend 1.32.0;
`flash_attn.cute.block_sparsity` of flash-attn-4 4.0.0b36.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.kernels.gpu import oracles, support

HALVES = (torch.bfloat16, torch.float16)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both packages can be imported and are new enough."""
    interface = {"_flash_attn_fwd": flash_attention}
    for name, contents in (
        ("cudnn", {"BSA": SimpleNamespace(block_sparse_attention_forward=block_sparse_attention)}),
        ("flash_attn", {}),
        ("flash_attn.cute", {}),
        ("flash_attn.cute.interface", interface),
        ("flash_attn.cute.block_sparsity", {"BlockSparseTensorsTorch": BlockSparseTensors}),
    ):
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(support, "lacks", lambda *_: None)


def block_sparse_attention(
    q_tensor: Tensor,
    k_tensor: Tensor,
    v_tensor: Tensor,
    q2k_block_index: Tensor,
    block_sparse_num: int | None = None,
    block_sizes: Tensor | None = None,
    q2k_block_nums: Tensor | None = None,
    *,
    sparse_block_size: int | None = None,
    allow_empty_block_nums: bool = False,
    softmax_scale: float | None = None,
    pack_gqa: bool | None = None,
    layout: str = "bhsd",
    kv_splits: int = 1,
    use_clc: bool | None = None,
) -> dict[str, Tensor]:
    """cuDNN's; new tensors, contiguous in the layout, LSE float32 [B, H, Sq], natural log."""
    assert layout in ("bhsd", "bshd") and q2k_block_nums is not None
    given = q_tensor, k_tensor, v_tensor
    q, k, v = (x if layout == "bhsd" else x.transpose(1, 2) for x in given)
    major, block = support.capability(q.device)[0], sparse_block_size
    batch, heads, tokens, depth = q.shape
    assert q.dtype in HALVES and k.dtype == v.dtype == q.dtype
    assert k.shape == v.shape == (batch, heads, k.shape[2], depth) and min(k.shape) > 0
    if major in (9, 12) or block == 128:
        assert depth in ((128,) if major == 12 else (64, 96, 128))
    else:
        assert depth == 128 and q.dtype == torch.bfloat16
    assert major != 9 or block != 64 or tokens % 64 == 0
    for x in (q, k, v):
        assert_readable(x, 16 if block == 128 and major in (9, 10, 11) else 128)
        compact = x.is_contiguous() or x.transpose(1, 2).is_contiguous()
        assert compact or major not in (10, 11) or block != 128
    queries, keys = -(-tokens // block), -(-k.shape[2] // block)
    used = entries(q2k_block_index, q2k_block_nums, (batch, heads, queries))
    assert int(q2k_block_nums.min()) >= 1 - allow_empty_block_nums
    full = k.shape[2] // block if block_sizes is None else keys
    assert ((q2k_block_index >= 0) & (q2k_block_index < full))[used].all()
    out, lse = attention(q, k, v, q2k_block_index, q2k_block_nums, block, block)
    out = out if layout == "bhsd" else out.transpose(1, 2)
    return {"o_tensor": out.to(q.dtype).contiguous(), "lse_tensor": lse.float().contiguous()}


class BlockSparseTensors(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    cu_total_m_blocks: Tensor | None = None
    cu_block_idx_offsets: Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: Tensor | None = None
    dq_write_order_full: Tensor | None = None
    spt: bool | None = None


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_sparse_tensors: BlockSparseTensors | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    _arch: int | None = None,
) -> tuple[Any, ...]:
    """FlashAttention-4's on [B, S, H, D], compute capability 9.x; writes out and lse."""
    assert _arch is not None and _arch // 10 == 9  # on 8.x it computes dense attention
    assert block_sparse_tensors is not None and out is not None and lse is not None
    batch, tokens, heads, depth = q.shape
    assert q.dtype in HALVES and k.dtype == v.dtype == out.dtype == q.dtype
    assert k.shape == v.shape == (batch, k.shape[1], heads, depth) and min(k.shape) > 0
    assert 8 <= depth <= 256 and depth % 8 == 0
    assert out.shape == q.shape and 0 not in out.stride()
    assert_readable(out.transpose(1, 2), 16)
    assert lse.shape == (batch, heads, tokens) and lse.dtype == torch.float32
    lists = block_sparse_tensors
    assert lists.block_size is not None
    block_q, block_k = lists.block_size
    assert block_q % 64 == 0 and block_k % 16 == 0 and block_k <= 128
    queries, keys = -(-tokens // block_q), -(-k.shape[1] // block_k)
    assert not lists.mask_block_cnt.any() and lists.mask_block_idx.shape[3] <= keys
    for x, shape in (
        (lists.mask_block_cnt, (batch, heads, queries)),
        (lists.mask_block_idx, (batch, heads, queries, lists.mask_block_idx.shape[3])),
    ):
        assert x.dtype == torch.int32
        x.expand(shape)
    index, count = lists.full_block_idx, lists.full_block_cnt
    assert index is not None and count is not None and index.shape[3] <= keys
    used = entries(index, count, (batch, heads, queries))
    assert ((index >= 0) & (index < k.shape[1] // block_k))[used].all()
    assert (index.diff() > 0)[used[..., 1:]].all()
    turned = (x.transpose(1, 2) for x in (q, k, v))
    found, found_lse = attention(*turned, index, count, block_q, block_k)
    out.copy_(found.transpose(1, 2))
    lse.copy_(found_lse)
    return out, lse, None, None, None


def entries(index: Tensor, count: Tensor, lists: tuple[int, int, int]) -> Tensor:
    """Which entries are in use, bool like index; none of a list is named twice."""
    assert index.dtype == count.dtype == torch.int32
    assert index.shape[:3] == count.shape == lists
    assert int(count.min()) >= 0 and int(count.max()) <= index.shape[3]
    used = torch.arange(index.shape[3]) < count[..., None]
    alone = index.long().where(used, -1 - torch.arange(index.shape[3])).sort(-1).values
    assert (alone.diff() > 0).all()
    return used


def assert_readable(x: Tensor, alignment: int) -> None:
    """Of TMA: rows of 16 bytes; the first element at a multiple of `alignment` bytes.

    Memory of a CPU begins at multiples of 64, of a GPU at those of 512.
    """
    outer = zip(x.shape[:3], x.stride()[:3], strict=True)
    assert x.stride(3) == 1 and x.data_ptr() % min(alignment, 64) == 0
    assert all(step * x.element_size() % 16 == 0 for size, step in outer if size > 1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor]:
    """Of queries in blocks over the listed blocks of keys, all [B, H, S, D]; out and LSE."""
    start = torch.arange(0, q.shape[2], block_q)
    size = (q.shape[2] - start).clamp(max=block_q)
    blocks = Blocks(start, size, torch.zeros(len(start), dtype=torch.bool), block_q)
    out, lse = oracles.exact_tiles(q, k, v, index * block_k, count, block_k, blocks)
    return out, lse
