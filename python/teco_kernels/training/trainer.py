"""Trains a recycle head on recordings of its base model, which stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from teco_kernels.decoder.config import ModelConfig
from teco_kernels.decoder.recycle_head import RecycleHeadConfig
from teco_kernels.training.head import Base, RecycleHead
from teco_kernels.training.loop import LoopSettings, Loss, TrainingLoop
from teco_kernels.training.recording import Recording

_RIDGE_TOKENS, _RIDGE = 100_000, 1e-3  # the ridge is a share of the mean of the diagonal
_VALIDATION_TOKENS = 20_000


@dataclass(frozen=True)
class TrainingSettings(LoopSettings):
    """How a head is trained; see `LoopSettings` for the rest.

    Attributes
    ----------
    num_layers, hidden_size, intermediate_size : int
        Of the head; 0 for the base model's sizes.
    draft_vocab_size : int
        Tokens that the head can say, the most frequent ones of the recording; 0 for all.
    soft_weight : float
        Share of the cross-entropy with the base model's distribution in the loss; the rest is that with its likeliest
        token.
    """

    num_layers: int = 1
    hidden_size: int = 0
    intermediate_size: int = 0
    draft_vocab_size: int = 8192
    soft_weight: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_ranges(
            num_layers=(1, 100),
            hidden_size=(0, 2**20),
            intermediate_size=(0, 2**20),
            draft_vocab_size=(0, 2**31 - 1),
            soft_weight=(0, 1),
        )

    def head_config(self, config: ModelConfig) -> RecycleHeadConfig:
        """The shape of the head for a base model, whose heads of attention it has where they fit its own width."""
        hidden = self.hidden_size or config.hidden_size
        if hidden % config.head_dim:
            raise ValueError(
                f"hidden_size: expected a multiple of the base's head_dim, {config.head_dim}; got {hidden}"
            )
        num_heads = hidden // config.head_dim
        group = config.num_heads // config.num_kv_heads
        return RecycleHeadConfig(
            base_hidden_size=config.hidden_size,
            base_vocab_size=config.vocab_size,
            hidden_size=hidden,
            intermediate_size=self.intermediate_size or config.intermediate_size,
            num_layers=self.num_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads // group if num_heads % group == 0 else num_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            draft_vocab_size=min(self.draft_vocab_size, config.vocab_size) or None,
        )


class _Text(NamedTuple):
    """A sequence of `n` tokens as `n - 1` places at which the head speaks."""

    token_ids: Tensor  # int32 [n - 1]: the new tokens
    hidden: Tensor  # fp16 [n - 1, hidden_size]: what they came of
    next_hidden: Tensor  # fp16 [n - 1, hidden_size]: what the base model then has, which decides what comes after them
    next_ids: Tensor  # int32 [n - 1]: what comes after them by the base model
    first: int  # the first place at which a head is asked: the answer has its first token


def _texts(recordings: Sequence[Recording]) -> list[_Text]:
    return [
        _Text(ids[1:], hidden[:-1], hidden[1:], greedy[1:], max(num_prompt - 1, 0))
        for recording in recordings
        for ids, greedy, hidden, num_prompt in recording.sequences()
        if len(ids) > max(num_prompt, 1)
    ]


class Trainer(TrainingLoop):
    """A head and all that its training changes.

    Parameters
    ----------
    base : Base
    training, validation : sequence of Recording
    settings : TrainingSettings

    Attributes
    ----------
    head : RecycleHead
    vocabulary : Tensor
        int64: the tokens that it can say.
    """

    settings: TrainingSettings

    def __init__(
        self, base: Base, training: Sequence[Recording], validation: Sequence[Recording], settings: TrainingSettings
    ) -> None:
        self.base = base
        self._texts, self._validation_texts = _texts(training), _first(_texts(validation), _VALIDATION_TOKENS)
        if not self._texts or not self._validation_texts:
            raise ValueError("recording: expected texts of at least three tokens to train on and to validate with")
        config = settings.head_config(base.config)
        self.vocabulary = self.most_frequent(config.draft_vocab_size or config.base_vocab_size)
        self._rows = base.rows[self.vocabulary]
        self._draft_id = torch.full((base.config.vocab_size,), -1)
        self._draft_id[self.vocabulary] = torch.arange(len(self.vocabulary))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.head = RecycleHead(config, settings.dropout)
        self._fit_projection()
        sizes, validation_sizes = (
            [len(text.token_ids) for text in texts] for texts in (self._texts, self._validation_texts)
        )
        super().__init__(self.head, sizes, validation_sizes, settings)

    def most_frequent(self, count: int) -> Tensor:
        """int64, ascending: so many of the tokens that the base model says most often in the texts for training."""
        return _frequent(self._texts, self.base.config.vocab_size, count)

    def loss(self, texts: Sequence[int]) -> Loss:
        """As in `TrainingLoop`."""
        return self._loss([self._texts[text] for text in texts])

    def validation_loss(self, texts: Sequence[int]) -> Loss:
        """As in `TrainingLoop`."""
        return self._loss([self._validation_texts[text] for text in texts])

    def _loss(self, texts: Sequence[_Text]) -> Loss:
        lengths = [len(text.token_ids) for text in texts]
        embedded = F.embedding(torch.cat([text.token_ids for text in texts]), self.base.embedding)
        out = self.head(embedded, torch.cat([text.hidden for text in texts]).float(), lengths)
        # What the prompt says next is given: the head speaks only from the first token of the answer on.
        kept = torch.cat([row[text.first :] for row, text in zip(out.split(lengths), texts, strict=True)])
        next_hidden = torch.cat([text.next_hidden[text.first :] for text in texts]).float()
        wanted = self._draft_id[torch.cat([text.next_ids[text.first :] for text in texts])]
        logits = kept @ self._rows.t()
        soft = self.settings.soft_weight
        with torch.no_grad():
            target = (next_hidden @ self._rows.t()).softmax(-1).mul_(soft)
            known = wanted >= 0
            target[known, wanted[known]] += 1 - soft
        loss = -(target * logits.log_softmax(-1)).sum()
        return Loss(loss, int((logits.detach().argmax(-1) == wanted).sum()), len(wanted))

    @torch.no_grad()
    def _fit_projection(self) -> None:
        """Begin with the best linear guess of the base model's next hidden state, by ridge regression.

        The layers add nothing at first, so the last norm sees the projection's output: it is fitted to the hidden state
        before the weight of the base model's last norm, with which the head's own begins.
        """
        self.head.norm.weight.copy_(self.base.norm)
        if self.head.config.hidden_size != self.base.config.hidden_size:
            return
        weight = torch.where(self.base.norm.abs() < 1e-6, 1e-6, self.base.norm)
        size = 2 * self.base.config.hidden_size
        gram = torch.zeros(size, size, dtype=torch.float64)
        moment = torch.zeros(size, self.base.config.hidden_size, dtype=torch.float64)
        seen = 0
        for text in self._texts:
            x = self.head.inputs(F.embedding(text.token_ids, self.base.embedding), text.hidden.float())
            gram += x.t() @ x
            moment += x.t() @ (text.next_hidden.float() / weight)
            seen += len(x)
            if seen > _RIDGE_TOKENS:
                break
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
        self.head.eh_proj.weight.copy_(torch.linalg.solve(gram, moment).t())


def _first(texts: Sequence[_Text], num_tokens: int) -> list[_Text]:
    """The first texts, until they have so many tokens."""
    taken: list[_Text] = []
    left = num_tokens
    for text in texts:
        if left <= 0:
            break
        taken.append(text)
        left -= len(text.token_ids)
    return taken


def _frequent(texts: Sequence[_Text], vocab_size: int, count: int) -> Tensor:
    """The tokens that the base model says most often in the texts, ascending."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for text in texts:
        counts += torch.bincount(text.next_ids, minlength=vocab_size)
        counts += torch.bincount(text.token_ids, minlength=vocab_size)
    # Of equally frequent ones the lower ids, which a BPE vocabulary has learned first.
    return counts.sort(descending=True, stable=True).indices[:count].sort().values
