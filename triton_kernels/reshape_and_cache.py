"""Writes keys and values of a step into their slots of the paged cache: a program per token, head, and key or value.

Bytes: every element is read once and written once, and a scale of 4 bytes per head of an 8-bit cache: bound by
bandwidth. A head is the block: it fits in the registers of a warp or four, where its scale is found, and is then not
read again. The codes of 8-bit caches are defined to the bit, so they are made by integer and exactly rounded
operations, the same on every target; sm_80 and gfx942 have no instruction for float8_e4m3fn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teco_kernels.triton_kernels._language import jit, tl
from teco_kernels.triton_kernels._launch import launch, power_of_two
from teco_kernels.triton_kernels.common import load_float, round_to_integer, store_float

_KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


@jit
def _to_float8(x):
    """fp32 of at most 448 in magnitude to the bits of float8_e4m3fn; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    code = (magnitude - (120 << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    # Below 2^-6, adding 2^14 rounds to the spacing of 2^-9 and leaves the count of it in the low bits.
    small = magnitude.to(tl.float32, bitcast=True)
    counted = (small + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(small < 0.015625, counted, code)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@jit
def _store(
    heads,
    cache,
    scales,
    block,
    offset,
    h,
    head_stride,
    block_stride,
    slot_stride,
    cache_head_stride,
    scale_block_stride,
    scale_slot_stride,
    scale_head_stride,
    head_dim,
    KIND: tl.constexpr,
    WRITES_SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    x = load_float(heads + h * head_stride + i, i < head_dim)
    place = cache + block * block_stride + offset * slot_stride + h * cache_head_stride + i
    if KIND == "float":
        store_float(place, x, i < head_dim)
    else:
        LIMIT: tl.constexpr = 127.0 if KIND == "int8" else 448.0
        scales += block * scale_block_stride + offset * scale_slot_stride + h * scale_head_stride
        if WRITES_SCALES:
            magnitude = tl.abs(x)
            is_finite = tl.min((magnitude <= 3.402823466e38).to(tl.int32), axis=0)
            largest = tl.max(magnitude, axis=0)
            scale = tl.where(largest > 1e-30, tl.div_rn(largest, LIMIT), 0.0)
            scale = tl.where(is_finite == 1, scale, float("nan"))
            tl.store(scales, scale)
        else:
            scale = tl.load(scales)
        factor = tl.where(scale > 0.0, tl.div_rn(1.0, tl.where(scale > 0.0, scale, 1.0)), 0.0)
        x = x * factor
        clamped = tl.where(x != x, x, tl.minimum(tl.maximum(x, -LIMIT), LIMIT))
        if KIND == "int8":
            code = round_to_integer(tl.where(x != x, 0.0, clamped)).to(tl.int8)
            tl.store(place, code, mask=i < head_dim)
        else:
            tl.store(place, _to_float8(clamped), mask=i < head_dim)


@jit
def reshape_and_cache_kernel(
    key,
    value,
    key_cache,
    value_cache,
    key_scale,
    value_scale,
    slot_mapping,
    block_size,
    head_dim,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    key_block_stride,
    key_slot_stride,
    key_cache_head_stride,
    value_block_stride,
    value_slot_stride,
    value_cache_head_stride,
    key_scale_block_stride,
    key_scale_slot_stride,
    key_scale_head_stride,
    value_scale_block_stride,
    value_scale_slot_stride,
    value_scale_head_stride,
    KIND: tl.constexpr,
    WRITES_SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        block, offset = slot // block_size, slot % block_size
        if tl.program_id(2) == 0:
            _store(
                key + token * key_stride,
                key_cache,
                key_scale,
                block,
                offset,
                h,
                key_head_stride,
                key_block_stride,
                key_slot_stride,
                key_cache_head_stride,
                key_scale_block_stride,
                key_scale_slot_stride,
                key_scale_head_stride,
                head_dim,
                KIND,
                WRITES_SCALES,
                BLOCK,
            )
        else:
            _store(
                value + token * value_stride,
                value_cache,
                value_scale,
                block,
                offset,
                h,
                value_head_stride,
                value_block_stride,
                value_slot_stride,
                value_cache_head_stride,
                value_scale_block_stride,
                value_scale_slot_stride,
                value_scale_head_stride,
                head_dim,
                KIND,
                WRITES_SCALES,
                BLOCK,
            )


def cache_kind(cache: Tensor) -> str:
    """How kernels name what the elements of a cache stand for: "int8" and "fp8" codes with a scale, "float" numbers."""
    return _KINDS.get(cache.dtype, "float")


def scale_strides(scale: Tensor | None) -> tuple[int, ...]:
    """Strides of a scale per slot and head; zeros where one number is for all, or there is none."""
    return scale.stride() if scale is not None and scale.dim() == 3 else (0, 0, 0)


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> None:
    """Launch the kernel."""
    tokens, heads, head_dim = key.shape
    kind = cache_kind(key_cache)
    if kind == "fp8":
        key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.uint8)
    launch(
        reshape_and_cache_kernel,
        (tokens, heads, 2 if head_dim else 0),
        key,
        value,
        key_cache,
        value_cache,
        key_scale,
        value_scale,
        slot_mapping,
        key_cache.shape[1],
        head_dim,
        *key.stride()[:2],
        *value.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        *scale_strides(key_scale),
        *scale_strides(value_scale),
        KIND=kind,
        WRITES_SCALES=key_scale is not None and key_scale.dim() == 3,
        BLOCK=power_of_two(head_dim, 16),
        num_warps=1 if head_dim <= 256 else 4,
    )
