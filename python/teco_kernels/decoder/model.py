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
from teco_kernels.decoder.weights import Linear, Quantization, WeightLoader
from teco_kernels.ops import (
    embedding,
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


class Buffers(NamedTuple):
    """Where a step puts what it computes; every layer writes over what the one before has left.

    Attributes
    ----------
    hidden, residual : Tensor
        ``[T, hidden_size]``: input and output of a branch, and the stream that branches are added to.
    qkv : Tensor
        ``[T, (num_heads + 2 * num_kv_heads) * head_dim]``.
    attended : Tensor
        ``[T, num_heads * head_dim]``.
    gate_up, activated : Tensor
        ``[T, 2 * intermediate_size]`` and ``[T, intermediate_size]``.
    """

    hidden: Tensor
    residual: Tensor
    qkv: Tensor
    attended: Tensor
    gate_up: Tensor
    activated: Tensor

    @classmethod
    def allocate(cls, config: ModelConfig, num_tokens: int, dtype: torch.dtype) -> Buffers:
        """For steps of up to `num_tokens` tokens. The system gives memory to a row when it is first written."""
        heads = config.num_heads + 2 * config.num_kv_heads
        sizes = (
            config.hidden_size,
            config.hidden_size,
            heads * config.head_dim,
            config.num_heads * config.head_dim,
            2 * config.intermediate_size,
            config.intermediate_size,
        )
        return cls(*(torch.empty(num_tokens, size, dtype=dtype) for size in sizes))

    def rows(self, num_tokens: int) -> Buffers:
        """The first rows, for a smaller step."""
        return Buffers(*(buffer[:num_tokens] for buffer in self))


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
        How quantised layers treat their input, see `gptq_matmul`.
    quantization : {"keep", "dequantize"}
        As in `WeightLoader`.

    Raises
    ------
    ValueError
        For a tensor that is missing or contradicts the configuration, naming file and tensor.
    """

    def __init__(
        self,
        source: Source,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        activation: Activation,
        quantization: Quantization = "keep",
    ) -> None:
        config = source.config
        if source.has(surplus := f"model.layers.{config.num_layers}.input_layernorm.weight"):
            raise ValueError(
                f"{source.path}: tensor {surplus!r}: the configuration has {config.num_layers} layers only"
            )
        load = WeightLoader(source, dtype, activation, quantization)
        self.config = config
        self.dtype = dtype
        self.embedding = load.embedding("model.embed_tokens", config.vocab_size, config.hidden_size)
        self.layers = [_load_layer(load, config, index) for index in range(config.num_layers)]
        self.norm = load.vector("model.norm.weight", config.hidden_size)
        # A quantizer that rounds the head of a tied model unties it, whatever the configuration still says.
        if config.tie_word_embeddings and not source.has("lm_head.qweight"):
            self.lm_head = load.tied_head(self.embedding)
        else:
            self.lm_head = load.linear(["lm_head"], config.hidden_size, [config.vocab_size], bias=False)
        self.cos_sin = cos_sin_cache(config.head_dim, max_model_len, config.rope_theta, config.rope_scaling)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, norms aside."""
        linears = [linear for layer in self.layers for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        weights = [weight for linear in [*linears, self.lm_head] for weight in linear.weights]
        # Embedding and head may be one object.
        return sum({id(weight): weight.nbytes for weight in [self.embedding, *weights]}.values())

    def forward(self, batch: Batch, cache: KVCache, buffers: Buffers, *, out: Tensor | None = None) -> Tensor:
        """Run a step: write the tokens' keys and values into `cache`, return logits ``[R, vocab_size]``.

        Parameters
        ----------
        batch : Batch
        cache : KVCache
        buffers : Buffers
            Of at least the batch's tokens.
        out : Tensor, optional
            ``[R, vocab_size]``, for the logits. With it, and logits of every token, all of the step's work is done by
            this package's operators, so that it can be recorded as a plan.
        """
        config, buffers = self.config, buffers.rows(len(batch.token_ids))
        hidden, residual, eps = buffers.hidden, buffers.residual, config.rms_norm_eps
        embedding(batch.token_ids, self.embedding, out=residual)
        rms_norm(residual, self.layers[0].input_norm, eps, out=hidden)
        next_norms = [layer.input_norm for layer in self.layers[1:]] + [self.norm]
        for layer, layer_cache, next_norm in zip(self.layers, cache.layers, next_norms, strict=True):
            layer.qkv(hidden, out=buffers.qkv)
            self._attend(layer, batch, layer_cache, buffers)
            layer.output(buffers.attended, out=hidden)
            fused_add_rms_norm(hidden, residual, layer.post_attention_norm, eps, out=(hidden, residual))
            layer.gate_up(hidden, out=buffers.gate_up)
            silu_and_mul(buffers.gate_up, out=buffers.activated)
            layer.down(buffers.activated, out=hidden)
            fused_add_rms_norm(hidden, residual, next_norm, eps, out=(hidden, residual))
        if batch.logit_rows is not None:
            hidden = hidden[batch.logit_rows]
        return self.lm_head(hidden, out=out)

    def _attend(self, layer: Layer, batch: Batch, cache: LayerCache, buffers: Buffers) -> None:
        config = self.config
        heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        query, key, value = buffers.qkv.unflatten(-1, (-1, config.head_dim)).split(heads, dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            rms_norm(query, layer.query_norm, config.rms_norm_eps, out=query)
            rms_norm(key, layer.key_norm, config.rms_norm_eps, out=key)
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
            out=buffers.attended.view_as(query),
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
