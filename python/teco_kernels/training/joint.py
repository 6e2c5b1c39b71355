"""Trains a small language model from scratch together with its recycle head, as RecycleGPT does.

The loss is the cross-entropy of the next token plus, weighted, that of the token after it, which the head says from the
last hidden state and the embedding of the next token (arXiv 2308.03421). Both losses shape the model. `train_recycle`
distils a head from a model that is there already, and leaves that as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from teco_kernels.decoder.config import ModelConfig
from teco_kernels.decoder.recycle_head import RecycleHeadConfig
from teco_kernels.training.head import RecycleHead
from teco_kernels.training.layers import DecoderLayer, rotary_table
from teco_kernels.training.loop import LoopSettings, Loss, TrainingLoop

_INIT_STD = 0.02
_VALIDATION_TOKENS = 20_000
_ROPE_THETA, _NORM_EPS = 10_000.0, 1e-5


@dataclass(frozen=True)
class JointSettings(LoopSettings):
    """A tiny model, and how it is trained; see `LoopSettings` for the rest.

    Attributes
    ----------
    vocab_size : int
        Tokens of the vocabulary that is learned from the text.
    hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads : int
        Of the model; embedding and LM head are one matrix.
    head_layers : int
        Layers of the recycle head, as wide as the model's.
    context : int
        Tokens of a text; longer ones are cut.
    recycle_weight : float
        Of the recycle loss beside that of the next token; 0 trains the model alone, for comparison.
    """

    epochs: float = 1.0
    tokens_per_step: int = 4096
    learning_rate: float = 3e-3
    dropout: float = 0.0
    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_layers: int = 1
    context: int = 256
    recycle_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_ranges(
            vocab_size=(257, 2**20),  # a token for each byte and one for the end of a text
            hidden_size=(1, 2**16),
            intermediate_size=(1, 2**20),
            num_layers=(1, 1000),
            num_heads=(1, 1024),
            num_kv_heads=(1, 1024),
            head_layers=(1, 100),
            context=(4, 2**20),
            recycle_weight=(0, 100),
        )
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size: expected an even number for each of {self.num_heads} heads, got {self.hidden_size}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads ({self.num_heads}), got {self.num_kv_heads}"
            )

    def model_config(self) -> ModelConfig:
        """The model's shape."""
        return ModelConfig(
            family="llama",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.hidden_size // self.num_heads,
            max_position=self.context,
            rms_norm_eps=_NORM_EPS,
            rope_theta=_ROPE_THETA,
            rope_scaling=None,
            tie_word_embeddings=True,
            sliding_windows=(None,) * self.num_layers,
        )

    def head_config(self) -> RecycleHeadConfig:
        """The recycle head's shape; it says all tokens."""
        return RecycleHeadConfig(
            base_hidden_size=self.hidden_size,
            base_vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.head_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.hidden_size // self.num_heads,
            rms_norm_eps=_NORM_EPS,
            rope_theta=_ROPE_THETA,
        )


class LanguageModel(nn.Module):
    """A Llama model without its LM head, which is the embedding; parameters are named as in a checkpoint's ``model.``.

    Parameters
    ----------
    config : ModelConfig
    dropout : float
        Of what the layers add, while training.
    """

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, dropout) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What is added to the stream is made smaller the more there is of it (GPT-2).
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=_INIT_STD / math.sqrt(2 * config.num_layers) if adds else _INIT_STD)

    def forward(self, token_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Input of the LM head ``[T, hidden_size]`` for sequences of `lengths` tokens, one after the other."""
        cos, sin = rotary_table(self.config.head_dim, self.config.rope_theta, lengths)
        x = self.embed_tokens(token_ids)
        for layer in self.layers:
            x = layer(x, cos, sin, lengths)
        hidden: Tensor = self.norm(x)
        return hidden


class Losses(NamedTuple):
    """Mean cross-entropies of next tokens and of those after them, and how often the head says what the model will."""

    model: Tensor
    recycle: Tensor
    num_right: float
    num_places: int


class JointTrainer(TrainingLoop):
    """A model with its recycle head, and all that their training changes.

    Parameters
    ----------
    training, validation : Tensor
        int64 ``[N, context + 1]``: pieces of text.
    settings : JointSettings

    Attributes
    ----------
    model : LanguageModel
    head : RecycleHead or None
        None for a `recycle_weight` of 0.
    """

    settings: JointSettings

    def __init__(self, training: Tensor, validation: Tensor, settings: JointSettings) -> None:
        for name, texts in (("training", training), ("validation", validation)):
            if texts.dim() != 2 or texts.shape[1] != settings.context + 1 or not len(texts):
                raise ValueError(f"{name}: expected shape [N, {settings.context + 1}], got {list(texts.shape)}")
        self._texts = training
        self._validation_texts = validation[: max(_VALIDATION_TOKENS // settings.context, 1)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = LanguageModel(settings.model_config(), settings.dropout)
            self.head = RecycleHead(settings.head_config(), settings.dropout) if settings.recycle_weight else None
        module = nn.ModuleDict({"model": self.model} | ({"head": self.head} if self.head else {}))
        sizes, validation_sizes = ([settings.context] * len(texts) for texts in (self._texts, self._validation_texts))
        super().__init__(module, sizes, validation_sizes, settings)

    def loss(self, texts: Sequence[int]) -> Loss:
        """As in `TrainingLoop`."""
        return self._loss(self._texts[list(texts)])

    def validation_loss(self, texts: Sequence[int]) -> Loss:
        """As in `TrainingLoop`."""
        return self._loss(self._validation_texts[list(texts)])

    def losses(self, token_ids: Tensor) -> Losses:
        """Of texts ``[B, context + 1]``."""
        batch, context = len(token_ids), token_ids.shape[1] - 1
        rows = self.model.embed_tokens.weight
        hidden = self.model(token_ids[:, :-1].flatten(), [context] * batch)
        logits = hidden @ rows.t()
        model_loss = F.cross_entropy(logits, token_ids[:, 1:].flatten())
        if self.head is None:
            return Losses(model_loss, torch.zeros(()), math.nan, batch * context)
        # The head is asked wherever the text goes on for two more tokens.
        said = token_ids[:, 1:-1]
        came_of = hidden.view(batch, context, -1)[:, :-1].flatten(0, 1)
        out = self.head(self.model.embed_tokens(said.flatten()), came_of, [context - 1] * batch)
        recycled = out @ rows.t()
        recycle_loss = F.cross_entropy(recycled, token_ids[:, 2:].flatten())
        will_say = logits.detach().view(batch, context, -1)[:, 1:].argmax(-1).flatten()
        right = int((recycled.detach().argmax(-1) == will_say).sum())
        return Losses(model_loss, recycle_loss, right, len(will_say))

    def _loss(self, token_ids: Tensor) -> Loss:
        model, recycle, right, places = self.losses(token_ids)
        return Loss((model + self.settings.recycle_weight * recycle) * places, right, places)

    @torch.no_grad()
    def evaluate(self, texts: Tensor) -> dict[str, float]:
        """Perplexities of the next token and of the one after it, and the head's acceptance; the last two with a head.

        `texts` as for training; all of it is used.
        """
        module = self.module
        was_training = module.training
        module.eval()
        model = recycle = 0.0
        right, places = 0.0, 0
        size = max(self.settings.tokens_per_step // self.settings.context, 1)
        for batch in texts.split(size):
            losses = self.losses(batch)
            model += float(losses.model) * len(batch) / len(texts)
            recycle += float(losses.recycle) * len(batch) / len(texts)
            right, places = right + losses.num_right, places + losses.num_places
        module.train(was_training)
        figures = {"perplexity": math.exp(model)}
        if self.head is not None:
            figures |= {"recycle_perplexity": math.exp(recycle), "acceptance": right / places}
        return figures
