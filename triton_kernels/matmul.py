"""Tiles of products with a floating or a GPTQ weight: what the matmuls and the fused LM head are made of.

A tile is BLOCK_M rows by BLOCK_N columns. Its sum runs over the inputs in order, BLOCK_K of them to a `tl.dot`, and is
never split among programs: a row's bits depend on the tile's shape, and on no other row. Tiles of rows are the grid's
fastest axis: programs that run at the same time read the same weight, which then comes from memory once.

Block sizes. Up to 16 rows the weight's bytes bound the product, read once per tile of rows: 16 is the least that tensor
cores take, 32 columns (two panels) leave most programs to a weight. Beyond, 64 x 64 halves what is read per
multiply-add and keeps the accumulators at 32 registers to a thread of 4 warps. Products in fp32, which no tensor core
makes, have all their operands in registers: with 32 x 32 none spills.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teco_kernels.triton_kernels._language import jit, tl
from teco_kernels.triton_kernels.common import from_float, operand, round_to_integer, to_float
from teco_kernels.triton_kernels.gptq_layout import codes_of_block, load_header

#: Rows up to which the weight's bytes bound a product.
FEW_ROWS = 16


def block_sizes(rows: int, fp32: bool) -> dict[str, int]:
    """Shape of the tiles, by the number of rows and the kind of product alone."""
    if rows <= FEW_ROWS:
        return {"BLOCK_M": 16, "BLOCK_N": 32}
    return {"BLOCK_M": 32, "BLOCK_N": 32} if fp32 else {"BLOCK_M": 64, "BLOCK_N": 64}


@jit
def dense_tile(
    x,
    weight,
    row,
    column,
    num_rows,
    in_features,
    out_features,
    x_stride,
    weight_stride,
    PACKED: tl.constexpr,
    FP32: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_N]; `row` and `column` are int64. FP32: multiply in fp32, else in the operands' dtype."""
    if PACKED:  # [panels, in_features, 16]
        outputs = weight + (column // 16) * in_features * 16 + column % 16
        k_stride = 16
    else:
        outputs = weight + column * weight_stride
        k_stride = 1
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, in_features, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        there = k < in_features
        a = tl.load(
            x + row[:, None] * x_stride + k[None, :], mask=(row < num_rows)[:, None] & there[None, :], other=0.0
        )
        b = tl.load(
            outputs[None, :] + k[:, None] * k_stride, mask=(column < out_features)[None, :] & there[:, None], other=0.0
        )
        if FP32:
            a, b = to_float(a), to_float(b)
        sums = tl.dot(operand(a), operand(b), sums, input_precision="ieee")
    return sums


@jit
def gptq_tile(
    x,
    weight,
    input_order,
    row,
    column,
    num_rows,
    out_features,
    x_stride,
    num_groups,
    blocks_per_group,
    group_bytes,
    BITS: tl.constexpr,
    MINIMUM: tl.constexpr,
    INT8: tl.constexpr,
    FP32: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The same, a block of 32 inputs to a step: what shares a scale. INT8: integer products of quantised inputs.

    Else a weight is made in fp32 and, unless FP32, rounded to the dtype of `x`.
    """
    column = tl.minimum(column, out_features - 1)  # of those behind the last the caller makes nothing
    panel = weight + (column // 16) * num_groups * group_bytes
    lane = column % 16
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in range(num_groups * blocks_per_group):
        group = panel + (b // blocks_per_group) * group_bytes
        scale, offset = load_header(group, lane)
        codes = codes_of_block(group + 64 + (b % blocks_per_group) * (BITS * 64), lane, BITS, BLOCK_N)
        k = b * 32 + tl.arange(0, 32)
        if input_order is not None:
            k = tl.load(input_order + k)
        a = tl.load(
            x + row[:, None] * x_stride + k[None, :], mask=(row < num_rows)[:, None] & (k >= 0)[None, :], other=0.0
        )
        if INT8:
            a = to_float(a)
            magnitude = tl.abs(a)
            largest = tl.max(magnitude, axis=1)
            is_finite = tl.min((magnitude <= 3.402823466e38).to(tl.int32), axis=1) == 1
            inverse = tl.where(is_finite & (largest > 1e-30), 127.0 / tl.where(largest > 1e-30, largest, 1.0), 0.0)
            inputs = round_to_integer(tl.where(is_finite[:, None], a, 0.0) * inverse[:, None]).to(tl.int8)
            a_scale = tl.where(is_finite, largest / 127.0, float("nan"))
            total = tl.sum(inputs.to(tl.int32), axis=1)
            # Codes of 8 bits become signed, which takes 128 times the sum of the inputs away.
            SHIFT: tl.constexpr = 128 if BITS == 8 else 0
            products = tl.dot(inputs, (codes - SHIFT).to(tl.int8), out_dtype=tl.int32) + SHIFT * total[:, None]
            dot, total = products.to(tl.float32), total.to(tl.float32)
            if MINIMUM:
                value = scale[None, :] * dot + offset[None, :] * total[:, None]
            else:
                value = scale[None, :] * (dot - offset[None, :] * total[:, None])
            sums += a_scale[:, None] * value
        else:
            if MINIMUM:
                w = scale[None, :] * codes.to(tl.float32) + offset[None, :]
            else:
                w = scale[None, :] * (codes.to(tl.float32) - offset[None, :])
            if FP32:
                a = to_float(a)
            else:
                w = from_float(w, x.dtype.element_ty)
            sums = tl.dot(operand(a), operand(w), sums, input_precision="ieee")
    return sums


def dense_arguments(x: Tensor, weight: Tensor) -> dict[str, Any]:
    """Constants of `dense_tile` for these operands; BLOCK_K is 64 of 16 bits and 32 of 32: 128 bytes of a row."""
    same = x.dtype == weight.dtype and x.dtype != torch.float32
    return {"PACKED": weight.dim() == 3, "FP32": not same, "BLOCK_K": 64 if same else 32}
