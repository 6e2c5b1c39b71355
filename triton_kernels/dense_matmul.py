"""Matmul with a floating weight, packed in panels or as it lies; tiles, bytes and block sizes: matmul.py."""

from __future__ import annotations

from torch import Tensor

from teco_kernels.triton_kernels._language import jit, tl
from teco_kernels.triton_kernels._launch import ceil_div, launch, rows_of
from teco_kernels.triton_kernels.common import store_float
from teco_kernels.triton_kernels.matmul import block_sizes, dense_arguments, dense_tile


@jit
def dense_matmul_kernel(
    out,
    x,
    weight,
    bias,
    num_rows,
    in_features,
    out_features,
    out_stride,
    x_stride,
    weight_stride,
    PACKED: tl.constexpr,
    FP32: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = dense_tile(
        x,
        weight,
        row,
        column,
        num_rows,
        in_features,
        out_features,
        x_stride,
        weight_stride,
        PACKED,
        FP32,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if bias is not None:
        sums += tl.load(bias + column, mask=column < out_features, other=0.0)[None, :]
    there = (row < num_rows)[:, None] & (column < out_features)[None, :]
    store_float(out + row[:, None] * out_stride + column[None, :], sums, there)


def dense_matmul(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> None:
    """Launch the kernel."""
    rows, constants = rows_of(x), dense_arguments(x, weight)
    blocks = block_sizes(rows.num_rows, constants["FP32"])
    launch(
        dense_matmul_kernel,
        (ceil_div(rows.num_rows, blocks["BLOCK_M"]), ceil_div(out_features, blocks["BLOCK_N"])),
        out,
        x,
        weight,
        bias,
        rows.num_rows,
        rows.size,
        out_features,
        rows_of(out).stride,
        rows.stride,
        weight.stride(0),
        **constants,
        **blocks,
        num_stages=3,
    )
