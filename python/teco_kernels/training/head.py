"""The recycle head in torch, for training: from a model's last hidden state and the token that came of it, the next.

At a place of the text, the base model has computed the hidden state h and said the token x. The head takes
``eh_proj([norm(embedding of x) ; norm(h)])`` through decoder layers of its own and says what may come after x, by the
base model's LM head (DeepSeek-V3's multi-token prediction, arXiv 2412.19437; RecycleGPT, arXiv 2308.03421).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from teco_kernels.decoder.config import ModelConfig
from teco_kernels.decoder.loader import Source
from teco_kernels.decoder.recycle_head import RecycleHeadConfig, RecycleHeadTensors
from teco_kernels.decoder.weights import WeightLoader
from teco_kernels.training.layers import DecoderLayer, rotary_table


class RecycleHead(nn.Module):
    """The head; its parameters have the names of the file without ``mtp.``, see `decoder.recycle_head`.

    Parameters
    ----------
    config : RecycleHeadConfig
    dropout : float
        Of what the layers add, and of the projection's output, while training.
    """

    def __init__(self, config: RecycleHeadConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        base, hidden = config.base_hidden_size, config.hidden_size
        self.enorm = nn.RMSNorm(base, config.rms_norm_eps)
        self.hnorm = nn.RMSNorm(base, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * base, hidden, bias=False)
        self.layers = nn.ModuleList(DecoderLayer(config, dropout) for _ in range(config.num_layers))
        if hidden != base:
            self.out_proj = nn.Linear(hidden, base, bias=False)
        self.norm = nn.RMSNorm(base, config.rms_norm_eps)
        self._dropout = nn.Dropout(dropout)
        for layer in self.layers:  # which begin as the identity: training starts from what the projection knows
            nn.init.zeros_(layer.self_attn.o_proj.weight)  # type: ignore[union-attr, arg-type]
            nn.init.zeros_(layer.mlp.down_proj.weight)  # type: ignore[union-attr, arg-type]

    def forward(self, embedded: Tensor, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """Input of the LM head for the token after each.

        Parameters
        ----------
        embedded : Tensor
            fp32 ``[T, base_hidden_size]``: embeddings of the new tokens.
        hidden : Tensor
            fp32 ``[T, base_hidden_size]``: the hidden states that they came of, after the base model's final norm.
        lengths : sequence of int
            Tokens of each sequence; ``T`` in all.
        """
        config = self.config
        cos, sin = rotary_table(config.head_dim, config.rope_theta, lengths)
        x = self._dropout(self.eh_proj(self.inputs(embedded, hidden)))
        for layer in self.layers:
            x = layer(x, cos, sin, lengths)
        if hasattr(self, "out_proj"):
            x = self.out_proj(x)
        return self.norm(x)

    def inputs(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """What the projection is multiplied with, ``[T, 2 * base_hidden_size]``."""
        return torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1)


class Base:
    """What training needs of the base model.

    Attributes
    ----------
    name : str
        Of its file or folder.
    config : ModelConfig
    embedding, rows : Tensor
        fp32 ``[vocab_size, hidden_size]``: of the embedding, and of the LM head, dequantised.
    norm : Tensor
        fp32 ``[hidden_size]``: weight of the final norm.
    """

    def __init__(self, source: Source) -> None:
        self.name = source.path.name
        self.config: ModelConfig = source.config
        size = source.config.vocab_size, source.config.hidden_size
        loader = WeightLoader(source, torch.float32, "exact", "dequantize")

        def matrix(name: str) -> Tensor:
            weight = loader.embedding(name, *size)
            assert isinstance(weight, Tensor)  # the loader dequantises
            return weight.float()

        self.embedding = matrix("model.embed_tokens")
        self.norm = loader.vector("model.norm.weight", size[1])
        tied = source.config.tie_word_embeddings and not source.has("lm_head.qweight")
        self.rows = self.embedding if tied else matrix("lm_head")


def load_head(path: str | Path, base: ModelConfig) -> tuple[RecycleHead, Tensor | None]:
    """A saved head in fp32, for evaluation, and its draft vocabulary; errors as those of `RecycleHeadTensors`."""
    tensors = RecycleHeadTensors(path, base)
    load = WeightLoader(tensors, torch.float32, "exact", "dequantize")
    head = RecycleHead(tensors.config).eval()
    state = {}
    for name, shape in tensors.config.shapes().items():
        if name == "draft_vocabulary":
            continue
        weight = load.vector(name, *shape) if len(shape) == 1 else load.embedding(name.removesuffix(".weight"), *shape)
        assert isinstance(weight, Tensor)  # the loader dequantises
        state[name.removeprefix("mtp.")] = weight.float()
    head.load_state_dict(state)
    return head, tensors.draft_vocabulary
