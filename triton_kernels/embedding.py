"""Gathers rows of the embedding matrix, converting them on the way: a program per token and 1024 columns.

Bytes: one read and one write of every element; bound by bandwidth when there are many tokens, else by latency. 1024
columns are 8 elements to a thread, a load of 16 bytes. Of a packed weight a row is a column of its panels, 4 bytes of
every 64 that are read.
"""

from __future__ import annotations

from torch import Tensor

from teco_kernels.triton_kernels._language import jit, tl
from teco_kernels.triton_kernels._launch import ceil_div, launch, power_of_two
from teco_kernels.triton_kernels.common import load_float, store_float
from teco_kernels.triton_kernels.gptq_layout import layout_arguments, load_header, quad_words


@jit
def embedding_kernel(
    out, token_ids, weight, first_token, vocab_size, size, out_stride, weight_stride, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(token_ids + token) - first_token
    read = tl.where((row >= 0) & (row < vocab_size), size, 0)  # zeros stand for tokens of other parts
    x = load_float(weight + row * weight_stride + i, i < read)
    store_float(out + token * out_stride + i, x, i < size)


@jit
def gptq_embedding_kernel(
    out,
    token_ids,
    weight,
    input_order,
    first_token,
    vocab_size,
    out_stride,
    num_groups,
    blocks_per_group,
    group_bytes,
    BITS: tl.constexpr,
    MINIMUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(token_ids + token) - first_token
    there = (row >= 0) & (row < vocab_size)
    row = tl.where(there, row, 0)
    in_weight = place < num_groups * blocks_per_group * 32
    block = tl.where(in_weight, place // 32, 0)
    group = weight + ((row // 16) * num_groups + block // blocks_per_group) * group_bytes
    scale, offset = load_header(group, row % 16)
    words = quad_words(group + 64 + (block % blocks_per_group) * (BITS * 64), place % 32 // 4, row % 16, BITS)
    code = ((words >> (place % 4 * 8).to(tl.uint32)) & 255).to(tl.float32)
    x = scale * code + offset if MINIMUM else scale * (code - offset)
    x = tl.where(there, x, 0.0)
    i = place
    if input_order is not None:
        i = tl.load(input_order + place, mask=in_weight, other=-1)
    store_float(out + token * out_stride + i, x, in_weight & (i >= 0))


def embedding(out: Tensor, token_ids: Tensor, weight: Tensor, first_token: int | None) -> None:
    """Launch the kernel."""
    vocab_size, size = weight.shape
    block = power_of_two(size, 16, 1024)
    grid = (len(token_ids), ceil_div(size, block))
    launch(
        embedding_kernel,
        grid,
        out,
        token_ids,
        weight,
        first_token or 0,
        vocab_size,
        size,
        out.stride(0),
        weight.stride(0),
        BLOCK=block,
    )


def gptq_embedding(
    out: Tensor,
    token_ids: Tensor,
    weight: Tensor,
    input_order: Tensor | None,
    vocab_size: int,
    hidden_size: int,  # as that of `out`, which the operator checks
    bits: int,
    has_minimum: bool,
    first_token: int | None,
) -> None:
    """Launch the kernel of a packed weight."""
    if vocab_size == 0:  # a part of the vocabulary without tokens: there is no row to read in place of others
        out.zero_()
        return
    layout = layout_arguments(weight, bits)
    places = layout["num_groups"] * layout["blocks_per_group"] * 32
    block = power_of_two(places, 32, 1024)
    launch(
        gptq_embedding_kernel,
        (len(token_ids), ceil_div(places, block)),
        out,
        token_ids,
        weight,
        input_order,
        first_token or 0,
        vocab_size,
        out.stride(0),
        *layout.values(),
        BITS=bits,
        MINIMUM=has_minimum,
        BLOCK=block,
    )
