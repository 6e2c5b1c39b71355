"""Attention over a paged KV cache, for prefill, chunks of it, verification and decode alike.

A program takes a tile of query rows of one kv head (tokens times the heads of a group, so that a key is loaded once for
the group) and walks over the keys that they see, BLOCK_N at a time, with an online softmax. Sequences with few query
rows have their keys split among up to 32 programs, in multiples of 256 keys that follow from the sequence's own length,
and a second kernel merges what these leave in the workspace, split after split. So bits do not depend on the batch.

Bytes: keys and values that are seen, once per tile of rows. Decode is bound by them, and takes tiles of 16 rows, the
least that tensor cores multiply. Other calls take up to 64 rows, which read a key a quarter as often. How many keys and
rows there are to a tile is decided by what fits in registers and in shared memory (`tile_sizes`).

Where one row of a tile sees a key and another does not, the key's value is multiplied by 0 for that other: a NaN or an
infinity there, which only the first should meet, spoils both. Slots that no row of the tile sees may hold anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teco_kernels.triton_kernels._language import jit, tl
from teco_kernels.triton_kernels._launch import ceil_div, launch, power_of_two
from teco_kernels.triton_kernels.common import (
    finite_or_zero,
    from_float,
    operand,
    store_float,
    to_float,
)
from teco_kernels.triton_kernels.reshape_and_cache import cache_kind, scale_strides

CHUNK_KEYS = 256  # splits are of so many keys or a multiple
MAX_SPLITS = 32
NO_WINDOW = 2**30  # further than any two positions are apart, and added to one it is still of 32 bits
FEW_ROWS = 16  # sequences with so many query rows per kv head, or a group of them, have their keys split


@jit
def _split_keys(seq_len, num_rows, split_rows, CHUNK: tl.constexpr, SPLITS: tl.constexpr):
    """Keys of a split of this sequence."""
    keys = tl.cdiv(tl.cdiv(seq_len, CHUNK), SPLITS) * CHUNK
    return tl.where(num_rows > split_rows, tl.maximum(seq_len, 1), tl.maximum(keys, 1))


@jit
def _find_tile(query_start_loc, num_seqs, group, BLOCK_M: tl.constexpr, SEQS: tl.constexpr):
    """The sequence that this program's tile is of, and its first row; num_seqs behind the last tile.

    Sequences have their tiles one after the other; SEQS of them are counted at a time.
    """
    tile = tl.program_id(0)
    seq, begin, total = tile * 0, tile * 0, tile * 0
    for first in range(0, num_seqs, SEQS):
        s = first + tl.arange(0, SEQS)
        there = s < num_seqs
        start = tl.load(query_start_loc + s, mask=there, other=0)
        length = tl.load(query_start_loc + s + 1, mask=there, other=0) - start
        ends = total + tl.cumsum(tl.cdiv(length * group, BLOCK_M), axis=0)
        is_before = there & (ends <= tile)
        seq += tl.sum(is_before.to(tl.int32), axis=0)
        begin = tl.maximum(begin, tl.max(tl.where(is_before, ends, 0), axis=0))
        total = tl.max(ends, axis=0)
    return seq, (tile - begin) * BLOCK_M


@jit
def _dequantize(x, KIND: tl.constexpr, TYPE: tl.constexpr):
    """Elements of a cache as TYPE, exactly: codes of 8 bits fit in every floating type, but for their scale."""
    if KIND == "fp8":  # exponent and mantissa as those of a half, whose bias is greater by 8
        bits = x.to(tl.int16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        value = tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
        return from_float(value, TYPE)
    if KIND == "int8":
        return from_float(x.to(tl.float32), TYPE)
    if x.dtype == TYPE:
        return x
    return from_float(to_float(x), TYPE)


@jit
def _write_rows(
    out,
    lse,
    sinks,
    token,
    head,
    there,
    largest,
    total,
    sums,
    head_dim,
    num_heads,
    out_stride,
    out_head_stride,
    BLOCK_D: tl.constexpr,
):
    """Add the sink, normalise, and write out and lse of the rows."""
    weight = tl.full(total.shape, 1.0, tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=there, other=0.0)
        most = tl.maximum(largest, sink)
        shift = finite_or_zero(most)
        weight = tl.exp(largest - shift)
        total = total * weight + tl.exp(sink - shift)
        largest = most
    if lse is not None:
        tl.store(lse + token * num_heads + head, finite_or_zero(largest) + tl.log(total), mask=there)
    weight = tl.where(total == 0.0, 0.0, weight / tl.where(total == 0.0, 1.0, total))
    d = tl.arange(0, BLOCK_D)
    place = out + (token * out_stride + head * out_head_stride)[:, None] + d[None, :]
    store_float(place, sums * weight[:, None], there[:, None] & (d < head_dim)[None, :])


@jit
def paged_attention_kernel(
    out,
    lse,
    workspace,
    query,
    key_cache,
    value_cache,
    key_scale,
    value_scale,
    block_table,
    seq_lens,
    query_start_loc,
    alibi_slopes,
    sinks,
    num_seqs,
    num_heads,
    group,
    block_size,
    head_dim,
    split_rows,
    max_splits,
    sliding_window,
    scale,
    soft_cap,
    out_stride,
    out_head_stride,
    query_stride,
    query_head_stride,
    block_table_stride,
    key_block_stride,
    key_slot_stride,
    key_head_stride,
    value_block_stride,
    value_slot_stride,
    value_head_stride,
    key_scale_block_stride,
    key_scale_slot_stride,
    key_scale_head_stride,
    value_scale_block_stride,
    value_scale_slot_stride,
    value_scale_head_stride,
    CAUSAL: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    KIND: tl.constexpr,
    FP32: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    SEQS: tl.constexpr,
):
    kv_head, split = tl.program_id(1), tl.program_id(2)
    if query_start_loc is None:
        tiles = tl.cdiv(group, BLOCK_M)
        seq, first_row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    else:
        seq, first_row = _find_tile(query_start_loc, num_seqs, group, BLOCK_M, SEQS)
    if seq >= num_seqs:
        return
    if query_start_loc is None:
        first_token, query_len = seq, 1
    else:
        first_token = tl.load(query_start_loc + seq)
        query_len = tl.load(query_start_loc + seq + 1) - first_token
    seq_len = tl.load(seq_lens + seq)
    num_rows = query_len * group
    split_keys = _split_keys(seq_len, num_rows, split_rows, CHUNK, SPLITS)
    num_splits = tl.maximum(tl.cdiv(seq_len, split_keys), 1)
    if split >= num_splits:
        return

    row = first_row + tl.arange(0, BLOCK_M)
    there = row < num_rows
    token = (first_token + row // group).to(tl.int64)
    head = (kv_head * group + row % group).to(tl.int64)
    position = seq_len - query_len + row // group
    # Keys that a row sees: both ends grow with the row.
    begin, end = position * 0, position * 0 + seq_len
    if CAUSAL:
        end = tl.minimum(end, position + 1)
    # Not under an `if`: Triton would forget how keys and values are aligned, and load them element by element.
    begin = tl.maximum(begin, position - sliding_window + 1)
    end = tl.minimum(end, position + sliding_window)
    used_begin = tl.maximum(tl.min(tl.where(there, begin, 0x7FFFFFFF), axis=0), split * split_keys)
    used_end = tl.minimum(tl.max(tl.where(there, end, 0), axis=0), split * split_keys + split_keys)

    TYPE: tl.constexpr = tl.float32 if FP32 else query.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    place = query + (token * query_stride + head * query_head_stride)[:, None] + d[None, :]
    q = tl.load(place, mask=there[:, None] & (d < head_dim)[None, :], other=0.0)
    if FP32:
        q = to_float(q)
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + head, mask=there, other=0.0)
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(used_begin // BLOCK_N * BLOCK_N, used_end, BLOCK_N):
        k = first + tl.arange(0, BLOCK_N)
        is_used = (k >= used_begin) & (k < used_end)
        block = tl.load(block_table + seq.to(tl.int64) * block_table_stride + k // block_size, mask=is_used, other=0)
        block, slot = block.to(tl.int64), (k % block_size).to(tl.int64)
        keys = key_cache + kv_head.to(tl.int64) * key_head_stride + block * key_block_stride + slot * key_slot_stride
        key = tl.load(keys[None, :] + d[:, None], mask=is_used[None, :] & (d < head_dim)[:, None], other=0)
        scores = tl.dot(operand(q), operand(_dequantize(key, KIND, TYPE)), input_precision="ieee") * scale
        if KIND != "float":
            scales = (
                key_scale
                + kv_head.to(tl.int64) * key_scale_head_stride
                + block * key_scale_block_stride
                + slot * key_scale_slot_stride
            )
            scores *= tl.load(scales, mask=is_used, other=0.0)[None, :]
        if SOFT_CAP:
            scores = soft_cap * (1.0 - 2.0 / (tl.exp(scores / soft_cap * 2.0) + 1.0))
        if alibi_slopes is not None:
            scores += slopes[:, None] * (k[None, :] - position[:, None]).to(tl.float32)
        is_seen = is_used[None, :] & (k[None, :] >= begin[:, None]) & (k[None, :] < end[:, None])
        scores = tl.where(is_seen, scores, -float("inf"))

        most = tl.maximum(largest, tl.max(scores, axis=1))
        shift = finite_or_zero(most)
        correction = tl.exp(largest - shift)
        weights = tl.where(is_seen, tl.exp(scores - shift[:, None]), 0.0)
        largest = most
        total = total * correction + tl.sum(weights, axis=1)
        values = (
            value_cache
            + kv_head.to(tl.int64) * value_head_stride
            + block * value_block_stride
            + slot * value_slot_stride
        )
        value = tl.load(values[:, None] + d[None, :], mask=is_used[:, None] & (d < head_dim)[None, :], other=0)
        if KIND == "float":
            value = _dequantize(value, KIND, TYPE)
        else:  # the scale goes into the value: in fp16, a weight times a scale could be too small
            scales = (
                value_scale
                + kv_head.to(tl.int64) * value_scale_head_stride
                + block * value_scale_block_stride
                + slot * value_scale_slot_stride
            )
            scaled = _dequantize(value, KIND, tl.float32) * tl.load(scales, mask=is_used, other=0.0)[:, None]
            value = from_float(scaled, TYPE)
        sums = sums * correction[:, None]
        sums = tl.dot(operand(from_float(weights, TYPE)), operand(value), sums, input_precision="ieee")

    if num_splits == 1:
        _write_rows(
            out,
            lse,
            sinks,
            token,
            head,
            there,
            largest,
            total,
            sums,
            head_dim,
            num_heads,
            out_stride,
            out_head_stride,
            BLOCK_D,
        )
    else:
        index = ((seq.to(tl.int64) * tl.num_programs(1) + kv_head) * split_rows + row) * max_splits + split
        state = workspace + index * (head_dim + 2)
        tl.store(state, largest, mask=there)
        tl.store(state + 1, total, mask=there)
        tl.store(state[:, None] + 2 + d[None, :], sums, mask=there[:, None] & (d < head_dim)[None, :])


@jit
def merge_splits_kernel(
    out,
    lse,
    workspace,
    seq_lens,
    query_start_loc,
    sinks,
    num_heads,
    group,
    head_dim,
    split_rows,
    max_splits,
    out_stride,
    out_head_stride,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    seq, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if query_start_loc is None:
        first_token, query_len = seq, 1
    else:
        first_token = tl.load(query_start_loc + seq)
        query_len = tl.load(query_start_loc + seq + 1) - first_token
    num_rows = query_len * group
    seq_len = tl.load(seq_lens + seq)
    num_splits = tl.cdiv(seq_len, _split_keys(seq_len, num_rows, split_rows, CHUNK, SPLITS))
    if row >= num_rows or num_splits <= 1:
        return
    d = tl.arange(0, BLOCK_D)
    one = tl.arange(0, 1)
    index = ((seq.to(tl.int64) * tl.num_programs(1) + kv_head) * split_rows + row) * max_splits
    largest = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([1, BLOCK_D], tl.float32)
    for split in range(num_splits):
        state = workspace + (index + split) * (head_dim + 2)
        split_largest = tl.load(state + one)
        most = tl.maximum(largest, split_largest)
        shift = finite_or_zero(most)
        a, b = tl.exp(largest - shift), tl.exp(split_largest - shift)
        total = total * a + tl.load(state + 1 + one) * b
        part = tl.load(state + 2 + d, mask=d < head_dim, other=0.0)
        sums = sums * a[:, None] + part[None, :] * b[:, None]
        largest = most
    token = (first_token + row // group).to(tl.int64) + one
    head = (kv_head * group + row % group).to(tl.int64) + one
    _write_rows(
        out,
        lse,
        sinks,
        token,
        head,
        one == 0,
        largest,
        total,
        sums,
        head_dim,
        num_heads,
        out_stride,
        out_head_stride,
        BLOCK_D,
    )


def tile_sizes(block_d: int, kind: str, fp32: bool, is_decode: bool) -> dict[str, int]:
    """Rows and keys of a tile, warps and stages: the most rows, then keys, with which targets spill next to nothing.

    Products in fp32 are made without tensor cores, whose operands all lie in registers: they take a quarter of the
    tile. Elements of 8 bits take registers to be converted. The 64 KB of shared memory that gfx942 has are enough for
    each. See tests/data/triton_resources.json.
    """
    if block_d > 256:
        rows, keys, warps = 16, 16, 8
    elif is_decode:
        rows, keys = 16, 16 if fp32 and block_d > 128 else 32
        warps = 8 if fp32 or kind == "fp8" else 4
    elif fp32 or (kind != "float" and block_d > 128):
        rows, keys, warps = 32, 16, 8
    else:
        rows, keys, warps = 64, 64 if kind == "float" and block_d <= 64 else 32, 8
    # Two stages hold the next keys while these are used; of the largest heads there is no room for them.
    return {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": warps, "num_stages": 1 if block_d > 256 else 2}


def paged_attention(
    out: Tensor,
    lse: Tensor | None,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    scale: float,
    soft_cap: float,
    sliding_window: int,
    causal: bool,
) -> None:
    """Launch both kernels."""
    tokens, num_heads, head_dim = query.shape
    num_seqs, max_blocks = block_table.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    if num_seqs == 0:
        return
    group = num_heads // num_kv_heads
    split_rows = group if query_start_loc is None else max(group, FEW_ROWS)
    max_splits = max(min(ceil_div(max_blocks * block_size, CHUNK_KEYS), MAX_SPLITS), 1)
    block_d = power_of_two(head_dim, 16)
    kind = cache_kind(key_cache)
    # In fp32 where either is, and where 16-bit types differ; else in the query's own, which holds every 8-bit code.
    fp32 = query.dtype == torch.float32 or (kind == "float" and key_cache.dtype != query.dtype)
    sizes = tile_sizes(block_d, kind, fp32, query_start_loc is None)
    block_m = sizes["BLOCK_M"]
    # Every sequence has one tile that is not full, at the most.
    tiles = num_seqs * ceil_div(group, block_m) if query_start_loc is None else tokens * group // block_m + num_seqs
    if kind == "fp8":
        key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.uint8)
    places = num_seqs * num_kv_heads * split_rows * max_splits if max_splits > 1 else 0
    workspace = torch.empty(places * (head_dim + 2), dtype=torch.float32, device=query.device)
    shared: dict[str, Any] = {"BLOCK_D": block_d, "CHUNK": CHUNK_KEYS, "SPLITS": MAX_SPLITS}
    launch(
        paged_attention_kernel,
        (tiles, num_kv_heads, max_splits),
        out,
        lse,
        workspace,
        query,
        key_cache,
        value_cache,
        key_scale,
        value_scale,
        block_table,
        seq_lens,
        query_start_loc,
        alibi_slopes,
        sinks,
        num_seqs,
        num_heads,
        group,
        block_size,
        head_dim,
        split_rows,
        max_splits,
        min(sliding_window or NO_WINDOW, NO_WINDOW),
        scale,
        soft_cap,
        *out.stride()[:2],
        *query.stride()[:2],
        block_table.stride(0),
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        *scale_strides(key_scale),
        *scale_strides(value_scale),
        CAUSAL=causal,
        SOFT_CAP=soft_cap != 0,
        KIND=kind,
        FP32=fp32,
        SEQS=128,
        **sizes,
        **shared,
    )
    if max_splits > 1:
        launch(
            merge_splits_kernel,
            (num_seqs, num_kv_heads, split_rows),
            out,
            lse,
            workspace,
            seq_lens,
            query_start_loc,
            sinks,
            num_heads,
            group,
            head_dim,
            split_rows,
            max_splits,
            *out.stride()[:2],
            num_warps=1 if head_dim <= 128 else 4,
            **shared,
        )
