"""Where things lie in a packed GPTQ weight; the layout itself is described at GptqMatmulParams in csrc/params.h."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from teco_kernels.triton_kernels._language import jit, tl


@jit
def quad_words(block, quad, column, BITS: tl.constexpr):
    """Quads `quad` (0 to 7) of columns `column` (of a panel) in the blocks that `block` points to: a code to a byte.

    A word of 4 bytes holds the same four inputs of several quads; those that share one find it in L1.
    """
    words = block.to(tl.pointer_type(tl.uint32)) + column
    if BITS == 3:
        low = tl.load(words + (quad // 2) * 16, mask=quad < 6, other=0) >> (quad % 2 * 3).to(tl.uint32) & 0x07070707
        top = tl.load(words + (quad - 6) * 16, mask=quad >= 6, other=0) >> 6 & 0x03030303
        # A shift by less than 0 would be undefined, and so would all that is made of it, also where `other` is shifted.
        shift = tl.maximum(quad - 2, 0).to(tl.uint32)
        high = tl.load(words + 32, mask=quad >= 6, other=0) >> shift & 0x04040404
        return low | top | high
    PER_WORD: tl.constexpr = 8 // BITS
    MASK: tl.constexpr = 0x01010101 * ((1 << BITS) - 1)
    return (tl.load(words + (quad // PER_WORD) * 16) >> (quad % PER_WORD * BITS).to(tl.uint32)) & MASK


@jit
def load_header(group, column):
    """Scale and offset (zero point or minimum) of columns in their groups, fp32."""
    halves = group.to(tl.pointer_type(tl.float16)) + column
    return tl.load(halves).to(tl.float32), tl.load(halves + 16).to(tl.float32)


@jit
def codes_of_block(block, column, BITS: tl.constexpr, N: tl.constexpr):
    """Codes int32 [32, N] of one block; `block` and `column` are [N]."""
    quad = tl.broadcast_to(tl.arange(0, 8)[:, None], (8, N))
    words = quad_words(tl.broadcast_to(block[None, :], (8, N)), quad, tl.broadcast_to(column[None, :], (8, N)), BITS)
    shifts = (tl.arange(0, 4) * 8).to(tl.uint32)
    codes = (words[:, None, :] >> shifts[None, :, None]) & 255
    return tl.reshape(codes, (32, N)).to(tl.int32)


def layout_arguments(weight: Tensor, bits: int) -> dict[str, Any]:
    """Sizes of a packed weight, as the kernels take them."""
    blocks_per_group = (weight.shape[2] - 64) // (64 * bits)
    return {"num_groups": weight.shape[1], "blocks_per_group": blocks_per_group, "group_bytes": weight.shape[2]}
