"""From logits to tokens and their log-probabilities; every row on its own."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from teco_kernels.decoder.sampling_params import Logprob, SamplingParams
from teco_kernels.decoder.scheduler import Sequence
from teco_kernels.decoder.tokenizer import Tokenizer
from teco_kernels.ops import sample

INVALID_TOKEN = -1


def sample_tokens(
    logits: Tensor, rows: list[tuple[Sequence, SamplingParams]], stop_token_ids: list[list[int]]
) -> list[int]:
    """Draw the next token of every sequence; changes `logits` ``[len(rows), vocab_size]``.

    `stop_token_ids` are held back, per row, until ``min_tokens`` have been drawn.

    Returns
    -------
    list of int
        `INVALID_TOKEN` for a row with NaN, +inf, or nothing left to draw from.
    """
    for row, (sequence, params), stops in zip(logits, rows, stop_token_ids, strict=True):
        _adjust(row, sequence, params, stops)
    token_ids = torch.empty(len(rows), dtype=torch.int64)
    try:
        sample(
            logits,
            temperature=[params.temperature for _, params in rows],
            top_k=[max(params.top_k, 0) for _, params in rows],
            top_p=[params.top_p for _, params in rows],
            min_p=[params.min_p for _, params in rows],
            seed=[sequence.seed for sequence, _ in rows],
            offset=[sequence.num_generated for sequence, _ in rows],
            out=token_ids,
        )
    except ValueError:
        if INVALID_TOKEN not in (drawn := token_ids.tolist()):
            raise
        return drawn
    return token_ids.tolist()


def _adjust(row: Tensor, sequence: Sequence, params: SamplingParams, stops: list[int]) -> None:
    """Penalties and biases, in place."""
    answer = sequence.token_ids[sequence.num_prompt :]
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.token_ids)))
        values = row[seen]
        row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and answer:
        counts = Counter(answer)
        penalty = torch.tensor([params.presence_penalty + params.frequency_penalty * n for n in counts.values()])
        row[torch.tensor(list(counts))] -= penalty
    if params.logit_bias:
        row[torch.tensor(list(params.logit_bias))] += torch.tensor(list(params.logit_bias.values()))
    if stops and len(answer) < params.min_tokens:
        row[torch.tensor(stops)] = -torch.inf


def token_logprobs(row: Tensor, token_id: int, num_top: int, tokenizer: Tokenizer) -> dict[int, Logprob]:
    """Log-probabilities of the drawn token and of the `num_top` likeliest, from the model's logits ``[vocab_size]``."""
    logprobs = row.float().log_softmax(-1)
    order = logprobs.topk(num_top).indices.tolist() if num_top else []
    ranks = {token: rank for rank, token in enumerate(order, start=1)}
    if token_id not in ranks:
        ranks[token_id] = int((logprobs > logprobs[token_id]).sum()) + 1
    return {
        token: Logprob(logprobs[token].item(), rank, tokenizer.decode([token], skip_special_tokens=False))
        for token, rank in ranks.items()
    }
