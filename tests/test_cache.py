"""Cache writes and copies: conversions exact for every bit pattern, special values, layouts, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from teco_kernels.ops import copy_blocks, reshape_and_cache, swap_blocks
from teco_kernels.ops.cache import ELEMENT_MAX, dequantize_cache_reference
from teco_kernels.testing.cases.cache import make_cache


def call(tokens: int = 5, cache_dtype: torch.dtype = torch.float32, scale: str = "none", **changes: Any) -> Any:
    """Arguments of `reshape_and_cache` for 4 blocks of 4 slots, 2 heads, head_dim 12."""
    arguments: dict[str, Any] = {
        "key": torch.randn(tokens, 2, 12),
        "value": torch.randn(tokens, 2, 12),
        "key_cache": make_cache(4, 4, 2, 12, cache_dtype),
        "value_cache": make_cache(4, 4, 2, 12, cache_dtype),
        "slot_mapping": torch.arange(tokens),
    }
    if scale == "per_slot":
        arguments |= {"key_scale": torch.zeros(4, 4, 2), "value_scale": torch.zeros(4, 4, 2)}
    elif scale == "one":
        arguments |= {"key_scale": 0.02, "value_scale": 0.03}
    return arguments | changes


def test_fp8_rounds_like_torch() -> None:
    # Every half covers all ties and all subnormals of e4m3.
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    every = every[every.abs() <= 448].view(-1, 1, 1)[:34816].view(-1, 2, 64)
    tokens = len(every)
    cache = make_cache(tokens, 1, 2, 64, torch.float8_e4m3fn)
    reshape_and_cache(every, every, cache, cache.clone(), torch.arange(tokens), key_scale=1.0, value_scale=1.0)
    expected = every.to(torch.float8_e4m3fn).unsqueeze(1)
    assert torch.equal(cache.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("cache_dtype", ELEMENT_MAX, ids=str)
@pytest.mark.parametrize("scale", ["per_slot", "one"])
def test_quantised_values_are_close(cache_dtype: torch.dtype, scale: str) -> None:
    arguments = call(16, cache_dtype, scale)
    reshape_and_cache(**arguments)
    for name in ("key", "value"):
        stored = dequantize_cache_reference(arguments[f"{name}_cache"], arguments[f"{name}_scale"]).view(16, 2, 12)
        step = arguments[name].abs().amax(-1, keepdim=True) * (1 / 16 if cache_dtype != torch.int8 else 1 / 253)
        limit = 0.02 * ELEMENT_MAX[cache_dtype]
        inside = arguments[name].abs() <= limit if scale == "one" else arguments[name].abs() >= 0
        assert ((stored - arguments[name]).abs() <= step.clamp(min=0.015))[inside].all()


@pytest.mark.parametrize("cache_dtype", ELEMENT_MAX, ids=str)
def test_special_values(cache_dtype: torch.dtype) -> None:
    arguments = call(3, cache_dtype, "per_slot")
    arguments["key"][0, 0, 3] = float("nan")
    arguments["key"][1, 1, 11] = float("-inf")
    arguments["key"][2] = 0
    reshape_and_cache(**arguments)
    scale = arguments["key_scale"].view(16, 2)
    assert scale[0].isnan().tolist() == [True, False]
    assert scale[1].isnan().tolist() == [False, True]
    assert scale[2].tolist() == [0, 0]
    stored = dequantize_cache_reference(arguments["key_cache"], arguments["key_scale"]).view(16, 2, 12)
    assert stored[0, 0].isnan().all()
    assert stored[0, 1].isfinite().all()
    assert (stored[2] == 0).all()

    arguments = call(1, cache_dtype, "one")
    arguments["key"][0, 0, :3] = torch.tensor([float("nan"), float("inf"), -1e30])
    reshape_and_cache(**arguments)
    nan, largest, smallest = arguments["key_cache"][0, 0, 0, :3].float().tolist()
    assert nan == 0 if cache_dtype == torch.int8 else nan != nan
    assert (largest, smallest) == (ELEMENT_MAX[cache_dtype], -ELEMENT_MAX[cache_dtype])


def test_only_the_named_slots_are_written() -> None:
    arguments = call(3, slot_mapping=torch.tensor([13, -1, 2]))
    arguments["key_cache"].fill_(7)
    reshape_and_cache(**arguments)
    slots = arguments["key_cache"].view(16, 2, 12)
    assert torch.equal(slots[13], arguments["key"][0])
    assert torch.equal(slots[2], arguments["key"][2])
    assert (slots[[i for i in range(16) if i not in (2, 13)]] == 7).all()


def test_views_of_a_merged_projection_and_both_layouts() -> None:
    merged = torch.randn(5, 6, 12)
    plain, strided = call(), call(key=merged[:, 2:4], value=merged[:, 4:])
    strided["key_cache"], strided["value_cache"] = (make_cache(4, 4, 2, 12, torch.float32, "HND") for _ in range(2))
    reshape_and_cache(**strided)
    reshape_and_cache(**(plain | {"key": merged[:, 2:4].contiguous(), "value": merged[:, 4:].contiguous()}))
    assert torch.equal(strided["key_cache"], plain["key_cache"])
    assert torch.equal(strided["value_cache"], plain["value_cache"])


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, *ELEMENT_MAX], ids=str)
def test_threads_and_company_do_not_change_bits(cache_dtype: torch.dtype) -> None:
    tokens, before = 300, torch.get_num_threads()
    key = torch.randn(tokens, 8, 128)
    caches = []
    for threads, step in ((1, tokens), (2, tokens), (3, 7)):
        cache = make_cache(tokens, 1, 8, 128, cache_dtype)
        scale = torch.zeros(tokens, 1, 8) if cache_dtype in ELEMENT_MAX else None
        try:
            torch.set_num_threads(threads)
            for start in range(0, tokens, step):
                part, slots = key[start : start + step], torch.arange(tokens)[start : start + step]
                other = None if scale is None else scale.clone()
                reshape_and_cache(part, part, cache, cache.clone(), slots, key_scale=scale, value_scale=other)
        finally:
            torch.set_num_threads(before)
        caches.append(cache.view(torch.uint8))
    assert torch.equal(caches[0], caches[1])
    assert torch.equal(caches[0], caches[2])


def test_copy_and_swap_work_for_scales_too() -> None:
    scale = torch.randn(4, 16, 3)
    target = torch.zeros(6, 16, 3)
    swap_blocks(scale, target, torch.empty(0, 2, dtype=torch.int64))
    assert (target == 0).all()
    swap_blocks(scale, target, torch.tensor([[3, 5], [0, 1]]))
    assert torch.equal(target[5], scale[3])
    assert torch.equal(target[1], scale[0])
    assert (target[[0, 2, 3, 4]] == 0).all()
    copied = scale.clone()
    copy_blocks(copied, copied.clone(), torch.tensor([[0, 2], [2, 3]]))
    assert torch.equal(copied[3], scale[0])


def test_bad_writes_are_refused_and_write_nothing() -> None:
    def refuse(match: str, exception: type[Exception] = ValueError, **changes: Any) -> None:
        arguments = call(**{name: changes.pop(name) for name in ("cache_dtype", "scale") if name in changes}) | changes
        before = arguments["key_cache"].clone()
        with pytest.raises(exception, match=match):
            reshape_and_cache(**arguments)
        assert torch.equal(arguments["key_cache"].view(torch.uint8), before.view(torch.uint8))

    refuse(
        r"slot_mapping: expected -1 or a slot from 0 to 15, got 16 at index 4",
        slot_mapping=torch.tensor([0, 1, 2, 3, 16]),
    )
    refuse(r"slot_mapping: .* got -2 at index 0", slot_mapping=torch.tensor([-2, 1, 2, 3, 4]))
    refuse(r"slot_mapping: expected dtype int64, got int32", TypeError, slot_mapping=torch.arange(5, dtype=torch.int32))
    refuse(r"slot_mapping: expected shape \[T\] with T = 5", slot_mapping=torch.arange(4))
    refuse(r"value: expected shape \[T, Hkv, D\] with Hkv = 2", value=torch.randn(5, 3, 12))
    refuse(r"key_cache: expected shape .* with D = 12", key_cache=make_cache(4, 4, 2, 16, torch.float32))
    refuse(r"value_cache: expected the dtype of key_cache", TypeError, value_cache=make_cache(4, 4, 2, 12, torch.half))
    refuse(r"key_cache: expected dtype .* got float64", TypeError, key_cache=make_cache(4, 4, 2, 12, torch.float64))
    refuse(r"key_scale: expected a scale, as key_cache is int8", cache_dtype=torch.int8)
    refuse(r"key_scale: expected None, as key_cache is float32", key_scale=1.0, value_scale=1.0)
    refuse(r"key_scale: expected a positive number, got 0", cache_dtype=torch.int8, key_scale=0.0, value_scale=1.0)
    refuse(r"value_scale: expected one number or one per slot", cache_dtype=torch.int8, scale="per_slot", value_scale=1)
    refuse(r"key_scale: expected one number or shape", cache_dtype=torch.int8, scale="one", key_scale=torch.ones(4, 4))
    refuse(
        r"key_cache: expected memory of its own .* in dimension 1",
        key_cache=torch.zeros(4, 1, 2, 12).expand(4, 4, 2, 12),
    )
    refuse(
        r"value_scale: expected memory of its own .* in dimension 2",
        cache_dtype=torch.int8,
        scale="per_slot",
        value_scale=torch.zeros(4, 4, 1).expand(4, 4, 2),
    )
    refuse(r"expected all tensors on one device|devices", key=torch.empty(5, 2, 12, device="meta"))


def test_bad_copies_are_refused_and_copy_nothing() -> None:
    cache = make_cache(4, 4, 2, 12, torch.float32)
    with pytest.raises(ValueError, match=r"block_mapping: expected destination blocks from 0 to 3, got 4 in row 1"):
        copy_blocks(cache, cache.clone(), torch.tensor([[0, 1], [0, 4]]))
    with pytest.raises(ValueError, match=r"block_mapping: expected source blocks from 0 to 3, got -1 in row 0"):
        copy_blocks(cache, cache.clone(), torch.tensor([[-1, 1]]))
    with pytest.raises(ValueError, match=r"value_cache: expected 4 blocks"):
        copy_blocks(cache, make_cache(5, 4, 2, 12, torch.float32), torch.tensor([[0, 1]]))
    with pytest.raises(TypeError, match=r"target_cache: expected the dtype of source_cache"):
        swap_blocks(cache, cache.half(), torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match=r"target_cache: expected size 4 in dimension 1"):
        swap_blocks(cache, make_cache(4, 5, 2, 12, torch.float32), torch.tensor([[0, 1]]))
