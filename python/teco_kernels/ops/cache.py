"""Writing, copying and moving the blocks of a paged KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from teco_kernels.ops._library import operator, register_fake_writing_only

_reshape_and_cache = operator("reshape_and_cache")
_copy_blocks = operator("copy_blocks")
_swap_blocks = operator("swap_blocks")
register_fake_writing_only("reshape_and_cache", "copy_blocks", "swap_blocks")

#: Largest magnitude of an element of the dtypes that are stored with a scale.
ELEMENT_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def as_scale(scale: Tensor | float | None, cache: Tensor) -> Tensor | None:
    """A scale argument as the tensor that the operators take."""
    if scale is None or isinstance(scale, Tensor):
        return scale
    return torch.tensor(scale, dtype=torch.float32, device=cache.device)


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    key_scale: Tensor | float | None = None,
    value_scale: Tensor | float | None = None,
) -> None:
    """Write the keys and values of a step's tokens into their slots of the paged cache.

    Parameters
    ----------
    key, value : Tensor
        ``[T, Hkv, D]``, fp32, fp16 or bf16; stride 1 in the last dimension, any other strides.
    key_cache, value_cache : Tensor
        ``[num_blocks, B, Hkv, D]``, fp32, fp16, bf16, int8 or float8_e4m3fn; written. Any strides but 1 in the last
        dimension, so both NHD and HND layouts fit.
    slot_mapping : Tensor
        int64 ``[T]``: ``block * B + offset`` of each token, -1 to leave it out. No slot may occur twice.
    key_scale, value_scale : Tensor or float, optional
        For int8 and fp8 caches, and only for them. fp32 ``[num_blocks, B, Hkv]``: written, the largest magnitude of the
        token's head divided by 127 (int8) or 448 (fp8). One number (also as a tensor of one element): read, and
        elements beyond its range are clamped.

    Raises
    ------
    ValueError, TypeError
        Naming the argument; nothing was written.

    Notes
    -----
    A code is ``x * (1 / scale)`` in fp32, rounded to the nearest, ties to even. A head with a NaN or an infinity gets
    the scale NaN, so that whoever reads it sees NaN. With one number for all, NaN becomes 0 in int8 and NaN in fp8.
    """
    _reshape_and_cache(
        key, value, key_cache, value_cache, slot_mapping, as_scale(key_scale, key), as_scale(value_scale, key)
    )


def copy_blocks(key_cache: Tensor, value_cache: Tensor, block_mapping: Tensor) -> None:
    """Copy blocks within the caches, as a sequence does before it writes into a block that it shares.

    Parameters
    ----------
    key_cache, value_cache : Tensor
        ``[num_blocks, B, Hkv, D]`` of any dtype, or their scales, ``[num_blocks, B, Hkv]``; written.
    block_mapping : Tensor
        int64 ``[n, 2]``: source and destination block; done as if one row after the other.

    Raises
    ------
    ValueError, TypeError
        Naming the argument; nothing was written.
    """
    _copy_blocks(key_cache, value_cache, block_mapping)


def swap_blocks(source_cache: Tensor, target_cache: Tensor, block_mapping: Tensor) -> None:
    """Copy blocks from one cache to another, which may be on another device.

    Parameters
    ----------
    source_cache, target_cache : Tensor
        ``[num_blocks, B, Hkv, D]`` or ``[num_blocks, B, Hkv]``, equal but for `num_blocks`; `target_cache` is written.
    block_mapping : Tensor
        int64 ``[n, 2]``: block of the source, block of the target; on the CPU where the devices differ.

    Raises
    ------
    ValueError, TypeError
        Naming the argument; nothing was written.
    """
    if source_cache.device == target_cache.device:
        _swap_blocks(source_cache, target_cache, block_mapping)
        return
    source, target = block_mapping.unbind(1)
    blocks = source_cache[source.to(source_cache.device)]
    target_cache[target.to(target_cache.device)] = blocks.to(target_cache.device)


def dequantize_cache_reference(cache: Tensor, scale: Tensor | float | None) -> Tensor:
    """float64 values of a cache."""
    if scale is None:
        return cache.double()
    scale = torch.as_tensor(scale).double()
    return cache.double() * (scale.unsqueeze(-1) if scale.dim() == 3 else scale)


def reshape_and_cache_reference(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    key_scale: Tensor | float | None = None,
    value_scale: Tensor | float | None = None,
) -> None:
    """Reference of `reshape_and_cache`, slot by slot; codes are by definition those of fp32 arithmetic."""
    B = key_cache.shape[1]
    for heads, cache, scale in ((key, key_cache, key_scale), (value, value_cache, value_scale)):
        for head, slot in zip(heads.float(), slot_mapping.tolist(), strict=True):
            if slot < 0:
                continue
            place = (slot // B, slot % B)
            limit = ELEMENT_MAX.get(cache.dtype)
            if limit is None:
                cache[place] = head.to(cache.dtype)
                continue
            if isinstance(scale, Tensor) and scale.dim() == 3:
                scale[place] = head.abs().amax(-1) / limit
                factor = scale[place].reciprocal().nan_to_num(0, 0, 0).unsqueeze(-1)
            else:
                factor = torch.as_tensor(scale).reciprocal()
            scaled = (head * factor).clamp(-limit, limit)
            cache[place] = (scaled.round() if cache.dtype == torch.int8 else scaled).to(cache.dtype)


def copy_blocks_reference(key_cache: Tensor, value_cache: Tensor, block_mapping: Tensor) -> None:
    """Reference of `copy_blocks`."""
    for source, target in block_mapping.tolist():
        key_cache[target] = key_cache[source]
        value_cache[target] = value_cache[source]


def swap_blocks_reference(source_cache: Tensor, target_cache: Tensor, block_mapping: Tensor) -> None:
    """Reference of `swap_blocks`."""
    for source, target in block_mapping.tolist():
        target_cache[target] = source_cache[source]
