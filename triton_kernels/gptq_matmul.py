"""Matmul with a GPTQ weight, dequantised in registers; tiles, bytes and block sizes: matmul.py."""

from __future__ import annotations

import torch
from torch import Tensor

from teco_kernels.triton_kernels._language import jit, tl
from teco_kernels.triton_kernels._launch import ceil_div, launch, rows_of
from teco_kernels.triton_kernels.common import store_float
from teco_kernels.triton_kernels.gptq_layout import layout_arguments
from teco_kernels.triton_kernels.matmul import block_sizes, gptq_tile


@jit
def gptq_matmul_kernel(
    out,
    x,
    weight,
    input_order,
    bias,
    num_rows,
    out_features,
    out_stride,
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
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = gptq_tile(
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
        BITS,
        MINIMUM,
        INT8,
        FP32,
        BLOCK_M,
        BLOCK_N,
    )
    if bias is not None:
        sums += tl.load(bias + column, mask=column < out_features, other=0.0)[None, :]
    there = (row < num_rows)[:, None] & (column < out_features)[None, :]
    store_float(out + row[:, None] * out_stride + column[None, :], sums, there)


def gptq_matmul(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    input_order: Tensor | None,
    bias: Tensor | None,
    in_features: int,  # as those of `x`
    out_features: int,
    bits: int,
    has_minimum: bool,
    int8_activation: bool,
    section_size: int = 0,  # the operator takes no others here
) -> None:
    """Launch the kernel."""
    rows, fp32 = rows_of(x), x.dtype == torch.float32
    blocks = block_sizes(rows.num_rows, fp32 and not int8_activation)
    launch(
        gptq_matmul_kernel,
        (ceil_div(rows.num_rows, blocks["BLOCK_M"]), ceil_div(out_features, blocks["BLOCK_N"])),
        out,
        x,
        weight,
        input_order,
        bias,
        rows.num_rows,
        out_features,
        rows_of(out).stride,
        rows.stride,
        *layout_arguments(weight, bits).values(),
        BITS=bits,
        MINIMUM=has_minimum,
        INT8=int8_activation,
        FP32=fp32,
        **blocks,
        num_stages=3,
    )
