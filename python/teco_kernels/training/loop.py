"""The loop of a training: batches, optimizer, progress, checkpoints; goes on where it was interrupted, bit for bit."""

from __future__ import annotations

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

_WARMUP, _LAST_RATE = 0.02, 0.02  # shares of the steps, and of the learning rate
_SMOOTHING = 0.95  # of the figures in the progress bar


@dataclass(frozen=True)
class LoopSettings:
    """How a training goes, whatever is trained.

    Attributes
    ----------
    epochs : float
        How often each text is seen.
    tokens_per_step : int
        About so many.
    learning_rate, weight_decay, dropout : float
        Of AdamW, after a short warm-up falling as a cosine.
    seed : int
    validate_every, checkpoint_every : float
        Steps, as a share of all; minutes.
    """

    epochs: float = 3.0
    tokens_per_step: int = 2048
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    dropout: float = 0.1
    seed: int = 0
    validate_every: float = 0.05
    checkpoint_every: float = 2.0

    def __post_init__(self) -> None:
        self.check_ranges(
            epochs=(0.001, 1e6),
            tokens_per_step=(1, 2**20),
            learning_rate=(0, 1),
            weight_decay=(0, 1),
            dropout=(0, 0.9),
            validate_every=(0.001, 1),
        )

    def check_ranges(self, **ranges: tuple[float, float]) -> None:
        """ValueError for an attribute that is not within its range."""
        for name, (low, high) in ranges.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise ValueError(f"{name}: expected {low} to {high}, got {value}")


class Progress(NamedTuple):
    """One measurement: `loss` and `acceptance` of the steps since the last one, and of the validation texts."""

    step: int
    tokens: int
    minutes: float
    loss: float
    acceptance: float
    validation_loss: float
    validation_acceptance: float


class Loss(NamedTuple):
    """Of some texts: the sum over the places at which a head is asked, and how often it says what the model says."""

    total: Tensor
    num_right: float  # NaN without a head
    num_places: int


class TrainingLoop(ABC):
    """A module and all that its training changes.

    Parameters
    ----------
    module : nn.Module
    sizes : sequence of int
        Tokens of each text for training.
    validation_sizes : sequence of int
        And of those for validation.
    settings : LoopSettings

    Attributes
    ----------
    step, num_steps : int
        Done, and of a whole training.
    history : list of Progress
    """

    settings: LoopSettings

    def __init__(
        self, module: nn.Module, sizes: Sequence[int], validation_sizes: Sequence[int], settings: LoopSettings
    ) -> None:
        self.module, self._sizes, self.settings = module, sizes, settings
        self._validation_batches = list(_batches(validation_sizes, settings.tokens_per_step))
        decayed = [parameter for parameter in module.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in module.parameters() if parameter.dim() == 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
        )
        self._tokens = sum(sizes)
        self.num_steps = max(round(self._tokens * settings.epochs / settings.tokens_per_step), 1)
        self.step = 0
        self._order: list[int] = []  # texts of this epoch that are still to come
        self._epoch = 0
        self.history: list[Progress] = []
        self._minutes = 0.0
        self._sums = [0.0, 0.0, 0.0]  # since the last measurement: loss, right answers, places

    @abstractmethod
    def loss(self, texts: Sequence[int]) -> Loss:
        """Of the texts for training with these numbers."""

    @abstractmethod
    def validation_loss(self, texts: Sequence[int]) -> Loss:
        """Of the texts for validation with these numbers."""

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
        self.module.train()
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

    def _one_step(self) -> tuple[float, float, int]:
        texts = self._next_texts()
        rate = self.settings.learning_rate * _schedule(self.step, self.num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        # Every step has its own random numbers, so that an interrupted training goes on as if it had not been.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed * 1_000_003 + self.step)
            loss, right, places = self.loss(texts)
        self._optimizer.zero_grad(set_to_none=True)
        (loss / places).backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self._optimizer.step()
        self.step += 1
        figures = (float(loss.detach()), right, places)
        self._sums = [total + value for total, value in zip(self._sums, figures, strict=True)]
        return figures

    @torch.no_grad()
    def _measure(self) -> None:
        """Enter a measurement into the history."""
        was_training = self.module.training
        self.module.eval()
        loss, right, places = 0.0, 0.0, 0
        for texts in self._validation_batches:
            one_loss, one_right, one_places = self.validation_loss(texts)
            loss, right, places = loss + float(one_loss), right + one_right, places + one_places
        self.module.train(was_training)
        trained = [value / self._sums[2] if self._sums[2] else math.nan for value in self._sums[:2]]
        tokens = self.step * self.settings.tokens_per_step
        self.history.append(
            Progress(self.step, tokens, self._minutes, trained[0], trained[1], loss / places, right / places)
        )
        self._sums = [0.0, 0.0, 0.0]

    def _next_texts(self) -> list[int]:
        texts: list[int] = []
        size = 0
        while size < self.settings.tokens_per_step:
            if not self._order:
                generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self._epoch)
                self._order = torch.randperm(len(self._sizes), generator=generator).tolist()
                self._epoch += 1
            texts.append(self._order.pop())
            size += self._sizes[texts[-1]]
        return texts

    def save(self, path: Path) -> None:
        """Write all that training changes; complete or not at all, nothing pickled."""
        tensors = {f"module.{name}": tensor for name, tensor in self.module.state_dict().items()}
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
        self.module.load_state_dict(
            {name.removeprefix("module."): tensor for name, tensor in tensors.items() if name.startswith("module.")}
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


def _batches(sizes: Sequence[int], size: int) -> Iterator[list[int]]:
    """Numbers of texts, in order, in batches of about `size` tokens."""
    batch: list[int] = []
    batched = 0
    for text, num_tokens in enumerate(sizes):
        batch.append(text)
        batched += num_tokens
        if batched >= size:
            yield batch
            batch, batched = [], 0
    if batch:
        yield batch
