"""The recycle head at work: from the model's last hidden state and the token that came of it, the one after that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teco_kernels.decoder.batch import Batch
from teco_kernels.decoder.kv_cache import LayerCache
from teco_kernels.decoder.layers import Buffers, LayerStack, load_layer
from teco_kernels.decoder.model import Ends, Transformer
from teco_kernels.decoder.recycle_head import RecycleHeadTensors
from teco_kernels.decoder.weights import Linear, WeightLoader
from teco_kernels.ops import DenseWeight, GPTQWeight, Sparse24Weight, lm_head_argmax, recycle_project, rms_norm
from teco_kernels.ops.rope import cos_sin_cache


class RecycleModule:
    """A recycle head beside its model, whose embedding and LM head it shares.

    At the place of a token stands what came of it: the model's last hidden state there, and the token that follows.
    Keys and values of the head's layers lie in the same slots as those of the model's.

    Parameters
    ----------
    source : RecycleHeadTensors
    base : Transformer
    ends : Ends
        Of the whole vocabulary; the model itself may have a part of it.
    max_model_len, max_tokens : int
        Most tokens of a sequence and of a step.

    Attributes
    ----------
    draft_vocabulary : Tensor or None
        The token ids that it can say; None for all.
    """

    def __init__(
        self, source: RecycleHeadTensors, base: Transformer, ends: Ends, *, max_model_len: int, max_tokens: int
    ) -> None:
        config = self.config = source.config
        load = WeightLoader(source, base.dtype, base.activation)
        size = base.config.hidden_size
        self._embedding, self._activation = ends.embedding, base.activation
        self._embedding_norm = load.vector("mtp.enorm.weight", size)
        self._hidden_norm = load.vector("mtp.hnorm.weight", size)
        self._projection = _only_weight(load.linear(["mtp.eh_proj"], 2 * size, [config.hidden_size], bias=False))
        layers = [load_layer(load, config, f"mtp.layers.{index}.") for index in range(config.num_layers)]
        self._norm = load.vector("mtp.norm.weight", size)
        self._out_proj = None
        if config.hidden_size != size:
            self._out_proj = load.linear(["mtp.out_proj"], config.hidden_size, [size], bias=False)
        last_norm = self._norm if self._out_proj is None else torch.ones(config.hidden_size, dtype=base.dtype)
        cos_sin = cos_sin_cache(config.head_dim, max_model_len, config.rope_theta)
        self._stack = LayerStack(layers, last_norm, config, cos_sin)
        self.draft_vocabulary = source.draft_vocabulary
        head = ends.lm_head if self.draft_vocabulary is None else ends.lm_head.select(self.draft_vocabulary)
        self._lm_head = _only_weight(head)
        self._buffers = Buffers.allocate(config, max_tokens, base.dtype)
        self._wide = torch.empty(max_tokens, size, dtype=base.dtype)  # used when its layers have another width

    @property
    def nbytes(self) -> int:
        """Bytes of its own weights and of its copy of rows of the LM head, norms aside."""
        copied = self._lm_head.nbytes if self.draft_vocabulary is not None else 0
        own = self._projection.nbytes + self._stack.nbytes + (self._out_proj.nbytes if self._out_proj else 0)
        return own + copied

    def forward(self, batch: Batch, hidden: Tensor, caches: Sequence[LayerCache]) -> Tensor:
        """Input of the LM head, ``[T, hidden_size]``, for the token after each; overwritten by the next call.

        Parameters
        ----------
        batch : Batch
            Of the step that has given `hidden`, but with the tokens that follow in place of its own.
        hidden : Tensor
            ``[T, hidden_size]``: the model's last hidden states, after its final norm.
        caches : sequence of LayerCache
            Of the head's layers; keys and values of all tokens are written.
        """
        buffers = self._buffers.rows(len(batch.token_ids))
        recycle_project(
            hidden,
            batch.token_ids,
            self._embedding,
            self._hidden_norm,
            self._embedding_norm,
            self._projection,
            self.config.rms_norm_eps,
            activation=self._activation,
            out=buffers.residual,
        )
        self._stack.forward(batch, caches, buffers)
        if self._out_proj is None:
            return buffers.hidden
        wide = self._out_proj(buffers.residual, out=self._wide[: len(batch.token_ids)])
        return rms_norm(wide, self._norm, self.config.rms_norm_eps, out=wide)

    def speak(self, hidden: Tensor, out: tuple[Tensor, Tensor], logsumexp: Tensor) -> None:
        """Its likeliest tokens after states that `forward` gave, as indices of the draft vocabulary.

        Parameters
        ----------
        hidden : Tensor
            ``[T, hidden_size]``.
        out : tuple of Tensor
            int64 and fp32 ``[T]``: indices and logits, written; -1 for a row that is not of numbers.
        logsumexp : Tensor
            fp32 ``[T]``, written: the logarithm of what `exp(logit)` is a share of.
        """
        try:
            lm_head_argmax(hidden, self._lm_head, activation=self._activation, out=out, logsumexp=logsumexp)
        except ValueError:
            # A model whose own logits are not numbers is found out by the sampler. Here such rows just say nothing.
            if -1 not in out[0].tolist():
                raise


def _only_weight(linear: Linear) -> DenseWeight | GPTQWeight:
    (weight,) = linear.weights
    assert not isinstance(weight, Sparse24Weight)  # which only a model's own layers are
    return weight
