"""Merges two attention states per row (token and head): a program per row.

Bytes: two rows read, one written; bound by bandwidth. Symmetric in a and b, bit for bit: both products are rounded
before they are added, which the options of every launch see to (_launch.py).
"""

from __future__ import annotations

from torch import Tensor

from teco_kernels.triton_kernels._language import jit, tl
from teco_kernels.triton_kernels._launch import launch, power_of_two
from teco_kernels.triton_kernels.common import finite_or_zero, load_float, store_float


@jit
def merge_attention_states_kernel(
    out,
    lse,
    out_a,
    lse_a,
    out_b,
    lse_b,
    head_dim,
    out_stride,
    out_head_stride,
    a_stride,
    a_head_stride,
    b_stride,
    b_head_stride,
    lse_stride,
    lse_a_stride,
    lse_b_stride,
    BLOCK: tl.constexpr,
):
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    a, b = tl.load(lse_a + t * lse_a_stride + h), tl.load(lse_b + t * lse_b_stride + h)
    shift = finite_or_zero(tl.maximum(a, b))
    a, b = tl.exp(a - shift), tl.exp(b - shift)
    total = a + b
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
    tl.debug_barrier()  # `lse` may be one of the states: all threads have read theirs before one of them writes
    tl.store(lse + t * lse_stride + h, shift + tl.log(total))
    i = tl.arange(0, BLOCK)
    part_a = load_float(out_a + t * a_stride + h * a_head_stride + i, i < head_dim) * (a * inverse)
    part_b = load_float(out_b + t * b_stride + h * b_head_stride + i, i < head_dim) * (b * inverse)
    # An empty state has weight 0 and may hold anything.
    part_a = tl.where(a == 0.0, 0.0, part_a)
    part_b = tl.where(b == 0.0, 0.0, part_b)
    store_float(out + t * out_stride + h * out_head_stride + i, part_a + part_b, i < head_dim)


def merge_attention_states(
    out: Tensor, lse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> None:
    """Launch the kernel."""
    tokens, heads, head_dim = out_a.shape
    launch(
        merge_attention_states_kernel,
        (tokens, heads),
        out,
        lse,
        out_a,
        lse_a,
        out_b,
        lse_b,
        head_dim,
        *out.stride()[:2],
        *out_a.stride()[:2],
        *out_b.stride()[:2],
        lse.stride(0),
        lse_a.stride(0),
        lse_b.stride(0),
        BLOCK=power_of_two(head_dim, 16),
        num_warps=1 if head_dim <= 128 else 4,
    )
