"""SwiGLU's product: a program per row and 1024 columns.

Bytes: gate and up once from memory, out once to it; bound by bandwidth. 1024 columns are 8 elements to a thread of 4
warps, one load of 16 bytes each from the two halves.
"""

from __future__ import annotations

from torch import Tensor

from teco_kernels.triton_kernels._language import jit, tl
from teco_kernels.triton_kernels._launch import ceil_div, launch, power_of_two, rows_of
from teco_kernels.triton_kernels.common import load_float, store_float


@jit
def silu_and_mul_kernel(out, x, size, out_stride, x_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = load_float(x + row * x_stride + i, i < size)
    up = load_float(x + row * x_stride + size + i, i < size)
    store_float(out + row * out_stride + i, gate / (1.0 + tl.exp(-gate)) * up, i < size)


def silu_and_mul(out: Tensor, x: Tensor) -> None:
    """Launch the kernel."""
    rows, out_rows = rows_of(x), rows_of(out)
    block = power_of_two(out_rows.size, 16, 1024)
    grid = (rows.num_rows, ceil_div(out_rows.size, block))
    launch(silu_and_mul_kernel, grid, out, x, out_rows.size, out_rows.stride, rows.stride, BLOCK=block)
