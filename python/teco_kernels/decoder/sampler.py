"""From logits to tokens and their log-probabilities; every row on its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from teco_kernels.decoder.answer import Answer
from teco_kernels.decoder.sampling_params import Logprob, SamplingParams
from teco_kernels.decoder.tokenizer import Tokenizer
from teco_kernels.ops import sample

INVALID_TOKEN = -1


def sample_tokens(logits: Tensor, answers: Sequence[Answer], ahead: Sequence[int] | None = None) -> list[int]:
    """Draw a token of every answer.

    Parameters
    ----------
    logits : Tensor
        fp32 ``[len(answers), vocab_size]``, changed. An answer may have several rows, if it `draws_ahead`.
    answers : sequence of Answer
    ahead : sequence of int, optional
        How many tokens of the answer lie between what it has and the one to draw; none when not given.

    Returns
    -------
    list of int
        `INVALID_TOKEN` for a row with NaN, +inf, or nothing left to draw from.
    """
    for row, answer in enumerate(answers):
        if _is_adjusted(answer.params):
            _adjust(logits[row], answer)
    token_ids = torch.zeros(len(answers), dtype=torch.int64)
    try:
        if all(answer.params.temperature == 0 for answer in answers):
            sample(logits, temperature=0.0, seed=0, offset=0, out=token_ids)
        else:
            sample(
                logits,
                temperature=[answer.params.temperature for answer in answers],
                top_k=[max(answer.params.top_k, 0) for answer in answers],
                top_p=[answer.params.top_p for answer in answers],
                min_p=[answer.params.min_p for answer in answers],
                seed=[answer.sequence.seed for answer in answers],
                offset=[
                    answer.sequence.num_generated + distance
                    for answer, distance in zip(answers, ahead or [0] * len(answers), strict=True)
                ],
                out=token_ids,
            )
    except ValueError:
        if INVALID_TOKEN not in (drawn := token_ids.tolist()):
            raise
        return drawn
    return token_ids.tolist()


def draws_ahead(params: SamplingParams) -> bool:
    """Whether what is drawn from a row of logits does not depend on the tokens drawn before it."""
    return params.logprobs is None and not _is_adjusted(params)


def _is_adjusted(params: SamplingParams) -> bool:
    return bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or params.min_tokens
    )


def _adjust(row: Tensor, answer: Answer) -> None:
    """Penalties, biases and the tokens that `min_tokens` still holds back, in place."""
    params, sequence = answer.params, answer.sequence
    generated = sequence.token_ids[sequence.num_prompt :]
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(list(set(sequence.token_ids)))
        values = row[seen]
        row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and generated:
        counts = Counter(generated)
        penalty = torch.tensor([params.presence_penalty + params.frequency_penalty * n for n in counts.values()])
        row[torch.tensor(list(counts))] -= penalty
    if params.logit_bias:
        row[torch.tensor(list(params.logit_bias))] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype)
    if len(generated) < params.min_tokens:
        # A configuration may name end-of-sequence tokens that the model cannot draw.
        held_back = [token for token in answer.stop_token_ids if token < len(row)]
        row[torch.tensor(held_back, dtype=torch.int64)] = -torch.inf


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
