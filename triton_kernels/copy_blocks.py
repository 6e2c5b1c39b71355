"""Copies whole blocks, within a cache or from one to another.

Bytes: a read and a write of each. A program takes the same 1024 elements of every block, pair after pair, so that a
block that is written first and read later needs no more than a barrier of the program. Parts of a block are all the
parallelism there is: for a few pairs of large blocks, as copy-on-write has them, that is enough.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teco_kernels.triton_kernels._language import jit, tl
from teco_kernels.triton_kernels._launch import ceil_div, launch

BLOCK = 1024
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@jit
def copy_blocks_kernel(
    source,
    target,
    block_mapping,
    num_pairs,
    slots,
    heads,
    size,
    source_block_stride,
    source_slot_stride,
    source_head_stride,
    target_block_stride,
    target_slot_stride,
    target_head_stride,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot, head, element = i // (heads * size), i // size % heads, i % size
    source += slot * source_slot_stride + head * source_head_stride + element
    target += slot * target_slot_stride + head * target_head_stride + element
    for pair in range(num_pairs):
        source_block = tl.load(block_mapping + 2 * pair)
        target_block = tl.load(block_mapping + 2 * pair + 1)
        x = tl.load(source + source_block * source_block_stride, mask=slot < slots)
        tl.store(target + target_block * target_block_stride, x, mask=slot < slots)
        tl.debug_barrier()


def _copy(source: Tensor, target: Tensor, block_mapping: Tensor) -> None:
    if source.dim() == 3:  # scales
        source, target = source.unsqueeze(2), target.unsqueeze(2)
    integer = _INTEGERS[source.element_size()]  # bytes are moved, whatever they stand for
    _, slots, heads, size = source.shape
    launch(
        copy_blocks_kernel,
        (ceil_div(slots * heads * size, BLOCK),),
        source.view(integer),
        target.view(integer),
        block_mapping,
        len(block_mapping),
        slots,
        heads,
        size,
        *source.stride()[:3],
        *target.stride()[:3],
        BLOCK=BLOCK,
    )


def copy_blocks(key_cache: Tensor, value_cache: Tensor, block_mapping: Tensor) -> None:
    """Launch the kernel for keys, then for values."""
    _copy(key_cache, key_cache, block_mapping)
    _copy(value_cache, value_cache, block_mapping)


def swap_blocks(source_cache: Tensor, target_cache: Tensor, block_mapping: Tensor) -> None:
    """Launch the kernel."""
    _copy(source_cache, target_cache, block_mapping)
