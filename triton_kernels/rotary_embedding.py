"""Rotary position embedding of query and key, in place: a program per token and 8 heads.

Bytes: every rotated element is read and written once, next to a row of cosines and sines that the heads share: bound by
bandwidth. 8 heads of 64 pairs are 4 pairs to a thread of 4 warps, whose loads are 8 bytes of 16-bit elements; more
heads to a program would leave a decode step with too few of them.
"""

from __future__ import annotations

from torch import Tensor

from teco_kernels.triton_kernels._language import jit, tl
from teco_kernels.triton_kernels._launch import ceil_div, launch, power_of_two
from teco_kernels.triton_kernels.common import load_float, store_float

HEADS = 8


@jit
def _rotate(
    x,
    first_head,
    num_heads,
    head_stride,
    cos,
    sin,
    half,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    h, i = first_head + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    there = (h[:, None] < num_heads) & (i[None, :] < half)
    if INTERLEAVED:
        a = x + h[:, None].to(tl.int64) * head_stride + 2 * i[None, :]
        b = a + 1
    else:
        a = x + h[:, None].to(tl.int64) * head_stride + i[None, :]
        b = a + half
    left, right = load_float(a, there), load_float(b, there)
    store_float(a, left * cos[None, :] - right * sin[None, :], there)
    store_float(b, right * cos[None, :] + left * sin[None, :], there)


@jit
def rotary_embedding_kernel(
    positions,
    query,
    key,
    cos_sin,
    half,
    num_query_heads,
    num_kv_heads,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    cos_sin_stride,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = cos_sin + tl.load(positions + token) * cos_sin_stride
    i = tl.arange(0, BLOCK)
    cos = tl.load(row + i, mask=i < half, other=0.0)
    sin = tl.load(row + half + i, mask=i < half, other=0.0)
    query_parts = tl.cdiv(num_query_heads, HEADS)
    if part < query_parts:
        _rotate(
            query + token * query_stride,
            part * HEADS,
            num_query_heads,
            query_head_stride,
            cos,
            sin,
            half,
            INTERLEAVED,
            HEADS,
            BLOCK,
        )
    else:
        _rotate(
            key + token * key_stride,
            (part - query_parts) * HEADS,
            num_kv_heads,
            key_head_stride,
            cos,
            sin,
            half,
            INTERLEAVED,
            HEADS,
            BLOCK,
        )


def rotary_embedding(positions: Tensor, query: Tensor, key: Tensor, cos_sin_cache: Tensor, interleaved: bool) -> None:
    """Launch the kernel."""
    half = cos_sin_cache.shape[1] // 2
    if half == 0:
        return
    launch(
        rotary_embedding_kernel,
        (len(query), ceil_div(query.shape[1], HEADS) + ceil_div(key.shape[1], HEADS)),
        positions,
        query,
        key,
        cos_sin_cache,
        half,
        query.shape[1],
        key.shape[1],
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        cos_sin_cache.stride(0),
        INTERLEAVED=interleaved,
        HEADS=HEADS,
        BLOCK=power_of_two(half, 16),
    )
