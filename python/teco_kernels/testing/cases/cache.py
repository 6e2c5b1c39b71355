"""Cases of `reshape_and_cache`, `copy_blocks` and `swap_blocks`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

from teco_kernels.ops import cache
from teco_kernels.testing.case import TOLERANCE, Case, Inputs

# (tokens, block size, kv heads, head_dim, blocks): a decode step, ragged heads, an empty batch, a prefill.
SHAPES = [(3, 16, 3, 64, 5), (7, 4, 2, 37, 6), (0, 16, 1, 64, 2), (1024, 16, 8, 128, 300)]
CACHE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)


def make_cache(num_blocks: int, B: int, Hkv: int, D: int, dtype: torch.dtype, layout: str = "NHD") -> torch.Tensor:
    """A cache ``[num_blocks, B, Hkv, D]`` of zeros; "HND" keeps the slots of a head together."""
    if layout == "NHD":
        return torch.zeros(num_blocks, B, Hkv, D, dtype=dtype)
    return torch.zeros(num_blocks, Hkv, B, D, dtype=dtype).transpose(1, 2)


def _write_inputs(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    layout: str,
    scale: str,
    generator: torch.Generator,
) -> Inputs:
    tokens, B, Hkv, D, num_blocks = shape
    slots = torch.randperm(num_blocks * B - 1, generator=generator)[:tokens] + 1
    slots[:1], slots[1:2] = 0, -1
    inputs: Inputs = {
        "key": torch.randn(tokens, Hkv, D, generator=generator).to(dtype),
        "value": torch.randn(tokens, Hkv, D, generator=generator).to(dtype),
        "key_cache": make_cache(num_blocks, B, Hkv, D, cache_dtype, layout),
        "value_cache": make_cache(num_blocks, B, Hkv, D, cache_dtype, layout),
        "slot_mapping": slots,
    }
    for name in ("key_scale", "value_scale"):
        if scale == "per_slot":
            inputs[name] = torch.zeros(num_blocks, B, Hkv)
        elif scale == "one":  # small enough that some elements are clamped
            inputs[name] = torch.tensor(2.0 / cache.ELEMENT_MAX[cache_dtype])
    return inputs


def _write_case(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, cache_dtype: torch.dtype, layout: str, scale: str
) -> Case:
    tokens, B, Hkv, D, num_blocks = shape
    scales = ("key_scale", "value_scale") if scale == "per_slot" else ()
    return Case(
        operator="reshape_and_cache",
        params={
            "tokens": tokens,
            "B": B,
            "Hkv": Hkv,
            "D": D,
            "num_blocks": num_blocks,
            "cache_dtype": str(cache_dtype).removeprefix("torch."),
            "layout": layout,
            "scale": scale,
        },
        dtype=dtype,
        make_inputs=partial(_write_inputs, shape, dtype, cache_dtype, layout, scale),
        function=cache.reshape_and_cache,
        reference=cache.reshape_and_cache_reference,
        mutates=("key_cache", "value_cache", *scales),
        max_error=0.0,
        bytes_moved=2 * tokens * Hkv * (D * (dtype.itemsize + cache_dtype.itemsize) + (4 if scales else 0)),
        flops=0,
        benchmark=tokens >= 512 and layout == "NHD",
    )


def _block_shape(num_blocks: int) -> tuple[int, int, int]:
    """Block size, kv heads and head_dim: round in the large case, ragged in the small one."""
    return (16, 3, 64) if num_blocks > 8 else (5, 3, 37)


def _copy_inputs(num_blocks: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    def blocks() -> torch.Tensor:
        return torch.randn(num_blocks, *_block_shape(num_blocks), generator=generator).to(dtype)

    # Row 2 reads what row 0 has written.
    mapping = torch.tensor([[0, 2], [1, 3], [2, 4]])[:num_blocks]
    if num_blocks > 8:
        mapping = torch.randperm(num_blocks, generator=generator)[: num_blocks // 2 * 2].view(-1, 2)
    return {"key_cache": blocks(), "value_cache": blocks(), "block_mapping": mapping}


def _swap_inputs(num_blocks: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    inputs = _copy_inputs(num_blocks, dtype, generator)
    return {
        "source_cache": inputs["key_cache"],
        "target_cache": inputs["value_cache"].transpose(1, 2).contiguous().transpose(1, 2),
        "block_mapping": inputs["block_mapping"],
    }


def _copy_case(swap: bool, num_blocks: int, dtype: torch.dtype) -> Case:
    pairs = num_blocks // 2 if num_blocks > 8 else 3 if num_blocks else 0
    return Case(
        operator="swap_blocks" if swap else "copy_blocks",
        params={"num_blocks": num_blocks},
        dtype=dtype,
        make_inputs=partial(_swap_inputs if swap else _copy_inputs, num_blocks, dtype),
        function=cache.swap_blocks if swap else cache.copy_blocks,
        reference=cache.swap_blocks_reference if swap else cache.copy_blocks_reference,
        mutates=("target_cache",) if swap else ("key_cache", "value_cache"),
        max_error=0.0,
        bytes_moved=(2 if swap else 4) * pairs * math.prod(_block_shape(num_blocks)) * dtype.itemsize,
        flops=0,
        benchmark=num_blocks > 8 and not swap,
    )


def cases() -> Iterator[Case]:
    """Shapes over the floating dtypes; every cache dtype, layout and kind of scale on one ragged shape."""
    for dtype in TOLERANCE:
        for shape in SHAPES:
            yield _write_case(shape, dtype, dtype, "NHD", "none")
        for cache_dtype in CACHE_DTYPES:
            scales = ("per_slot", "one") if cache_dtype in cache.ELEMENT_MAX else ("none",)
            for scale in scales:
                yield _write_case(SHAPES[1], dtype, cache_dtype, "HND", scale)
        for num_blocks in (5, 400):
            for swap in (False, True):
                yield _copy_case(swap, num_blocks, dtype)
    for cache_dtype in cache.ELEMENT_MAX:
        yield _write_case(SHAPES[3], torch.float32, cache_dtype, "NHD", "per_slot")
