"""One transformer for every supported family, over the package's operators."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from teco_kernels.decoder.batch import Batch
from teco_kernels.decoder.config import ModelConfig
from teco_kernels.decoder.kv_cache import KVCache
from teco_kernels.decoder.layers import Buffers, LayerStack, load_layer
from teco_kernels.decoder.loader import Source
from teco_kernels.decoder.shard import Shard
from teco_kernels.decoder.weights import Linear, Quantization, WeightLoader
from teco_kernels.ops import GPTQWeight, Sparse24Weight, embedding, lm_head_argmax
from teco_kernels.ops.gptq import Activation
from teco_kernels.ops.rope import cos_sin_cache
from teco_kernels.parallel.collectives import all_gather, all_reduce
from teco_kernels.parallel.communicator import Communicator


@dataclass(frozen=True)
class Best:
    """Of each row of a step, every rank's likeliest token and its logit.

    Attributes
    ----------
    token_ids : Tensor
        int64 ``[world_size, R]``: counted from each rank's first one, -1 for a row that has NaN.
    logits : Tensor
        fp32 ``[world_size, R]``.
    """

    token_ids: Tensor
    logits: Tensor

    @classmethod
    def allocate(cls, world_size: int, num_rows: int) -> Best:
        """Of zeros."""
        shape = world_size, num_rows
        return cls(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.float32))

    @cached_property
    def of_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The same memory as arrays ``[R, world_size]``: a few numbers, and torch's own operators are slow to begin."""
        return self.token_ids.t().numpy(), self.logits.t().numpy()


class Ends(NamedTuple):
    """What stands before and after the layers; of a tied model, one weight."""

    embedding: Tensor | GPTQWeight
    lm_head: Linear

    @classmethod
    def read(cls, source: Source, load: WeightLoader, tokens: range | None = None) -> Ends:
        """Of the whole vocabulary, or of some tokens."""
        config = source.config
        embedding = load.embedding("model.embed_tokens", config.vocab_size, config.hidden_size, tokens=tokens)
        # A quantizer that rounds the head of a tied model unties it, whatever the configuration still says.
        if config.tie_word_embeddings and not source.has("lm_head.qweight"):
            return cls(embedding, load.tied_head(embedding))
        parts = [range(config.vocab_size) if tokens is None else tokens]
        return cls(
            embedding,
            load.linear(["lm_head"], config.hidden_size, [config.vocab_size], bias=False, outputs=parts),
        )


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
    shard : Shard, optional
        Only this part of the model is read.
    comm : Communicator, optional
        Of the ranks that have the other parts: all of them must run the same steps.

    Attributes
    ----------
    config : ModelConfig
        Of the whole model.
    shape : ModelConfig
        Of what this rank has of every layer.
    logits_width : int
        Columns that `forward` writes, of which the first `vocab_size` are the logits.

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
        shard: Shard | None = None,
        comm: Communicator | None = None,
    ) -> None:
        config = source.config
        shard = shard or Shard.of(config)
        if source.has(surplus := f"model.layers.{config.num_layers}.input_layernorm.weight"):
            raise ValueError(
                f"{source.path}: tensor {surplus!r}: the configuration has {config.num_layers} layers only"
            )
        load = WeightLoader(source, dtype, activation, quantization)
        self.config: ModelConfig = config
        self.shape = shard.of_layer(config)
        self.dtype = dtype
        self.activation = activation
        self.comm = comm
        self._shard = shard
        self.logits_width = config.vocab_size if comm is None else shard.world_size * shard.vocabulary_stride
        self.ends = Ends.read(source, load, shard.vocabulary)
        self.embedding, self.lm_head = self.ends
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
                shard=shard,
            )
            for index, sliding_window in enumerate(config.sliding_windows)
        ]
        cos_sin = cos_sin_cache(config.head_dim, max_model_len, config.rope_theta, config.rope_scaling)
        norm = load.vector("model.norm.weight", config.hidden_size)
        self.stack = LayerStack(layers, norm, self.shape, cos_sin, comm)

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
            ``[R, logits_width]``, for the logits. With it, and logits of every token, all of the step's work is done by
            this package's operators, so that it can be recorded as a plan.
        """
        hidden = self._hidden(batch, cache, buffers)
        if out is None:
            out = hidden.new_empty(len(hidden), self.logits_width)
        if self.comm is None:
            return self.lm_head(hidden, out=out)
        shard = self._shard
        parts = out.unflatten(-1, (shard.world_size, -1))  # every rank writes its own
        self.lm_head(hidden, out=parts[:, shard.rank, : len(shard.vocabulary)])
        for row in parts:
            all_gather(row[shard.rank], self.comm, out=row)
        return out[:, : self.config.vocab_size]

    def best(self, batch: Batch, cache: KVCache, buffers: Buffers, *, out: Best) -> None:
        """Run a step that finds what `likeliest` needs, with all logits of a row nowhere.

        Parameters
        ----------
        batch, cache, buffers
            As for `forward`.
        out : Best
            Written.
        """
        hidden = self._hidden(batch, cache, buffers)
        own = out.token_ids[self._shard.rank], out.logits[self._shard.rank]
        (weight,) = self.lm_head.weights
        assert not isinstance(weight, Sparse24Weight)  # which only layers are
        try:
            lm_head_argmax(hidden, weight, activation=self.activation, out=own)
        except ValueError:
            if -1 not in own[0].tolist():  # of which `likeliest` takes care, on all ranks alike
                raise
        if self.comm is not None:
            for part, everyone in zip(own, (out.token_ids, out.logits), strict=True):
                all_gather(part, self.comm, out=everyone)

    def likeliest(self, best: Best) -> list[int]:
        """The likeliest token of each row, from what `best` gave: the lowest among equals, -1 without finite logits."""
        token_ids, logits = best.of_rows
        found = []
        for ids, values in zip(token_ids.tolist(), logits.tolist(), strict=True):
            rank = max(range(len(ids)), key=values.__getitem__)  # the first among equals
            fine = min(ids) >= 0 and isfinite(values[rank])
            found.append(ids[rank] + rank * self._shard.vocabulary_stride if fine else -1)
        return found

    def _hidden(self, batch: Batch, cache: KVCache, buffers: Buffers) -> Tensor:
        """Input of the LM head, for the rows whose logits are wanted."""
        buffers = buffers.rows(len(batch.token_ids))
        if self.comm is None:
            embedding(batch.token_ids, self.embedding, out=buffers.residual)
        else:
            first = self._shard.vocabulary.start
            embedding(batch.token_ids, self.embedding, first_token=first, out=buffers.residual)
            all_reduce(buffers.residual, self.comm, out=buffers.residual)
        self.stack.forward(batch, cache.layers, buffers)
        return buffers.hidden if batch.logit_rows is None else buffers.hidden[batch.logit_rows]
