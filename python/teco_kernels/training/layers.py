"""Decoder layers in torch, for training: what `decoder/layers.py` is for inference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from teco_kernels.decoder.shard import LayerShape
from teco_kernels.ops.rope import cos_sin_cache


class _Attention(nn.Module):
    """Causal within each of several sequences that lie one after the other."""

    def __init__(self, config: LayerShape) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int]) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        sequences = zip(*(tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (query, key, value)), strict=True)
        attended = [
            F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
            for q, k, v in sequences
        ]
        return self.o_proj(torch.cat(attended, dim=1).transpose(0, 1).flatten(1))


class _MLP(nn.Module):
    def __init__(self, config: LayerShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """A layer of the Llama family; its parameters have the names of a Hugging Face checkpoint.

    Parameters
    ----------
    config : LayerShape
    dropout : float
        Of what it adds, while training.
    """

    def __init__(self, config: LayerShape, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _MLP(config)
        self._dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int]) -> Tensor:
        """Run on ``[T, hidden_size]``: sequences of `lengths` tokens, with their `rotary_table`."""
        x = x + self._dropout(self.self_attn(self.input_layernorm(x), cos, sin, lengths))
        return x + self._dropout(self.mlp(self.post_attention_layernorm(x)))


def rotary_table(head_dim: int, rope_theta: float, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[T, 1, head_dim / 2]`` for sequences of so many tokens, one after the other."""
    table = cos_sin_cache(head_dim, max(lengths), rope_theta)
    table = torch.cat([table[:length] for length in lengths])
    cos, sin = table.unsqueeze(1).chunk(2, dim=-1)
    return cos, sin


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
