"""The largest logit of each row, without the logits: a matmul whose tiles leave two or three numbers per row.

Bytes: those of the weight, once per tile of rows; bound as the matmul is. A second kernel, a program per row, goes over
what the tiles left, in their order: 20 bytes for 32 or 64 columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teco_kernels.triton_kernels._language import jit, tl
from teco_kernels.triton_kernels._launch import ceil_div, launch, power_of_two
from teco_kernels.triton_kernels.common import finite_or_zero
from teco_kernels.triton_kernels.gptq_layout import layout_arguments
from teco_kernels.triton_kernels.matmul import block_sizes, dense_arguments, dense_tile, gptq_tile


@jit
def _store_best(logits, bias, row, column, num_rows, out_features, largest, ids, sums):
    """Leave the tile's largest logit (NaN where there is one), its lowest column, and the sum below it."""
    if bias is not None:
        logits += tl.load(bias + column, mask=column < out_features, other=0.0)[None, :]
    logits = tl.where((column < out_features)[None, :], logits, -float("inf"))
    has_nan = tl.max((logits != logits).to(tl.int32), axis=1) == 1
    best = tl.max(tl.where(has_nan[:, None], 0.0, logits), axis=1)
    best_column = tl.min(tl.where(logits == best[:, None], column[None, :], out_features - 1), axis=1)
    place = tl.program_id(1).to(tl.int64) * num_rows + row
    tl.store(largest + place, tl.where(has_nan, float("nan"), best), mask=row < num_rows)
    tl.store(ids + place, best_column, mask=row < num_rows)
    if sums is not None:
        total = tl.sum(tl.exp(logits - finite_or_zero(best)[:, None]), axis=1)
        tl.store(sums + place, total, mask=row < num_rows)


@jit
def dense_argmax_kernel(
    largest,
    ids,
    sums,
    x,
    weight,
    bias,
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
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    logits = dense_tile(
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
    _store_best(logits, bias, row, column, num_rows, out_features, largest, ids, sums)


@jit
def gptq_argmax_kernel(
    largest,
    ids,
    sums,
    x,
    weight,
    input_order,
    bias,
    num_rows,
    out_features,
    x_stride,
    num_groups,
    blocks_per_group,
    group_bytes,
    BITS: tl.constexpr,
    MINIMUM: tl.constexpr,
    INT8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # In fp32 whatever the dtype: logits are compared, and given, as exact as they are.
    logits = gptq_tile(
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
        True,
        BLOCK_M,
        BLOCK_N,
    )
    _store_best(logits, bias, row, column, num_rows, out_features, largest, ids, sums)


@jit
def merge_argmax_kernel(token_ids, logits, logsumexp, largest, ids, sums, num_rows, num_tiles, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    has_nan, best, best_id = row * 0, -float("inf"), row * 0
    for first in range(0, num_tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        place = tile.to(tl.int64) * num_rows + row
        x = tl.load(largest + place, mask=tile < num_tiles, other=-float("inf"))
        column = tl.load(ids + place, mask=tile < num_tiles, other=0)
        has_nan = tl.maximum(has_nan, tl.max((x != x).to(tl.int64), axis=0))
        x = tl.where(x != x, -float("inf"), x)
        here = tl.max(x, axis=0)
        first_id = tl.min(tl.where((x == here) & (tile < num_tiles), column, 1 << 62), axis=0)
        is_better = (here > best) | (first == 0)
        best_id = tl.where(is_better, first_id, best_id)
        best = tl.where(is_better, here, best)
    tl.store(token_ids + row, tl.where(has_nan == 1, -1, best_id))
    tl.store(logits + row, tl.where(has_nan == 1, float("nan"), best + 0.0))
    if logsumexp is not None:
        shift = finite_or_zero(best)
        total = 0.0
        for first in range(0, num_tiles, BLOCK):
            tile = first + tl.arange(0, BLOCK)
            place = tile.to(tl.int64) * num_rows + row
            x = tl.load(largest + place, mask=tile < num_tiles, other=-float("inf"))
            s = tl.load(sums + place, mask=tile < num_tiles, other=0.0)
            total += tl.sum(tl.where(x == -float("inf"), 0.0, s * tl.exp(x - shift)), axis=0)
        result = tl.where(tl.abs(best) == float("inf"), best, best + tl.log(total))
        tl.store(logsumexp + row, tl.where(has_nan == 1, float("nan"), result))


def _merge(
    token_ids: Tensor, logits: Tensor, logsumexp: Tensor | None, largest: Tensor, ids: Tensor, sums: Tensor | None
) -> None:
    num_tiles, num_rows = largest.shape
    block = power_of_two(num_tiles, 16, 1024)
    launch(
        merge_argmax_kernel,
        (num_rows,),
        token_ids,
        logits,
        logsumexp,
        largest,
        ids,
        sums,
        num_rows,
        num_tiles,
        BLOCK=block,
    )


def _workspace(
    blocks: dict[str, int], logsumexp: Tensor | None, hidden: Tensor, out_features: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    shape = (ceil_div(out_features, blocks["BLOCK_N"]), len(hidden))
    largest, ids = (torch.empty(shape, dtype=dtype, device=hidden.device) for dtype in (torch.float32, torch.int64))
    return largest, ids, None if logsumexp is None else torch.empty_like(largest)


def lm_head_argmax(
    token_ids: Tensor,
    logits: Tensor,
    logsumexp: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_features: int,
) -> None:
    """Launch both kernels."""
    rows, size = hidden.shape
    constants = dense_arguments(hidden, weight)
    blocks = block_sizes(rows, constants["FP32"])
    workspace = _workspace(blocks, logsumexp, hidden, out_features)
    launch(
        dense_argmax_kernel,
        (ceil_div(rows, blocks["BLOCK_M"]), ceil_div(out_features, blocks["BLOCK_N"])),
        *workspace,
        hidden,
        weight,
        bias,
        rows,
        size,
        out_features,
        hidden.stride(0),
        weight.stride(0),
        **constants,
        **blocks,
        num_stages=3,
    )
    _merge(token_ids, logits, logsumexp, *workspace)


def gptq_lm_head_argmax(
    token_ids: Tensor,
    logits: Tensor,
    logsumexp: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    input_order: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    has_minimum: bool,
    int8_activation: bool,
) -> None:
    """Launch both kernels, for a packed head."""
    blocks = block_sizes(len(hidden), not int8_activation)
    workspace = _workspace(blocks, logsumexp, hidden, out_features)
    launch(
        gptq_argmax_kernel,
        (ceil_div(len(hidden), blocks["BLOCK_M"]), ceil_div(out_features, blocks["BLOCK_N"])),
        *workspace,
        hidden,
        weight,
        input_order,
        bias,
        len(hidden),
        out_features,
        hidden.stride(0),
        *layout_arguments(weight, bits).values(),
        BITS=bits,
        MINIMUM=has_minimum,
        INT8=int8_activation,
        **blocks,
        num_stages=3,
    )
    _merge(token_ids, logits, logsumexp, *workspace)
