"""Draws a token per row of logits: one program per row.

Weights are integers in units of 2^-40 of the largest, so that their sums are exact in any order, and a draw is integer
arithmetic alone. There is no sort. A filter keeps a prefix of the order "larger logit first, lower id first among
equals": it ends at a key (the logit's bits, ordered) that is found bit by bit, and after so many tokens that have it.

Bytes: the row twice without filters, 33 times more for each of top-k and top-p, of which all but the first come from
L2. 2048 logits are 8 to a thread of 8 warps, with which no target spills a register; a row is never split, so that its
sums need no second kernel. Bound by the latency of the passes: a batch of fewer rows than multiprocessors leaves the
others idle.
"""

from __future__ import annotations

from torch import Tensor

from teco_kernels.triton_kernels._language import jit, tl
from teco_kernels.triton_kernels._launch import launch, power_of_two
from teco_kernels.triton_kernels.common import load_float
from teco_kernels.triton_kernels.random import draw_below, random_bits, to_units


@jit
def _load(logits, i, size):
    return tl.where(i < size, load_float(logits + i, i < size), -float("inf"))


@jit
def _key(x):
    """int64 from 0 to 2^32 - 1, ordered as the numbers are; both zeros are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -1 - bits, bits + 0x80000000)


@jit
def _weigh(x, largest, temperature, min_p):
    weight = tl.exp((x - largest) / temperature)
    return to_units(tl.where(weight < min_p, 0.0, weight))


@jit
def _measure(logits, size, largest, temperature, min_p, least_key, BY_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """Number of tokens that have a weight and at least this key, or their summed weight."""
    total = tl.zeros([BLOCK], tl.int64)
    for first in range(0, size, BLOCK):
        x = _load(logits, first + tl.arange(0, BLOCK), size)
        weight = _weigh(x, largest, temperature, min_p)
        counted = weight if BY_WEIGHT else (weight > 0).to(tl.int64)
        total += tl.where(_key(x) >= least_key, counted, 0)
    return tl.sum(total, axis=0)


@jit
def _weight_at(logits, size, largest, temperature, min_p, key, BLOCK: tl.constexpr):
    """Weight of each token that has this key; 0 when there is none."""
    found = tl.zeros([BLOCK], tl.int64)
    for first in range(0, size, BLOCK):
        x = _load(logits, first + tl.arange(0, BLOCK), size)
        found = tl.maximum(found, tl.where(_key(x) == key, _weigh(x, largest, temperature, min_p), 0))
    return tl.max(found, axis=0)


@jit
def sample_kernel(
    out,
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    offsets,
    size,
    logits_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    temperature, min_p = tl.load(temperatures + row), tl.load(min_ps + row)
    top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)

    has_nan = tl.zeros([BLOCK], tl.int32)
    most = tl.full([BLOCK], -float("inf"), tl.float32)
    for first in range(0, size, BLOCK):
        x = _load(logits, first + tl.arange(0, BLOCK), size)
        has_nan |= (x != x).to(tl.int32)
        most = tl.maximum(most, x)
    largest = tl.max(tl.where(most != most, 0.0, most), axis=0)
    is_valid = (tl.max(has_nan, axis=0) == 0) & (tl.abs(largest) < float("inf"))
    is_valid &= (temperature >= 0.0) & (temperature < float("inf")) & (top_k >= -1)
    is_valid &= (top_p > 0.0) & (top_p <= 1.0) & (min_p >= 0.0) & (min_p <= 1.0)
    if not is_valid:
        tl.store(out + row, -1)
    elif temperature == 0.0:
        found = tl.zeros([BLOCK], tl.int64) + size
        for first in range(0, size, BLOCK):
            i = first + tl.arange(0, BLOCK)
            x = _load(logits, i, size)
            found = tl.minimum(found, tl.where(x == largest, i, size).to(tl.int64))
        tl.store(out + row, tl.min(found, axis=0))
    else:
        # Kept are the tokens with a key above `last`, and the first `count` of those that have it.
        last, count, weight_of_last = row * 0 - 1, row * 0, row * 0
        total = _measure(logits, size, largest, temperature, min_p, last, True, BLOCK)
        if top_k > 0:
            last = row * 0
            for bit in range(32):
                key = last | ((row * 0 + 0x80000000) >> bit)
                reached = _measure(logits, size, largest, temperature, min_p, key, False, BLOCK) >= top_k
                last = tl.where(reached, key, last)
            count = top_k - _measure(logits, size, largest, temperature, min_p, last + 1, False, BLOCK)
            weight_of_last = _weight_at(logits, size, largest, temperature, min_p, last, BLOCK)
            total = _measure(logits, size, largest, temperature, min_p, last + 1, True, BLOCK) + count * weight_of_last
        if top_p < 1.0:
            target = tl.ceil(total.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64)
            lowest, at_lowest = last, count * weight_of_last
            last = row * 0
            for bit in range(32):
                key = last | ((row * 0 + 0x80000000) >> bit)
                above = _measure(logits, size, largest, temperature, min_p, tl.maximum(key, lowest + 1), True, BLOCK)
                reached = above + tl.where(key <= lowest, at_lowest, 0) >= target
                last = tl.where(reached, key, last)
            above = _measure(logits, size, largest, temperature, min_p, last + 1, True, BLOCK)
            weight_of_last = tl.maximum(_weight_at(logits, size, largest, temperature, min_p, last, BLOCK), 1)
            count = (target - above + weight_of_last - 1) // weight_of_last
            total = above + count * weight_of_last
        low, _high = random_bits(tl.load(seeds + row), tl.load(offsets + row), 0)
        point = draw_below(total, low)
        token, before, equals = row * 0, row * 0, row * 0
        for first in range(0, size, BLOCK):
            i = first + tl.arange(0, BLOCK)
            x = _load(logits, i, size)
            key = _key(x)
            is_last = ((key == last) & (i < size)).to(tl.int64)
            rank = equals + tl.cumsum(is_last, axis=0)
            is_kept = (key > last) | ((is_last == 1) & (rank <= count))
            weight = tl.where(is_kept, _weigh(x, largest, temperature, min_p), 0)
            reached = before + tl.cumsum(weight, axis=0)
            token += tl.sum(((reached <= point) & (i < size)).to(tl.int64), axis=0)
            before += tl.sum(weight, axis=0)
            equals += tl.sum(is_last, axis=0)
        tl.store(out + row, token)


def sample(
    out: Tensor,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    offset: Tensor,
) -> None:
    """Launch the kernel."""
    rows, size = logits.shape
    block = power_of_two(size, 16, 2048)
    launch(
        sample_kernel,
        (rows,),
        out,
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        offset,
        size,
        logits.stride(0),
        BLOCK=block,
        num_warps=8 if block > 1024 else 4,
    )
