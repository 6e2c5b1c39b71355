"""Attention over the paged KV cache, and the merging of attention over disjoint sets of keys."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from teco_kernels.ops._library import operator, register_fake_writing_only
from teco_kernels.ops.cache import as_scale, dequantize_cache_reference

_paged_attention = operator("paged_attention")
_merge_attention_states = operator("merge_attention_states")
register_fake_writing_only("paged_attention", "merge_attention_states")


@overload
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_scale: Tensor | float | None = None,
    value_scale: Tensor | float | None = None,
    out: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_scale: Tensor | float | None = None,
    value_scale: Tensor | float | None = None,
    out: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_scale: Tensor | float | None = None,
    value_scale: Tensor | float | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the step's tokens over a paged cache; prefill, chunks and decode mixed in one call.

    The tokens of all sequences lie one after the other. The i-th query token of sequence ``s`` sits at position
    ``seq_lens[s] - query_len[s] + i``; its own key and those before it are already in the cache. ``T`` tokens, ``S``
    sequences, ``Hq`` / ``Hkv`` query and KV heads, head_dim ``D`` up to 512, block_size ``B``.

    Parameters
    ----------
    query : Tensor
        ``[T, Hq, D]``, fp32, fp16 or bf16; stride 1 in the last dimension.
    key_cache, value_cache : Tensor
        ``[num_blocks, B, Hkv, D]``, both of one dtype: fp32, fp16, bf16, int8 or float8_e4m3fn, whatever the query's.
        Any strides but 1 in the last dimension, so that NHD and HND layouts both fit. ``Hq`` is a multiple of ``Hkv``;
        query head ``h`` uses KV head ``h // (Hq // Hkv)``.
    block_table : Tensor
        int32 ``[S, max_blocks]``: block ``i`` of a row holds positions ``i * B`` to ``i * B + B - 1``. Entries behind
        those that are needed may hold anything, and so may slots of the cache that no query sees.
    seq_lens : Tensor
        int32 ``[S]``: number of keys, the step's own included; at least the query length when `causal`, with a window
        or with slopes. 0 marks a sequence without keys.
    query_start_loc : Tensor, optional
        int32 ``[S + 1]``, from 0 to ``T``: where each sequence's tokens begin. None: one token per sequence.
    scale : float, optional
        Factor of the dot products; ``1 / sqrt(D)`` by default.
    causal : bool
        Keys behind the query's position are not seen.
    sliding_window : int, optional
        Keys are seen at a distance below it.
    soft_cap : float, optional
        ``soft_cap * tanh(score / soft_cap)`` takes the place of the scaled score.
    alibi_slopes : Tensor, optional
        fp32 ``[Hq]``: ``slope * (key position - query position)`` is added to the score.
    sinks : Tensor, optional
        fp32 ``[Hq]``: a further logit per head that takes part in the softmax and has no value.
    key_scale, value_scale : Tensor or float, optional
        For int8 and fp8 caches, and only for them: what the stored numbers are to be multiplied with. fp32
        ``[num_blocks, B, Hkv]`` with any strides, or one number (also as a tensor of one element).
    out : Tensor, optional
        Written and returned; shape and dtype of `query`, stride 1 in the last dimension.
    return_lse : bool
        Also return the logarithm of the softmax denominators.

    Returns
    -------
    out : Tensor
        ``[T, Hq, D]``, dtype of `query`.
    lse : Tensor
        fp32 ``[T, Hq]``: ``log(sum(exp(score)))``, the sink included; only with `return_lse`. A row that has nothing
        to attend to has output 0 and, without a sink, lse -inf.

    Raises
    ------
    ValueError, TypeError
        Naming the argument and the value; nothing is written. Block ids are checked as far as they are read.

    Notes
    -----
    Accumulation is fp32. On the CPU the bits of a row depend on its query and on the keys it sees alone: not on the
    batch, the number of threads, the strides, or the number of query tokens (see docs/design.md).

    References
    ----------
    Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv 2309.06180.
    Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", arXiv 2205.14135.
    Press et al., "Train Short, Test Long" (ALiBi), arXiv 2108.12409. Gemma Team, "Gemma 2" (soft cap), arXiv
    2408.00118. Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453.
    """
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device) if return_lse else None
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"paged_attention: sliding_window: expected a number >= 1 or None, got {sliding_window}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"paged_attention: soft_cap: expected a number > 0 or None, got {soft_cap}")
    _paged_attention(
        out,
        lse,
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        query_start_loc,
        alibi_slopes,
        sinks,
        as_scale(key_scale, query),
        as_scale(value_scale, query),
        query.shape[-1] ** -0.5 if scale is None else scale,
        soft_cap or 0.0,
        sliding_window or 0,
        causal,
    )
    return out if lse is None else (out, lse)


def merge_attention_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each of them.

    For cascades (a shared prefix attended to once) and context parallelism (keys spread over ranks). Symmetric in its
    two states, bit for bit. A sink belongs into one of them only.

    Parameters
    ----------
    out_a, out_b : Tensor
        ``[T, Hq, D]``, fp32, fp16 or bf16, same dtype; stride 1 in the last dimension.
    lse_a, lse_b : Tensor
        fp32 ``[T, Hq]``, as `paged_attention` returns them. -inf marks an empty state, whose output is not looked at.
    out : tuple of Tensor, optional
        ``(out, lse)``, written and returned; may be one of the two states.

    Returns
    -------
    out, lse : Tensor
        Shapes and dtypes of the arguments. Where both states are empty: 0 and -inf.

    References
    ----------
    Ye et al., "FlashInfer: Efficient and Customizable Attention Engine for LLM Inference Serving", arXiv 2501.01005.
    """
    if out is None:
        out = torch.empty_like(out_a), torch.empty_like(lse_a)
    _merge_attention_states(*out, out_a, lse_a, out_b, lse_b)
    return out


def paged_attention_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_scale: Tensor | float | None = None,
    value_scale: Tensor | float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """float64 reference of `paged_attention`: one plain softmax per sequence."""
    T, Hq, D = query.shape
    num_seqs, block_size, group = len(seq_lens), key_cache.shape[1], Hq // key_cache.shape[2]
    starts = list(range(num_seqs + 1)) if query_start_loc is None else query_start_loc.tolist()
    out, lse = torch.zeros(T, Hq, D, dtype=torch.float64), torch.full((T, Hq), -torch.inf, dtype=torch.float64)

    keys, values = (
        dequantize_cache_reference(key_cache, key_scale),
        dequantize_cache_reference(value_cache, value_scale),
    )

    def gather(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
        return cache[blocks].flatten(0, 1)[:length].transpose(0, 1).repeat_interleave(group, 0)  # [Hq, length, D]

    for s in range(num_seqs):
        rows, length = slice(starts[s], starts[s + 1]), int(seq_lens[s])
        blocks = block_table[s, : -(-length // block_size)].long()
        key, value = gather(keys, blocks, length), gather(values, blocks, length)
        scores = query[rows].double().transpose(0, 1) @ key.transpose(1, 2)  # [Hq, query_len, length]
        scores *= 1 / math.sqrt(D) if scale is None else scale
        if soft_cap is not None:
            scores = soft_cap * (scores / soft_cap).tanh()
        positions = length - (starts[s + 1] - starts[s]) + torch.arange(starts[s + 1] - starts[s])
        distance = positions[:, None] - torch.arange(length)
        if alibi_slopes is not None:
            scores -= alibi_slopes.double()[:, None, None] * distance
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if causal:
            hidden |= distance < 0
        if sliding_window is not None:
            hidden |= distance.abs() >= sliding_window
        scores.masked_fill_(hidden, -torch.inf)
        denominators = scores.logsumexp(-1)
        if sinks is not None:
            denominators = torch.logaddexp(denominators, sinks.double()[:, None])
        weights = (scores - denominators.unsqueeze(-1)).exp().masked_fill(hidden, 0)
        out[rows], lse[rows] = (weights @ value).transpose(0, 1), denominators.transpose(0, 1)
    return (out, lse) if return_lse else out


def merge_attention_states_reference(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """float64 reference of `merge_attention_states`."""
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    out = torch.zeros(out_a.shape, dtype=torch.float64)
    for part, part_lse in ((out_a, lse_a), (out_b, lse_b)):
        there = part_lse > -torch.inf
        out[there] += (part_lse.double() - lse).exp()[there].unsqueeze(-1) * part[there].double()
    return out, lse
