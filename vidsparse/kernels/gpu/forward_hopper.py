"""The sparse forward with keys and values through TMA: sm_90 and sm_100, and the CPU interpreter.

Same lists, keys, results and launcher as `forward`, in two forms:

    tma  K and V through host descriptors over the key buffer as [B * H * R, DP], q by pointer
    ws   tma with q through a descriptor made on the device, warps split into one that loads and two
         groups that compute; opt-in, needs blocks of 128 queries and a few bytes of scratch

Letters as in `forward`; d_ descriptor.
"""

from __future__ import annotations

from contextvars import copy_context
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vidsparse.kernels.gpu import support
from vidsparse.kernels.gpu.forward_parts import launch, masked_bias, store_rows, take_tile
from vidsparse.kernels.gpu.operands import (
    REST_AT,
    TILE_MASK,
    Keys,
    QueryRows,
    Scales,
    TileLists,
    Tiling,
)

FORMS = ("tma", "ws")
DTYPES = (torch.bfloat16, torch.float16)
GENERATIONS = (9, 10)
"""Major compute capabilities whose machine code was looked at."""

TMA = {
    (9, 64, False): Tiling(128, 64, 8, 3, 128),
    (9, 64, True): Tiling(128, 64, 8, 3, 128),
    (9, 128, False): Tiling(128, 64, 8, 2, 128),
    (9, 128, True): Tiling(128, 64, 8, 3),
    (10, 64, False): Tiling(128, 64, 8, 3),
    (10, 64, True): Tiling(128, 64, 8, 3),
    (10, 128, False): Tiling(128, 64, 8, 2),
    (10, 128, True): Tiling(128, 64, 8, 3),
}
"""Generation, width of the key buffer, whether lists carry bits -> tiling of form "tma".

With a limit of 128 registers two programs share a multiprocessor; the other tilings spill under it.
"""

TMA_64 = {9: Tiling(64, 64, 4, 2), 10: Tiling(64, 64, 4, 3)}
"""For query blocks of 64 tokens."""

WS = {9: Tiling(128, 64, 4, 3, split=False), 10: Tiling(128, 64, 8, 3, split=False)}
"""Generation -> tiling of form "ws"; the compiler for sm_90 specialises the warps of one loop."""

RUN_TIME = ["key_batch", "key_head", "heads", "tokens", "q_blocks", "width", "shared", "key_tiles"]


@triton.jit(do_not_specialize=RUN_TIME)
def sparse_forward_hopper_kernel(  # type: ignore[no-untyped-def]
    p_q,
    d_k,
    d_v,
    p_bias,
    p_entry,
    p_bits,
    p_count,
    p_whole,
    p_start,
    p_rows,
    p_order,
    p_out,
    p_lse,
    p_rest,
    p_q_scale,
    p_k_scale,
    p_shift,
    q_batch,
    q_head,
    q_token,
    out_batch,
    out_head,
    out_token,
    key_batch,
    key_head,
    scale,
    heads,
    tokens,
    q_blocks,
    width,
    shared,
    key_tiles,
    D: tl.constexpr,
    DP: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
    REST: tl.constexpr,
    QK8: tl.constexpr,
    ORDERED: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    SPECIALISED: tl.constexpr,
):
    """`sparse_forward_kernel` with descriptors d_k, d_v of tiles [BN, DP].

    key_batch, key_head count rows. SPECIALISED reads q by position, ORDERED or not, through a
    descriptor, which fills what lies outside the tensor with zeros; rows of the next query block
    that it reads are not stored.
    """
    i_part = tl.program_id(0)
    i_block = i_part // PARTS
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // heads
    i_h = i_bh % heads
    first = (i_part % PARTS) * BM
    o_m = first + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, DP)
    rows = tl.load(p_rows + i_block)
    start = tl.load(p_start + i_block)
    m_m = o_m < rows
    m_q = m_m[:, None]
    if D < DP:
        m_q = m_q & (o_d < D)[None, :]
    q_base = p_q + i_b * q_batch + i_h * q_head
    if SPECIALISED:
        d_q = tl.make_tensor_descriptor(
            q_base, shape=[tokens, D], strides=[q_token, 1], block_shape=[BM, DP]
        )
        b_q = d_q.load([(start + first).to(tl.int32), 0])
    else:
        o_q = start + o_m
        if ORDERED:
            o_q = tl.load(p_order + o_q, mask=m_m, other=0)
        b_q = tl.load(q_base + o_q[:, None] * q_token + o_d[None, :], mask=m_q, other=0.0)
    key_row = (i_b * key_batch + i_h * key_head).to(tl.int32)
    i_row = i_bh * q_blocks + i_block
    p_next = p_entry + i_row * width
    p_scale = p_k_scale + i_bh * key_tiles
    some = first < rows
    last = tl.where(some, tl.load(p_count + i_row), 0)
    whole = tl.where(some, tl.load(p_whole + i_row), 0)
    if QK8:
        scale *= tl.load(p_q_scale + i_bh * q_blocks * PARTS + i_part)

    b_max = tl.full([BM], -1e30, tl.float32)  # finite: a tile may be masked for every row
    b_sum = tl.zeros([BM], tl.float32)
    b_rest = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, DP], tl.float32)
    entry = tl.load(p_next)
    if SPLIT or not MASKED:
        for i in tl.range(0, whole, num_stages=STAGES, warp_specialize=SPECIALISED):
            tile = entry & TILE_MASK
            row = tile * BN
            b_k = d_k.load([key_row + row, 0])
            b_v = d_v.load([key_row + row, 0])
            factor = scale
            if QK8:
                factor = scale * tl.load(p_scale + tile)
            b_s = tl.dot(b_q, b_k.T).to(tl.float32) * factor
            b_s += tl.load(p_bias + row + o_n)[None, :]  # after the product: fewer registers
            entry = tl.load(p_next + i + 1)
            b_max, b_sum, _, b_acc = take_tile(b_s, b_v, b_max, b_sum, b_rest, b_acc, 0.0, False)
    if MASKED:
        begin = whole if SPLIT else 0
        p_next_bits = p_bits + i_row * shared
        bits = tl.load(p_next_bits)
        for i in tl.range(begin, last, num_stages=STAGES, warp_specialize=SPECIALISED):
            tile = entry & TILE_MASK
            row = tile * BN
            is_rest = (entry >> REST_AT).to(tl.float32)
            b_k = d_k.load([key_row + row, 0])
            b_v = d_v.load([key_row + row, 0])
            factor = scale
            if QK8:
                factor = scale * tl.load(p_scale + tile)
            b_s = tl.dot(b_q, b_k.T).to(tl.float32) * factor
            if not SPLIT:
                bits = tl.where(i < whole, -1, bits)
            b_s += masked_bias(tl.load(p_bias + row + o_n), o_n, entry, bits)[None, :]
            entry = tl.load(p_next + i + 1)
            bits = tl.load(p_next_bits + tl.maximum(i + 1 - whole, 0))
            b_max, b_sum, b_rest, b_acc = take_tile(
                b_s, b_v, b_max, b_sum, b_rest, b_acc, is_rest, REST
            )

    # offsets and masks are made anew: kept through the loop they would take 40 registers
    m_m = o_m < tl.load(p_rows + i_block, volatile=True)
    m_q = m_m[:, None]
    if D < DP:
        m_q = m_q & (o_d < D)[None, :]
    o_q = tl.load(p_start + i_block, volatile=True) + o_m
    if ORDERED:
        o_q = tl.load(p_order + o_q, mask=m_m, other=0, volatile=True)
    out_base = p_out + i_b * out_batch + i_h * out_head
    p_o = out_base + o_q[:, None] * out_token + o_d[None, :]
    o_t = i_bh * tokens + o_q
    p_l, p_r, p_s = p_lse + o_t, p_rest + o_t, p_shift + o_t
    store_rows(b_acc, b_max, b_sum, b_rest, p_o, p_l, p_r, p_s, m_q, m_m, REST, QK8)


def tiling(
    form: str,
    dtype: torch.dtype,
    capability: tuple[int, int],
    block_q: int,
    block_k: int,
    padded: int = 128,
    masked: bool = False,
) -> Tiling:
    """Tiling of a form for blocks of block_q x block_k tokens.

    padded: head dim of the key buffer; masked: the lists carry bits.

    Raises ValueError for what the form cannot do; `forward` does it.
    """
    _check(form, dtype, capability)
    if form == "ws":
        if block_q < 128 or block_k < 64:
            raise ValueError(
                f"blocks of {block_q} x {block_k} tokens: form 'ws' needs at least 128 x 64; "
                "use 'tma' or 'pointer'"
            )
        return WS[capability[0]]
    if block_q < 64:
        raise ValueError(
            f"blocks of {block_q} queries: form 'tma' needs at least 64; use 'pointer'"
        )
    shape = TMA_64[capability[0]] if block_q < 128 else TMA[capability[0], padded, masked]
    shape = shape.within(block_q, block_k)
    return shape if shape.block_n == 64 else replace(shape, stages=3 if block_q >= 128 else 2)


def sparse_forward(
    q: Tensor,
    keys: Keys,
    lists: TileLists,
    rows: QueryRows,
    shape: Tiling,
    out: Tensor,
    lse: Tensor,
    rest: Tensor | None = None,
    scales: Scales | None = None,
    *,
    form: str = "tma",
) -> None:
    """`operator.sparse_forward` in one of `FORMS`.

    Raises ValueError for what the form cannot do: another device, float32, keys whose strides are
    no whole rows and, for "ws", query tiles other than 128 and q off the 16-byte grid.
    """
    _check(form, keys.v.dtype, support.capability(q.device))
    if form == "ws":
        q = q if rows.order is None else q.index_select(2, rows.order)
        _check_queries(q, shape)
    k, strides = _descriptor(keys.k, shape.block_n)
    v, _ = _descriptor(keys.v, shape.block_n)

    def run() -> None:
        if form == "ws":
            triton.set_allocator(_scratch)
        operands = q, keys, lists, rows, shape, out, lse, rest, scales
        special = form == "ws"
        launch(sparse_forward_hopper_kernel, k, v, strides, *operands, SPECIALISED=special)

    copy_context().run(run)  # what run sets is gone after it: the caller's allocator stays


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for descriptors made on the device; torch aligns to more than any of them needs."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _descriptor(x: Tensor, block_n: int) -> tuple[TensorDescriptor, tuple[int, int]]:
    """[B, H, R, DP] as rows [n, DP] in tiles of block_n; rows from batch to batch, head to head."""
    batch, heads, length, width = x.shape
    strides = x.stride()
    if strides[2:] != (width, 1) or strides[0] % width or strides[1] % width:
        raise ValueError(
            f"keys of shape {tuple(x.shape)} with strides {strides}: TMA needs heads of contiguous "
            f"rows, whole rows apart; make them contiguous or use form 'pointer'"
        )
    if x.data_ptr() % 16:
        raise ValueError("keys off the 16-byte grid: align them or use form 'pointer'")
    steps = strides[0] // width, strides[1] // width
    count = (batch - 1) * steps[0] + (heads - 1) * steps[1] + length
    if count >= 2**31:
        raise ValueError(f"{count} rows of keys: TMA counts to 2^31; use form 'pointer'")
    return TensorDescriptor(x, [count, width], [width, 1], [block_n, width]), steps


def _check(form: str, dtype: torch.dtype, capability: tuple[int, int]) -> None:
    if form not in FORMS:
        raise ValueError(f"form {form!r}: expected one of {', '.join(FORMS)}")
    if dtype not in DTYPES:
        raise ValueError(
            f"{dtype}: form {form!r} computes in bfloat16 or float16; use form 'pointer'"
        )
    if capability[0] not in GENERATIONS:
        raise ValueError(
            f"compute capability {capability}: form {form!r} was built for NVIDIA's 9.x and 10.x; "
            "use form 'pointer'"
        )


def _check_queries(q: Tensor, shape: Tiling) -> None:
    size = q.element_size()
    if shape.block_m != 128:
        raise ValueError(f"{shape}: form 'ws' splits 128 queries between two groups of warps")
    if q.data_ptr() % 16 or any(stride * size % 16 for stride in q.stride()[:3]):
        raise ValueError(
            f"q with strides {q.stride()} of {size} bytes: form 'ws' needs every row on the "
            "16-byte grid; use 'tma' or 'pointer'"
        )
