"""One transformer for every supported family, over the package's operators."""

from __future__ import annotations

import torch
from torch import Tensor

from teco_kernels.decoder.batch import Batch
from teco_kernels.decoder.config import ModelConfig
from teco_kernels.decoder.kv_cache import KVCache
from teco_kernels.decoder.layers import Buffers, LayerStack, load_layer
from teco_kernels.decoder.loader import Source
from teco_kernels.decoder.weights import Quantization, WeightLoader
from teco_kernels.ops import embedding
from teco_kernels.ops.gptq import Activation
from teco_kernels.ops.rope import cos_sin_cache


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
        self.config: ModelConfig = config
        self.dtype = dtype
        self.activation = activation
        self.embedding = load.embedding("model.embed_tokens", config.vocab_size, config.hidden_size)
        layers = [
            load_layer(
                load,
                config,
                f"model.layers.{index}.",
                qkv_bias=config.qkv_bias,
                output_bias=config.output_bias,
                mlp_bias=config.mlp_bias,
                qk_norm=config.qk_norm,
                sliding_window=sliding_window,
            )
            for index, sliding_window in enumerate(config.sliding_windows)
        ]
        cos_sin = cos_sin_cache(config.head_dim, max_model_len, config.rope_theta, config.rope_scaling)
        self.stack = LayerStack(layers, load.vector("model.norm.weight", config.hidden_size), config, cos_sin)
        # A quantizer that rounds the head of a tied model unties it, whatever the configuration still says.
        if config.tie_word_embeddings and not source.has("lm_head.qweight"):
            self.lm_head = load.tied_head(self.embedding)
        else:
            self.lm_head = load.linear(["lm_head"], config.hidden_size, [config.vocab_size], bias=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, norms aside."""
        # Embedding and head may be one object.
        ends = {id(weight): weight.nbytes for weight in (self.embedding, *self.lm_head.weights)}
        return self.stack.nbytes + sum(ends.values())

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
        buffers = buffers.rows(len(batch.token_ids))
        embedding(batch.token_ids, self.embedding, out=buffers.residual)
        self.stack.forward(batch, cache.layers, buffers)
        hidden = buffers.hidden
        if batch.logit_rows is not None:
            hidden = hidden[batch.logit_rows]
        return self.lm_head(hidden, out=out)
