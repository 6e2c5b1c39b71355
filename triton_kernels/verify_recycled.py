"""How many recycled tokens stand: those that the target agrees with, or those that the rejection rule accepts.

A program per sequence. The rule looks at two numbers per recycled token and at one or two whole rows where it draws the
next one, twice (the second time from L2): bound by reading these. Blocks of 2048 probabilities: as in sample.py.
"""

from __future__ import annotations

from torch import Tensor

from teco_kernels.triton_kernels._language import jit, tl
from teco_kernels.triton_kernels._launch import launch, power_of_two
from teco_kernels.triton_kernels.common import load_float
from teco_kernels.triton_kernels.random import draw_below, random_bits, to_units


@jit
def verify_recycled_kernel(out, target, recycled, num_recycled, target_stride, recycled_stride, BLOCK: tl.constexpr):
    s = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    a = tl.load(target + s * target_stride + i, mask=i < num_recycled, other=0)
    b = tl.load(recycled + s * recycled_stride + i, mask=i < num_recycled, other=0)
    first_other = tl.min(tl.where((a != b) & (i < num_recycled), i, num_recycled), axis=0)
    tl.store(out + s, first_other.to(tl.int32))


@jit
def _is_probability(x):
    return (x >= 0.0) & (x <= 1.001)  # a softmax in fp32 may exceed 1


@jit
def _weights(target, recycled, i, size, is_rejected):
    p = load_float(target + i, i < size)
    q = load_float(recycled + i, i < tl.where(is_rejected, size, 0))
    return to_units(tl.maximum(p - q, 0.0)), _is_probability(p) & _is_probability(q)


@jit
def _token_at(target, recycled, size, is_rejected, point, BLOCK: tl.constexpr):
    token, before = point * 0, point * 0
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        weight, _valid = _weights(target, recycled, i, size, is_rejected)
        reached = before + tl.cumsum(weight, axis=0)
        token += tl.sum(((reached <= point) & (i < size)).to(tl.int64), axis=0)
        before += tl.sum(weight, axis=0)
    return token


@jit
def _total(target, recycled, size, is_rejected, BLOCK: tl.constexpr):
    """Summed weights, and whether all that they are made of are probabilities."""
    total, valid = tl.zeros([BLOCK], tl.int64), tl.full([BLOCK], 1, tl.int32)
    for first in range(0, size, BLOCK):
        weight, is_valid = _weights(target, recycled, first + tl.arange(0, BLOCK), size, is_rejected)
        total += weight
        valid &= is_valid.to(tl.int32)
    return tl.sum(total, axis=0), tl.min(valid, axis=0)


@jit
def verify_recycled_sampled_kernel(
    num_accepted,
    next_token_ids,
    target,
    recycled,
    token_ids,
    seeds,
    offsets,
    num_recycled,
    size,
    target_stride,
    target_row_stride,
    recycled_stride,
    recycled_row_stride,
    token_ids_stride,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    seed, offset = tl.load(seeds + s), tl.load(offsets + s)
    target += s * target_stride
    recycled += s * recycled_stride
    n = tl.arange(0, BLOCK_K).to(tl.int64)
    drawn = n < num_recycled
    token = tl.load(token_ids + s * token_ids_stride + n, mask=drawn, other=0)
    known = drawn & (token >= 0) & (token < size)  # on a GPU nobody has looked: an unknown one is rejected
    p = load_float(target + n * target_row_stride + token, known)
    q = load_float(recycled + n * recycled_row_stride + token, known)
    low, _high = random_bits(seed + n * 0, offset + n, 1)
    uniform = (low >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16  # 2^-53
    accepted = uniform * q.to(tl.float64) < p.to(tl.float64)
    is_valid = _is_probability(p) & _is_probability(q)
    stop = tl.min(tl.where(drawn & ~(accepted & is_valid), n, num_recycled), axis=0)
    looked_at_valid = tl.min(tl.where((n == stop) & drawn & ~is_valid, 0, 1), axis=0)
    is_rejected = stop < num_recycled

    row = target + stop * target_row_stride
    other = recycled + tl.where(is_rejected, stop, 0) * recycled_row_stride
    total, row_valid = _total(row, other, size, is_rejected, BLOCK)
    if is_rejected & (total == 0):
        # p nowhere exceeds q: the two are the same but for rounding, which is all that the rejection came of.
        is_rejected = stop < 0
        total, row_valid = _total(row, other, size, is_rejected, BLOCK)
    _low, high = random_bits(seed, offset + stop, 1)
    next_token = _token_at(row, other, size, is_rejected, draw_below(total, high), BLOCK)
    is_valid_row = (looked_at_valid == 1) & (row_valid == 1) & (total > 0)
    tl.store(next_token_ids + s, tl.where(is_valid_row, next_token, -1))
    tl.store(num_accepted + s, tl.where(is_valid_row, stop, 0).to(tl.int32))


def verify_recycled(out: Tensor, target: Tensor, recycled: Tensor) -> None:
    """Launch the kernel."""
    sequences, num_recycled = recycled.shape
    launch(
        verify_recycled_kernel,
        (sequences,),
        out,
        target,
        recycled,
        num_recycled,
        target.stride(0),
        recycled.stride(0),
        BLOCK=power_of_two(num_recycled, 16),
        num_warps=1,
    )


def verify_recycled_sampled(
    num_accepted: Tensor,
    next_token_ids: Tensor,
    target_probs: Tensor,
    recycled_probs: Tensor,
    recycled_token_ids: Tensor,
    seed: Tensor,
    offset: Tensor,
) -> None:
    """Launch the kernel."""
    sequences, num_recycled, size = recycled_probs.shape
    block = power_of_two(size, 16, 2048)
    launch(
        verify_recycled_sampled_kernel,
        (sequences,),
        num_accepted,
        next_token_ids,
        target_probs,
        recycled_probs,
        recycled_token_ids,
        seed,
        offset,
        num_recycled,
        size,
        *target_probs.stride()[:2],
        *recycled_probs.stride()[:2],
        recycled_token_ids.stride(0),
        BLOCK_K=power_of_two(num_recycled, 16),
        BLOCK=block,
        num_warps=8 if block > 1024 else 4,
    )
