"""What a recycle head learns from: texts that the base model itself has written, with its last hidden states.

The hidden states are noted while the text is generated. The engine gives a token the same bits in a batch as alone and
in decoding as in prefill, so a second pass over the text would find nothing else.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from teco_kernels.decoder.batch import Span
from teco_kernels.decoder.llm import LLM
from teco_kernels.decoder.sampling_params import SamplingParams
from teco_kernels.training.prompts import Part, prompts

_PROMPTS_PER_SHARD = 128
#: Half of the prompts are continued greedily, as most recycled tokens are; the others, and what has occurred before,
#: are drawn at one of these temperatures, so that there is more than the greedy text to learn from.
_TEMPERATURES = (0.7, 1.0)
_LOGIT_ROWS = 128  # logits of prompts that are held at a time


@dataclass(eq=False)
class Recording:
    """Sequences one after the other, ``N`` tokens in all.

    Attributes
    ----------
    token_ids : Tensor
        int32 ``[N]``.
    greedy_ids : Tensor
        int32 ``[N]``: after each token, the model's likeliest next one.
    hidden : Tensor
        fp16 ``[N, hidden_size]``: at each token, the input of the LM head, that is after the final norm.
    lengths, num_prompt : Tensor
        int32 ``[S]``: tokens of each sequence, and those of them that were its prompt.
    """

    token_ids: Tensor
    greedy_ids: Tensor
    hidden: Tensor
    lengths: Tensor
    num_prompt: Tensor

    def sequences(self) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
        """Token ids, greedy ids, hidden states and the number of prompt tokens of each sequence."""
        sizes = self.lengths.tolist()
        parts = (tensor.split(sizes) for tensor in (self.token_ids, self.greedy_ids, self.hidden))
        yield from zip(*parts, self.num_prompt.tolist(), strict=True)

    def save(self, path: Path) -> None:
        """Write a safetensors file, complete or not at all."""
        partial = path.with_name(f"{path.name}.partial")
        save_file(vars(self), partial)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read what `save` has written; ValueError naming the file when it is damaged or something else."""
        try:
            with safe_open(path, framework="pt") as file:
                return cls(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, TypeError) as error:
            raise ValueError(f"{path}: expected a recording: {error}") from None


@dataclass(eq=False)
class _Sequence:
    """A sequence of the engine, which its list of tokens grows in."""

    token_ids: Sequence[int]
    num_prompt: int
    hidden: list[Tensor] = field(default_factory=list)
    greedy_ids: list[int] = field(default_factory=list)


class _Observer:
    """Collects what passes through an engine's runner; tells `progress` the number of tokens of each step."""

    def __init__(self, llm: LLM, progress: Callable[[int], object] | None) -> None:
        self._progress = progress
        self._lm_head = llm.engine.model.lm_head
        self._sequences: dict[int, _Sequence] = {}

    def __call__(self, spans: Sequence[Span], hidden: Tensor, logits: Tensor) -> None:
        # Where a prompt is among the tokens, logits were asked for its last one only.
        parts = [logits] if len(logits) == len(hidden) else map(self._lm_head, hidden.split(_LOGIT_ROWS))
        likeliest = [token for part in parts for token in part.argmax(-1).tolist()]
        states = hidden.half().unbind()
        row = 0
        for span in spans:
            # The engine passes a sequence's own list, which is kept here, so that no other one gets its address.
            new = _Sequence(span.token_ids, len(span.token_ids))
            sequence = self._sequences.setdefault(id(span.token_ids), new)
            # From where it starts: after a preemption tokens are computed again.
            sequence.hidden[span.start :] = states[row : row + span.num_tokens]
            sequence.greedy_ids[span.start :] = likeliest[row : row + span.num_tokens]
            row += span.num_tokens
        if self._progress is not None:
            self._progress(row)

    def recording(self) -> Recording:
        """All of it. The last token of a text was never computed, and is left out."""
        sequences = list(self._sequences.values())
        lengths = [len(sequence.hidden) for sequence in sequences]
        ids = [token for sequence in sequences for token in sequence.token_ids[: len(sequence.hidden)]]
        return Recording(
            token_ids=torch.tensor(ids, dtype=torch.int32),
            greedy_ids=torch.tensor([token for seq in sequences for token in seq.greedy_ids], dtype=torch.int32),
            hidden=torch.stack([state for sequence in sequences for state in sequence.hidden]),
            lengths=torch.tensor(lengths, dtype=torch.int32),
            num_prompt=torch.tensor([sequence.num_prompt for sequence in sequences], dtype=torch.int32),
        )


def record(
    llm: LLM,
    prompt_ids: Sequence[list[int]],
    params: Sequence[SamplingParams],
    *,
    progress: Callable[[int], object] | None = None,
) -> Recording:
    """Let a model continue prompts, and note what it computes.

    Parameters
    ----------
    llm : LLM
        Without recycling, and idle.
    prompt_ids : sequence of lists of int
    params : sequence of SamplingParams
        One per prompt, each for one answer.
    progress : callable, optional
        Called after each step with its number of tokens.

    Raises
    ------
    ValueError
        When the model recycles: a step's guesses are no part of the text.
    RequestError
        When a continuation fails.
    """
    engine, observer = llm.engine, _Observer(llm, progress)
    if engine.recycler is not None:
        raise ValueError("llm: expected a model without recycle_head")
    engine.runner.observer = observer
    was_caching, engine.scheduler.enable_prefix_caching = engine.scheduler.enable_prefix_caching, False
    try:
        llm.generate(prompt_ids, params, use_tqdm=False)
    finally:
        engine.runner.observer = None
        engine.scheduler.enable_prefix_caching = was_caching
    return observer.recording()


def record_part(
    llm: LLM,
    folder: Path,
    part: Part,
    *,
    num_tokens: int,
    max_new_tokens: int = 192,
    use_tqdm: bool = True,
) -> list[Path]:
    """Record at least `num_tokens` tokens of a part of the prompts, in shards; those that are there are kept.

    Parameters
    ----------
    llm : LLM
        Without recycling.
    folder : Path
        Of the shards, ``training-00000.safetensors`` and so on. A shard depends on the model, its own number and
        `max_new_tokens` only. A prompt that leaves no room for so many new tokens is cut.
    part : {"training", "validation"}

    Returns
    -------
    list of Path
        The shards that make up so many tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    longest = llm.engine.max_model_len - max_new_tokens
    if longest < 1:
        raise ValueError(f"max_new_tokens: expected fewer than max_model_len, {llm.engine.max_model_len}")
    paths: list[Path] = []
    total = 0
    with tqdm(total=num_tokens, desc=f"record {part}", unit="token", unit_scale=True, disable=not use_tqdm) as bar:
        while total < num_tokens:
            path = folder / f"{part}-{len(paths):05d}.safetensors"
            if not path.exists():
                first, end = len(paths) * _PROMPTS_PER_SHARD, (len(paths) + 1) * _PROMPTS_PER_SHARD
                drawn = [ids[:longest] for ids in prompts(llm.tokenizer, end, part)]
                params = _sampling(drawn, part, max_new_tokens)[first:]
                record(llm, drawn[first:], params, progress=bar.update).save(path)
            with safe_open(path, framework="pt") as file:
                (size,) = file.get_slice("token_ids").get_shape()
            paths.append(path)
            total += size
            bar.n = min(total, num_tokens)
            bar.refresh()
    return paths


def _sampling(prompt_ids: Sequence[list[int]], part: Part, max_new_tokens: int) -> list[SamplingParams]:
    """How to continue each of the prompts; those of validation greedily, which is what acceptance is reported for."""
    generator = random.Random(part)
    seen: set[tuple[int, ...]] = set()
    params = []
    for index, token_ids in enumerate(prompt_ids):
        temperature = generator.choice((0.0, 0.0, *_TEMPERATURES))
        if part == "validation":
            temperature = 0.0
        elif temperature == 0.0 and tuple(token_ids) in seen:
            temperature = _TEMPERATURES[0]
        seen.add(tuple(token_ids))
        params.append(SamplingParams(temperature=temperature, max_tokens=max_new_tokens, seed=index))
    return params
