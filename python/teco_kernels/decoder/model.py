"""One transformer for every supported family, over the package's operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from teco_kernels.decoder.batch import Batch
from teco_kernels.decoder.config import ModelConfig
from teco_kernels.decoder.kv_cache import KVCache, LayerCache
from teco_kernels.decoder.loader import Source
from teco_kernels.decoder.weights import Linear, WeightLoader
from teco_kernels.ops import (
    fused_add_rms_norm,
    paged_attention,
    reshape_and_cache,
    rms_norm,
    rotary_embedding,
    silu_and_mul,
)
from teco_kernels.ops.gptq import Activation
from teco_kernels.ops.rope import cos_sin_cache


@dataclass(frozen=True)
class Layer:
    """Weights of one layer; `query_norm` and `key_norm` only where the family has them."""

    input_norm: Tensor
    qkv: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Linear
    post_attention_norm: Tensor
    gate_up: Linear
    down: Linear
    sliding_window: int | None


class _Buffers(NamedTuple):
    """Where a layer of this step puts what it computes; the next layer writes over it.

    Attributes
    ----------
    qkv : Tensor
        ``[T, (num_heads + 2 * num_kv_heads) * head_dim]``; `query`, `key` and `value` are views of it by heads.
    attended : Tensor
        ``[T, num_heads, head_dim]``; `attended_rows` is a view of it, ``[T, num_heads * head_dim]``.
    gate_up, activated : Tensor
        ``[T, 2 * intermediate_size]`` and ``[T, intermediate_size]``.
    """

    qkv: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    attended: Tensor
    attended_rows: Tensor
    gate_up: Tensor
    activated: Tensor

    @classmethod
    def allocate(cls, config: ModelConfig, hidden: Tensor) -> _Buffers:
        """For a step whose hidden states are `hidden` ``[T, hidden_size]``."""
        num_tokens, heads = len(hidden), [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        qkv = hidden.new_empty(num_tokens, sum(heads) * config.head_dim)
        query, key, value = qkv.view(num_tokens, -1, config.head_dim).split(heads, dim=1)
        attended = hidden.new_empty(num_tokens, config.num_heads, config.head_dim)
        gate_up = hidden.new_empty(num_tokens, 2 * config.intermediate_size)
        activated = hidden.new_empty(num_tokens, config.intermediate_size)
        return cls(qkv, query, key, value, attended, attended.flatten(1), gate_up, activated)


class Transformer:
    """A decoder-only language model: token ids in, logits out, keys and values in a paged cache.

    Every operation works row by row in one fixed order, so a token's logits have the same bits whatever else is in the
    batch and however its prompt was cut into chunks.

    Parameters
    ----------
    source : Source
        Read once, while constructing.
    dtype : torch.dtype
        Of activations and dense weights.
    max_model_len : int
        Length of the rotary tables.
    activation : {"exact", "int8"}
        How GPTQ layers treat their input, see `gptq_matmul`.

    Raises
    ------
    ValueError
        For a tensor that is missing or contradicts the configuration, naming file and tensor.
    """

    def __init__(self, source: Source, *, dtype: torch.dtype, max_model_len: int, activation: Activation) -> None:
        config = source.config
        if source.has(surplus := f"model.layers.{config.num_layers}.input_layernorm.weight"):
            raise ValueError(
                f"{source.path}: tensor {surplus!r}: the configuration has {config.num_layers} layers only"
            )
        load = WeightLoader(source, dtype, activation)
        self.config = config
        self.dtype = dtype
        self.embedding = load.matrix("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        self.layers = [_load_layer(load, config, index) for index in range(config.num_layers)]
        self.norm = load.vector("model.norm.weight", config.hidden_size)
        quantised_head = source.has("lm_head.qweight")
        head = "model.embed_tokens" if config.tie_word_embeddings and not quantised_head else "lm_head"
        self.lm_head = load.linear([head], config.hidden_size, [config.vocab_size], bias=False)
        self.cos_sin = cos_sin_cache(config.head_dim, max_model_len, config.rope_theta, config.rope_scaling)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, norms aside."""
        linears = [linear for layer in self.layers for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        return self.embedding.nbytes + sum(linear.nbytes for linear in [*linears, self.lm_head])

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Run a step: write the tokens' keys and values into `cache`, return logits ``[R, vocab_size]``."""
        eps = self.config.rms_norm_eps
        # What the last branch adds to the residual stream, and then the normed sum of both.
        hidden = self.embedding[batch.token_ids].to(self.dtype)
        residual = torch.zeros_like(hidden)
        buffers = _Buffers.allocate(self.config, hidden)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            fused_add_rms_norm(hidden, residual, layer.input_norm, eps, out=(hidden, residual))
            layer.qkv(hidden, out=buffers.qkv)
            self._attend(layer, batch, layer_cache, buffers)
            layer.output(buffers.attended_rows, out=hidden)
            fused_add_rms_norm(hidden, residual, layer.post_attention_norm, eps, out=(hidden, residual))
            layer.gate_up(hidden, out=buffers.gate_up)
            silu_and_mul(buffers.gate_up, out=buffers.activated)
            layer.down(buffers.activated, out=hidden)
        if batch.logit_rows is not None:
            hidden, residual = hidden[batch.logit_rows], residual[batch.logit_rows]
        normed, _ = fused_add_rms_norm(hidden, residual, self.norm, eps)
        return self.lm_head(normed)

    def _attend(self, layer: Layer, batch: Batch, cache: LayerCache, buffers: _Buffers) -> None:
        query, key, value = buffers.query, buffers.key, buffers.value
        if layer.query_norm is not None and layer.key_norm is not None:
            query = rms_norm(query.contiguous(), layer.query_norm, self.config.rms_norm_eps)
            key = rms_norm(key.contiguous(), layer.key_norm, self.config.rms_norm_eps)
        rotary_embedding(batch.positions, query, key, self.cos_sin)
        reshape_and_cache(
            key,
            value,
            cache.key,
            cache.value,
            batch.slot_mapping,
            key_scale=cache.key_scale,
            value_scale=cache.value_scale,
        )
        paged_attention(
            query,
            cache.key,
            cache.value,
            batch.block_table,
            batch.seq_lens,
            batch.query_start_loc,
            sliding_window=layer.sliding_window,
            key_scale=cache.key_scale,
            value_scale=cache.value_scale,
            out=buffers.attended,
        )


def _load_layer(load: WeightLoader, config: ModelConfig, index: int) -> Layer:
    prefix, hidden = f"model.layers.{index}.", config.hidden_size
    query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def linear(names: list[str], in_features: int, out_features: list[int], bias: bool) -> Linear:
        return load.linear([prefix + name for name in names], in_features, out_features, bias=bias)

    def head_norm(name: str) -> Tensor | None:
        return load.vector(f"{prefix}self_attn.{name}.weight", config.head_dim) if config.qk_norm else None

    return Layer(
        input_norm=load.vector(f"{prefix}input_layernorm.weight", hidden),
        qkv=linear(
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            hidden,
            [query_size, kv_size, kv_size],
            config.qkv_bias,
        ),
        query_norm=head_norm("q_norm"),
        key_norm=head_norm("k_norm"),
        output=linear(["self_attn.o_proj"], query_size, [hidden], config.output_bias),
        post_attention_norm=load.vector(f"{prefix}post_attention_layernorm.weight", hidden),
        gate_up=linear(["mlp.gate_proj", "mlp.up_proj"], hidden, [config.intermediate_size] * 2, config.mlp_bias),
        down=linear(["mlp.down_proj"], config.intermediate_size, [hidden], config.mlp_bias),
        sliding_window=config.sliding_windows[index],
    )
