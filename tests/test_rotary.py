"""Rotary embedding: what it must leave alone, what it refuses, and the tables of each kind of scaling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import teco_kernels as tk
from teco_kernels.ops.rope import cos_sin_cache, inverse_frequencies
from teco_kernels.testing import TOLERANCE

CACHE = cos_sin_cache(64, 128, 10000.0)
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 4096, "truncate": False},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.7, "mscale_all_dim": 1},
    {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 8, "attention_factor": 1.5, "beta_fast": 16},
]


def qkv(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, 8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("interleaved", [False, True])
def test_writes_only_the_rotated_part_of_its_views(interleaved: bool) -> None:
    merged = qkv(5)
    before = merged.clone()
    cache = cos_sin_cache(20, 128, 10000.0)
    tk.rotary_embedding(torch.arange(1, 6), merged[:, :4], merged[:, 4:6], cache, interleaved=interleaved)
    assert torch.equal(merged[:, :, 20:], before[:, :, 20:])
    assert torch.equal(merged[:, 6:], before[:, 6:])
    assert (merged[:, :6, :20] != before[:, :6, :20]).all()


def test_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(1, 1, 64), torch.randn(1, 1, 64)

    def score(q_position: int, k_position: int) -> float:
        rotated_q, rotated_k = q.clone(), k.clone()
        tk.rotary_embedding(torch.tensor([q_position]), rotated_q, rotated_q.clone(), CACHE)
        tk.rotary_embedding(torch.tensor([k_position]), rotated_k, rotated_k.clone(), CACHE)
        return float((rotated_q * rotated_k).sum())

    assert score(9, 2) == pytest.approx(score(107, 100), abs=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_tokens_stand_alone(dtype: torch.dtype, interleaved: bool) -> None:
    together, positions = qkv(100, dtype), torch.arange(100).flip(0)
    alone = together.clone()
    tk.rotary_embedding(positions, together[:, :4], together[:, 4:6], CACHE, interleaved=interleaved)
    for t in (0, 57, 99):
        row = slice(t, t + 1)
        tk.rotary_embedding(positions[row], alone[row, :4], alone[row, 4:6], CACHE, interleaved=interleaved)
        assert torch.equal(alone[t], together[t])


@pytest.mark.parametrize("position", [-1, 128, 2**40])
def test_position_out_of_range_writes_nothing(position: int) -> None:
    merged = qkv(3)
    before = merged.clone()
    with pytest.raises(ValueError, match=rf"positions: expected 0 to 127 .*, got {position} at index 2"):
        tk.rotary_embedding(torch.tensor([0, 127, position]), merged[:, :4], merged[:, 4:6], CACHE)
    assert torch.equal(merged, before)


def test_bad_arguments_are_named() -> None:
    positions, q, k = torch.arange(3), torch.randn(3, 4, 64), torch.randn(3, 2, 64)
    with pytest.raises(TypeError, match=r"positions: expected dtype int64, got int32"):
        tk.rotary_embedding(positions.int(), q, k, CACHE)
    with pytest.raises(ValueError, match=r"positions: expected shape \[T\] with T = 3 \(from query\), got \[2\]"):
        tk.rotary_embedding(positions[:2], q, k, CACHE)
    with pytest.raises(TypeError, match=r"key: expected the dtype of query \(float32\), got bfloat16"):
        tk.rotary_embedding(positions, q, k.bfloat16(), CACHE)
    with pytest.raises(ValueError, match=r"key: expected shape \[T, Hkv, D\] with D = 64"):
        tk.rotary_embedding(positions, q, k[..., :32], CACHE)
    with pytest.raises(ValueError, match=r"query: expected stride 1 in the last dimension"):
        tk.rotary_embedding(positions, torch.randn(3, 64, 4).transpose(1, 2), k, CACHE)
    with pytest.raises(ValueError, match=r"key: expected memory of its own .* got stride 0 in dimension 1"):
        tk.rotary_embedding(positions, q, k[:, :1].expand(3, 2, 64), CACHE)
    with pytest.raises(TypeError, match=r"cos_sin_cache: expected dtype float32"):
        tk.rotary_embedding(positions, q, k, CACHE.half())
    with pytest.raises(ValueError, match=r"cos_sin_cache: expected an even rotary_dim of at most D = 64, got 66"):
        tk.rotary_embedding(positions, q, k, torch.randn(128, 66))
    with pytest.raises(ValueError, match="expected all tensors on one device"):
        tk.rotary_embedding(positions, q, k, CACHE.to("meta"))


def test_default_table_is_cosines_then_sines() -> None:
    table = cos_sin_cache(4, 3, 100.0)
    angles = [[0.0, 0.0], [1.0, 0.1], [2.0, 0.2]]
    expected = [[math.cos(a), math.cos(b), math.sin(a), math.sin(b)] for a, b in angles]
    torch.testing.assert_close(table, torch.tensor(expected))


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: "-".join(map(str, scaling.values())))
def test_scaling_agrees_with_transformers(scaling: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=32768,
        rope_scaling=scaling | {"rope_theta": 5e5},
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    frequencies, factor = inverse_frequencies(128, 5e5, scaling)
    torch.testing.assert_close(frequencies.float(), expected, rtol=1e-5, atol=0)
    assert factor == pytest.approx(expected_factor)
    table = cos_sin_cache(128, 7, 5e5, scaling)
    torch.testing.assert_close(table[0], torch.tensor([factor] * 64 + [0.0] * 64))


def test_incomplete_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match="expected rope_type default, linear, llama3 or yarn, got 'longrope'"):
        cos_sin_cache(64, 8, 10000.0, {"rope_type": "longrope"})
    with pytest.raises(ValueError, match="expected a positive number under 'factor', got None"):
        cos_sin_cache(64, 8, 10000.0, {"type": "linear"})
    with pytest.raises(ValueError, match="rotary_dim: expected an even number >= 0, got 7"):
        cos_sin_cache(7, 8, 10000.0)
