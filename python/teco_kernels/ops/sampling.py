"""Drawing a token per row of logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teco_kernels.ops._library import operator, register_fake_writing_only
from teco_kernels.ops._per_row import per_row

_sample = operator("sample")
register_fake_writing_only("sample")


def sample(
    logits: Tensor,
    *,
    temperature: float | Sequence[float] | Tensor = 1.0,
    top_k: int | Sequence[int] | Tensor = 0,
    top_p: float | Sequence[float] | Tensor = 1.0,
    min_p: float | Sequence[float] | Tensor = 0.0,
    seed: int | Sequence[int] | Tensor,
    offset: int | Sequence[int] | Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Draw one token per row from the filtered softmax of its logits.

    The token of a row depends on that row, its parameters and its ``(seed, offset)`` alone: not on its company, nor on
    the number of threads. Filters apply in vLLM's order: temperature, `min_p`, `top_k`, `top_p`, each seeing what the
    one before left. Unlike vLLM's, `top_k` keeps exactly `top_k` tokens: among equal logits the lowest ids come first.

    Parameters
    ----------
    logits : Tensor
        ``[S, V]``, fp32, fp16 or bf16. -inf marks a token that must not be drawn.
    temperature : float, or one per row
        Divides the logits. 0 takes the largest logit (the lowest id among equals) and ignores all that follows.
    top_k : int, or one per row
        Keep the `top_k` largest; 0 or -1 keeps all.
    top_p : float, or one per row
        Keep the fewest tokens, largest first, that hold this share of what is left; in (0, 1].
    min_p : float, or one per row
        Keep tokens at least `min_p` times as likely as the likeliest; in [0, 1].
    seed, offset : int, or one per row
        int64. Key and counter of the random number: give each sequence its seed, and each of its tokens another offset.
    out : Tensor, optional
        int64 ``[S]``, written and returned.

    Returns
    -------
    Tensor
        Token ids, int64 ``[S]``.

    Raises
    ------
    ValueError
        A row holds NaN, +inf or nothing but -inf; the message names the first such row. `out` then has -1 for these
        rows and the token for all others. Also for parameters out of range.

    Notes
    -----
    Per-row parameters are tensors or sequences of length `S`; a float is rounded to fp32. The uniform number is 64 bits
    of Philox4x32-10, counter ``(offset, 0)``, key `seed`. It picks from the kept tokens in order of id, in proportion
    to ``exp((logit - max) / temperature)``, computed in fp32 and rounded to multiples of ``2**-40``: sums are exact.

    References
    ----------
    Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv 1904.09751 (top-p). Nguyen et al., "Turning
    Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs", arXiv 2407.01082. Salmon et al., "Parallel
    Random Numbers: As Easy as 1, 2, 3", SC 2011 (Philox).
    """
    if out is None:
        out = torch.empty(logits.shape[:1], dtype=torch.int64, device=logits.device)
    _sample(
        out,
        logits,
        per_row(temperature, "sample", "temperature", torch.float32, logits),
        per_row(top_k, "sample", "top_k", torch.int64, logits),
        per_row(top_p, "sample", "top_p", torch.float32, logits),
        per_row(min_p, "sample", "min_p", torch.float32, logits),
        per_row(seed, "sample", "seed", torch.int64, logits),
        per_row(offset, "sample", "offset", torch.int64, logits),
    )
    return out


def sample_weights_reference(
    logits: Tensor, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """float64 reference of the filters: unnormalised weights ``[S, V]`` that `sample` draws from; one value per row."""
    order = logits.double().sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1])
    weights = torch.zeros(logits.shape, dtype=torch.float64)
    for r, sorted_logits in enumerate(order.values):
        if temperature[r] == 0:
            kept = (rank == 0).double()
        else:
            kept = ((sorted_logits - sorted_logits[0]) / temperature[r].double()).exp()
            kept = kept * (kept >= min_p[r].double())
            if top_k[r] > 0:
                kept = kept * (rank < top_k[r])
            if top_p[r] < 1:
                kept = kept * (kept.cumsum(0) - kept < top_p[r].double() * kept.sum())
        weights[r, order.indices[r]] = kept
    return weights


def sample_reference(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    offset: Tensor,
) -> Tensor:
    """float64 reference of `sample`, one value per row for each parameter.

    Gives the same token, but for draws and cuts that fall within the rounding of an fp32 weight (about 1e-6 of the
    row's mass) of the border between two tokens.
    """
    weights = sample_weights_reference(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    uniform = [philox_bits(s, o) / 2**64 for s, o in zip(seed.tolist(), offset.tolist(), strict=True)]
    points = torch.tensor(uniform, dtype=torch.float64) * weights.sum(-1)
    return (weights.cumsum(-1) <= points.unsqueeze(-1)).sum(-1)


def philox(seed: int, offset: int, stream: int = 0) -> tuple[int, int]:
    """Twice 64 random bits: the four words of Philox4x32-10, counter ``(offset, stream)``, the first one lowest."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = offset & mask, offset >> 32 & mask, stream, 0
    k0, k1 = seed & mask, seed >> 32 & mask
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & mask, a >> 32 ^ c3 ^ k1, a & mask
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    return c1 << 32 | c0, c3 << 32 | c2


def philox_bits(seed: int, offset: int) -> int:
    """The 64 random bits that `sample` draws with."""
    return philox(seed, offset)[0]
