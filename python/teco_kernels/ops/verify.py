"""How many recycled tokens stand, once the model has looked at them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teco_kernels.ops._library import operator, register_fake_writing_only
from teco_kernels.ops._per_row import per_row
from teco_kernels.ops.sampling import philox

_verify_recycled = operator("verify_recycled")
_verify_recycled_sampled = operator("verify_recycled_sampled")
register_fake_writing_only("verify_recycled", "verify_recycled_sampled")

#: Stream of the random numbers; `sample`, which the recycled tokens may have come of, has 0.
STREAM = 1


def verify_recycled(target_token_ids: Tensor, recycled_token_ids: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Length of the agreeing prefix of recycled tokens, for greedy decoding.

    Parameters
    ----------
    target_token_ids : Tensor
        int64 ``[S, k + 1]``: the model's own tokens, the first at the place of the first recycled one.
    recycled_token_ids : Tensor
        int64 ``[S, k]``. Any integers: -1 where there is none agrees with no token.
    out : Tensor, optional
        int32 ``[S]``, written and returned.

    Returns
    -------
    Tensor
        num_accepted, int32 ``[S]``, from 0 to k. ``target_token_ids[s, num_accepted[s]]`` is the token after them.
    """
    if out is None:
        out = torch.empty(recycled_token_ids.shape[:1], dtype=torch.int32, device=recycled_token_ids.device)
    _verify_recycled(out, target_token_ids, recycled_token_ids)
    return out


def verify_recycled_sampled(
    target_probs: Tensor,
    recycled_probs: Tensor,
    recycled_token_ids: Tensor,
    *,
    seed: int | Sequence[int] | Tensor,
    offset: int | Sequence[int] | Tensor,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The rejection rule: accept recycled tokens, and draw the one after them, so that all follow the target.

    A token x is accepted with probability ``min(1, p(x) / q(x))``, p being the target's probabilities and q those that
    x was drawn from. At the first rejection the next token is drawn from ``max(p - q, 0)``, after k acceptances from
    the last row of p. The accepted tokens and the next one are then distributed as if drawn from p one by one.

    Parameters
    ----------
    target_probs : Tensor
        p, ``[S, k + 1, V]``, fp32, fp16 or bf16, after temperature and filters; each row sums to 1.
    recycled_probs : Tensor
        q, ``[S, k, V]``, dtype of `target_probs`. For a proposer that draws nothing, such as a look-up, a 1 at its
        token.
    recycled_token_ids : Tensor
        int64 ``[S, k]``, drawn from q.
    seed, offset : int, or one per sequence
        int64, as for `sample`: `offset` is that of the first recycled token, the i-th one has ``offset + i``. The bits
        are others than `sample` takes, so that recycled tokens may be drawn with the same numbers.
    out : tuple of Tensor, optional
        ``(num_accepted, next_token_ids)``, written and returned.

    Returns
    -------
    num_accepted : Tensor
        int32 ``[S]``, from 0 to k.
    next_token_ids : Tensor
        int64 ``[S]``: the token after the accepted ones.

    Raises
    ------
    ValueError
        A token is not of the vocabulary. Or something that was looked at is NaN, below 0 or above 1 (by more than
        rounding), or all of the row to draw from is 0; the message names the first such sequence. `out` then has 0 and
        -1 for these sequences, and is right for all others.

    Notes
    -----
    A token with p = 0 is never accepted. One with q = 0, which q cannot have given, is accepted wherever p > 0, as the
    limit of the rule says. Where p is nowhere above q, a rejection can only have come of rounding, and the next token
    is drawn from p. Weights are rounded to multiples of ``2**-40``: sums are exact, and what happens to a sequence
    depends on nothing but its own rows and numbers.

    References
    ----------
    Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192. Chen et al.,
    "Accelerating Large Language Model Decoding with Speculative Sampling", arXiv 2302.01318.
    """
    if out is None:
        shape, device = recycled_token_ids.shape[:1], recycled_token_ids.device
        out = (
            torch.empty(shape, dtype=torch.int32, device=device),
            torch.empty(shape, dtype=torch.int64, device=device),
        )
    num_accepted, next_token_ids = out
    seeds = per_row(seed, "verify_recycled_sampled", "seed", torch.int64, recycled_token_ids)
    offsets = per_row(offset, "verify_recycled_sampled", "offset", torch.int64, recycled_token_ids)
    _verify_recycled_sampled(
        num_accepted, next_token_ids, target_probs, recycled_probs, recycled_token_ids, seeds, offsets
    )
    return num_accepted, next_token_ids


def verify_recycled_reference(target_token_ids: Tensor, recycled_token_ids: Tensor) -> Tensor:
    """Reference of `verify_recycled`."""
    agree = (target_token_ids[:, :-1] == recycled_token_ids).int()
    return agree.cumprod(dim=1).sum(dim=1).int()


def verify_recycled_sampled_reference(
    target_probs: Tensor, recycled_probs: Tensor, recycled_token_ids: Tensor, *, seed: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """float64 reference of `verify_recycled_sampled`, one seed and offset per sequence.

    Gives the same, but for draws that fall within the rounding of a weight of the border between two tokens.
    """
    num_accepted, next_token_ids = [], []
    for p, q, ids, s, o in zip(
        target_probs.double(), recycled_probs.double(), recycled_token_ids, seed.tolist(), offset.tolist(), strict=True
    ):
        bits = [philox(s, o + i, STREAM) for i in range(len(p))]
        accepted = 0
        for token, target, recycled, (low, _) in zip(ids.tolist(), p, q, bits, strict=False):
            if (low >> 11) / 2**53 * recycled[token] >= target[token]:
                break
            accepted += 1
        weights = p[accepted]
        if accepted < len(q):
            rest = (weights - q[accepted]).clamp(min=0)
            weights = rest if rest.any() else weights
        point = bits[accepted][1] / 2**64 * weights.sum()
        num_accepted.append(accepted)
        next_token_ids.append(int((weights.cumsum(0) <= point).sum()))
    return torch.tensor(num_accepted, dtype=torch.int32), torch.tensor(next_token_ids, dtype=torch.int64)
