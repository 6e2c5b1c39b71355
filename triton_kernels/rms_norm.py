"""RMS norm, with or without a residual added first: one program per row.

Bytes: input (and residual) once from memory, out (and the new residual) once to it; the second pass finds the row in L1
or L2. Bound by bandwidth. A block of 4096 elements is 16 loads of 16 bits to a thread of 8 warps, enough in flight;
rows that fit are read in one block of their own size. The block depends on the row's length alone, and so do its bits.
"""

from __future__ import annotations

from torch import Tensor

from teco_kernels.triton_kernels._language import jit, tl
from teco_kernels.triton_kernels._launch import Rows, launch, power_of_two, rows_of
from teco_kernels.triton_kernels.common import from_float, load_float, store_float, to_float


@jit
def rms_norm_kernel(
    out,
    x,
    weight,
    residual,
    residual_out,
    size,
    eps,
    inner,
    x_stride,
    x_outer_stride,
    out_stride,
    out_outer_stride,
    residual_stride,
    residual_out_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += (row // inner) * x_outer_stride + (row % inner) * x_stride
    out += (row // inner) * out_outer_stride + (row % inner) * out_stride
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        value = load_float(x + i, i < size)
        if residual is not None:
            value += load_float(residual + row * residual_stride + i, i < size)
            rounded = from_float(value, residual_out.dtype.element_ty)  # the norm sees the sum as it is stored
            tl.store(residual_out + row * residual_out_stride + i, rounded, mask=i < size)
            value = to_float(rounded)
        squares += value * value
    scale = 1.0 / tl.sqrt_rn(tl.sum(squares) / size + eps)
    if residual is not None:
        tl.debug_barrier()  # the sum may be read by another thread than wrote it
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        if residual is not None:
            value = load_float(residual_out + row * residual_out_stride + i, i < size)
        else:
            value = load_float(x + i, i < size)
        store_float(out + i, value * scale * load_float(weight + i, i < size), i < size)


def _launch(
    out: Tensor, x: Tensor, weight: Tensor, residual: Tensor | None, residual_out: Tensor | None, eps: float
) -> None:
    rows, out_rows = rows_of(x), rows_of(out)
    if rows.size == 0:
        return
    # Where one of both has a single stride, it is a special case of the other's two. Where both have, the outer one is
    # of no row; it would be the size of the whole tensor, which may not fit in 32 bits.
    has_outer = rows.outer_stride is not None or out_rows.outer_stride is not None
    inner = rows.inner if rows.outer_stride is not None else out_rows.inner

    def outer_stride(of: Rows) -> int:
        if of.outer_stride is not None:
            return of.outer_stride
        return inner * of.stride if has_outer else 0

    launch(
        rms_norm_kernel,
        (rows.num_rows,),
        out,
        x,
        weight,
        residual,
        residual_out,
        rows.size,
        eps,
        inner,
        rows.stride,
        outer_stride(rows),
        out_rows.stride,
        outer_stride(out_rows),
        0 if residual is None else rows_of(residual).stride,
        0 if residual_out is None else rows_of(residual_out).stride,
        BLOCK=power_of_two(rows.size, 16, 4096),
        num_warps=8 if rows.size > 2048 else 4,
    )


def rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """Launch the kernel."""
    _launch(out, x, weight, None, None, eps)


def fused_add_rms_norm(
    out: Tensor, residual_out: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> None:
    """Launch the kernel with a residual."""
    _launch(out, x, weight, residual, residual_out, eps)
