"""Trains a recycle head on recordings of its base model; goes on where it was interrupted, bit for bit."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from teco_kernels.decoder.recycle_head import RecycleHeadConfig
from teco_kernels.training.head import Base, RecycleHead
from teco_kernels.training.recording import Recording

_RIDGE_TOKENS, _RIDGE = 100_000, 1e-3  # the ridge is a share of the mean of the diagonal
_WARMUP, _LAST_RATE = 0.02, 0.02  # shares of the steps, and of the learning rate
_SMOOTHING = 0.95  # of the figures in the progress bar
_VALIDATION_TOKENS = 20_000


@dataclass(frozen=True)
class TrainingSettings:
    """How a head is trained.

    Attributes
    ----------
    num_layers, hidden_size, intermediate_size : int
        Of the head; 0 for the base model's sizes.
    draft_vocab_size : int
        Tokens that the head can say, the most frequent ones of the recording; 0 for all.
    epochs : float
        How often each recorded text is seen.
    tokens_per_step : int
        About so many.
    learning_rate, weight_decay, dropout : float
        Of AdamW, after a short warm-up falling as a cosine.
    soft_weight : float
        Share of the cross-entropy with the base model's distribution in the loss; the rest is that with its likeliest
        token.
    seed : int
    validate_every, checkpoint_every : float
        Steps, as a share of all; minutes.
    """

    num_layers: int = 1
    hidden_size: int = 0
    intermediate_size: int = 0
    draft_vocab_size: int = 8192
    epochs: float = 3.0
    tokens_per_step: int = 2048
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    dropout: float = 0.1
    soft_weight: float = 0.8
    seed: int = 0
    validate_every: float = 0.05
    checkpoint_every: float = 2.0

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("num_layers", self.num_layers, 1, 100),
            ("hidden_size", self.hidden_size, 0, 2**20),
            ("intermediate_size", self.intermediate_size, 0, 2**20),
            ("draft_vocab_size", self.draft_vocab_size, 0, 2**31 - 1),
            ("epochs", self.epochs, 0.001, 1e6),
            ("tokens_per_step", self.tokens_per_step, 1, 2**20),
            ("learning_rate", self.learning_rate, 0, 1),
            ("weight_decay", self.weight_decay, 0, 1),
            ("dropout", self.dropout, 0, 0.9),
            ("soft_weight", self.soft_weight, 0, 1),
            ("validate_every", self.validate_every, 0.001, 1),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name}: expected {low} to {high}, got {value}")

    def head_config(self, base: Base) -> RecycleHeadConfig:
        """The shape of the head for a base model, whose heads of attention it has where they fit its own width."""
        config = base.config
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


def _batches(texts: Sequence[_Text], size: int, most: int) -> Iterator[list[_Text]]:
    """Batches of about `size` tokens, in order, until there are `most`."""
    batch: list[_Text] = []
    batched = seen = 0
    for text in texts:
        batch.append(text)
        batched += len(text.token_ids)
        seen += len(text.token_ids)
        if batched >= size or seen >= most:
            yield batch
            batch, batched = [], 0
        if seen >= most:
            return
    if batch:
        yield batch


class Progress(NamedTuple):
    """One measurement: `loss` and `acceptance` of the steps since the last one, and of the validation texts."""

    step: int
    tokens: int
    minutes: float
    loss: float
    acceptance: float
    validation_loss: float
    validation_acceptance: float


class Trainer:
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
    step, num_steps : int
        Done, and of a whole training.
    history : list of Progress
    """

    def __init__(
        self, base: Base, training: Sequence[Recording], validation: Sequence[Recording], settings: TrainingSettings
    ) -> None:
        self.base, self.settings = base, settings
        self._texts = _texts(training)
        self._validation_batches = list(_batches(_texts(validation), settings.tokens_per_step, _VALIDATION_TOKENS))
        if not self._texts or not self._validation_batches:
            raise ValueError("recording: expected texts of at least three tokens to train on and to validate with")
        config = settings.head_config(base)
        self.vocabulary = self.most_frequent(config.draft_vocab_size or config.base_vocab_size)
        self._rows = base.rows[self.vocabulary]
        self._draft_id = torch.full((base.config.vocab_size,), -1)
        self._draft_id[self.vocabulary] = torch.arange(len(self.vocabulary))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.head = RecycleHead(config, settings.dropout)
        self._fit_projection()
        decayed = [parameter for parameter in self.head.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in self.head.parameters() if parameter.dim() == 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
        )
        self._tokens = sum(len(text.token_ids) for text in self._texts)
        self.num_steps = max(round(self._tokens * settings.epochs / settings.tokens_per_step), 1)
        self.step = 0
        self._order: list[int] = []  # texts of this epoch that are still to come
        self._epoch = 0
        self.history: list[Progress] = []
        self._minutes = 0.0
        self._sums = [0.0, 0.0, 0.0]  # since the last measurement: loss, right answers, places

    def most_frequent(self, count: int) -> Tensor:
        """int64, ascending: so many of the tokens that the base model says most often in the texts for training."""
        return _frequent(self._texts, self.base.config.vocab_size, count)

    def train(self, checkpoint: Path | None = None, *, use_tqdm: bool = True, stop_at: int | None = None) -> None:
        """Train to the end, or to step `stop_at`, from where the checkpoint is, when there is one."""
        if checkpoint is not None and checkpoint.exists():
            self.load(checkpoint)
        end = self.num_steps if stop_at is None else min(stop_at, self.num_steps)
        every = max(round(self.num_steps * self.settings.validate_every), 1)
        started, minutes = time.monotonic(), self._minutes
        saved = started
        shown: list[float] | None = None
        if self.step == 0:
            self._measure()
        self.head.train()
        with tqdm(total=self.num_steps, initial=self.step, desc="train", unit="step", disable=not use_tqdm) as bar:
            while self.step < end:
                loss, right, places = self._one_step()
                self._minutes = minutes + (time.monotonic() - started) / 60
                now = [loss / places, right / places]
                shown = [_SMOOTHING * a + (1 - _SMOOTHING) * b for a, b in zip(shown or now, now, strict=True)]
                text = f"loss {shown[0]:.3f}, acceptance {shown[1]:.3f}"
                bar.set_postfix_str(f"{text}, validation {self.history[-1].validation_acceptance:.3f}", refresh=False)
                bar.update()
                if self.step % every == 0 or self.step == self.num_steps:
                    self._measure()
                if checkpoint is not None and time.monotonic() - saved > 60 * self.settings.checkpoint_every:
                    self.save(checkpoint)
                    saved = time.monotonic()
        if checkpoint is not None:
            self.save(checkpoint)

    def _one_step(self) -> tuple[float, int, int]:
        texts = self._next_texts()
        rate = self.settings.learning_rate * _schedule(self.step, self.num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        # Every step has its own random numbers, so that an interrupted training goes on as if it had not been.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed * 1_000_003 + self.step)
            loss, right, places = self._loss(texts)
        self._optimizer.zero_grad(set_to_none=True)
        (loss / places).backward()
        nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self._optimizer.step()
        self.step += 1
        figures = (float(loss.detach()), right, places)
        self._sums = [total + value for total, value in zip(self._sums, figures, strict=True)]
        return figures

    def _loss(self, texts: Sequence[_Text]) -> tuple[Tensor, int, int]:
        """Sum of the losses, how often the head's first choice is the base model's, and of how many places."""
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
        return loss, int((logits.detach().argmax(-1) == wanted).sum()), len(wanted)

    @torch.no_grad()
    def _measure(self) -> None:
        """Enter a measurement into the history."""
        was_training = self.head.training
        self.head.eval()
        loss, right, places = 0.0, 0, 0
        for texts in self._validation_batches:
            one_loss, one_right, one_places = self._loss(texts)
            loss, right, places = loss + float(one_loss), right + one_right, places + one_places
        self.head.train(was_training)
        trained = [value / max(self._sums[2], 1) if self._sums[2] else math.nan for value in self._sums[:2]]
        tokens = self.step * self.settings.tokens_per_step
        self.history.append(
            Progress(self.step, tokens, self._minutes, trained[0], trained[1], loss / places, right / places)
        )
        self._sums = [0.0, 0.0, 0.0]

    def _next_texts(self) -> list[_Text]:
        texts: list[_Text] = []
        size = 0
        while size < self.settings.tokens_per_step:
            if not self._order:
                generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self._epoch)
                self._order = torch.randperm(len(self._texts), generator=generator).tolist()
                self._epoch += 1
            texts.append(self._texts[self._order.pop()])
            size += len(texts[-1].token_ids)
        return texts

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

    def save(self, path: Path) -> None:
        """Write all that training changes; complete or not at all, nothing pickled."""
        tensors = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        for index, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
        state = {
            "settings": {"num_tokens": self._tokens, **asdict(self.settings)},
            "step": self.step,
            "order": self._order,
            "epoch": self._epoch,
            "history": self.history,
            "minutes": self._minutes,
            "sums": self._sums,
        }
        partial = path.with_name(f"{path.name}.partial")
        save_file(tensors, partial, metadata={"state": json.dumps(state)})
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Go back to where `save` was called.

        Raises
        ------
        ValueError
            When the file is damaged, or of a training with other settings or on other texts.
        """
        try:
            with safe_open(path, framework="pt") as file:
                state: dict[str, Any] = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a checkpoint: {error}") from None
        for name, value in {"num_tokens": self._tokens, **asdict(self.settings)}.items():
            if value != state["settings"].get(name):
                raise ValueError(
                    f"{path}: this training was begun with {name} {state['settings'].get(name)}, not {value}"
                )
        self.head.load_state_dict(
            {name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")}
        )
        optimizer = self._optimizer.state_dict()
        optimizer["state"] = {}
        for name, tensor in tensors.items():
            kind, index, *rest = name.split(".")
            if kind == "optimizer":
                optimizer["state"].setdefault(int(index), {})[".".join(rest)] = tensor
        self._optimizer.load_state_dict(optimizer)
        self.step, self._order, self._epoch = state["step"], state["order"], state["epoch"]
        self.history = [Progress(*entry) for entry in state["history"]]
        self._minutes, self._sums = state["minutes"], state["sums"]


def _schedule(step: int, num_steps: int) -> float:
    """Share of the learning rate: a linear rise, then a cosine down to a small rest."""
    warmup = max(round(num_steps * _WARMUP), 1)
    if step < warmup:
        return (step + 1) / warmup
    way = (step - warmup) / max(num_steps - warmup, 1)
    return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * way))


def _frequent(texts: Sequence[_Text], vocab_size: int, count: int) -> Tensor:
    """The tokens that the base model says most often in the texts, ascending."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for text in texts:
        counts += torch.bincount(text.next_ids, minlength=vocab_size)
        counts += torch.bincount(text.token_ids, minlength=vocab_size)
    # Of equally frequent ones the lower ids, which a BPE vocabulary has learned first.
    return counts.sort(descending=True, stable=True).indices[:count].sort().values
