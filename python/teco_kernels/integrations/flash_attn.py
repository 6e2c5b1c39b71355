"""flash-attn's functions for serving, under its names, over `paged_attention`.

An engine written for flash-attn runs on these kernels by changing one import::

    from teco_kernels.integrations.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

Arguments, their order and their defaults are those of flash-attn 2; what is not supported is refused by name, never
ignored. fp32 works besides fp16 and bf16, on the CPU as on other devices. Differences: a row that sees no key has lse
-inf (flash-attn 2: +inf, flash-attn 3: -inf), and ``num_splits``, ``max_seqlen_q`` and ``max_seqlen_k`` are taken but
change nothing. A backward pass raises: there are no gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from teco_kernels.integrations.gradients import without_gradient
from teco_kernels.ops import paged_attention, reshape_and_cache, rotary_embedding


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    s_aux: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of sequences that lie one after the other, over keys that do so too or lie in a paged cache.

    Parameters
    ----------
    q : Tensor
        ``[total_q, nheads, headdim]``, fp32, fp16 or bf16.
    k, v : Tensor
        ``[total_k, nheads_k, headdim]``, or with `block_table` ``[num_blocks, page_block_size, nheads_k, headdim]``.
        Any strides but 1 in the last dimension; read where they are.
    cu_seqlens_q, cu_seqlens_k : Tensor
        int32 ``[batch + 1]``: where each sequence's queries and keys begin. With `block_table`, `cu_seqlens_k` gives
        the numbers of keys, and may be None where `seqused_k` does.
    max_seqlen_q, max_seqlen_k : int
        Not needed.
    dropout_p : float
        Only 0.
    softmax_scale : float, optional
        ``1 / sqrt(headdim)`` by default.
    causal : bool
        The last query sees all keys, the one before it all but the last, and so on.
    window_size : (int, int)
        A query sees that many keys to its left and right; -1, or as many as the longest sequence has keys: all.
        Without `causal`, only the same on both sides, of sequences with no more queries than keys.
    softcap : float
        ``softcap * tanh(score / softcap)``; 0: none.
    alibi_slopes : Tensor, optional
        fp32 ``[nheads]``; only with `causal`.
    deterministic : bool
        It is in any case.
    return_attn_probs : bool
        Also return the lse, and None for the probabilities: without dropout flash-attn returns none either.
    block_table : Tensor, optional
        int32 ``[batch, max_blocks]``.
    seqused_k : Tensor, optional
        int32 ``[batch]``: only so many of a sequence's keys are used; without `block_table`, at most those it has.
    s_aux : Tensor, optional
        fp32 ``[nheads]``: attention sinks.
    out : Tensor, optional
        Written and returned; shape and dtype of `q`.

    Returns
    -------
    out : Tensor
        ``[total_q, nheads, headdim]``.
    softmax_lse : Tensor
        fp32 ``[nheads, total_q]``, with None behind it; only with `return_attn_probs`. With `alibi_slopes` of scores
        ``slope * (key position - query position)``.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    Notes
    -----
    Keys without `block_table` are read as blocks of the largest size that divides all of `cu_seqlens_k`, without a
    copy: blocks of one key at worst, for which a table of as many entries as there are keys is made.

    References
    ----------
    Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv 2307.08691.
    """
    name = "flash_attn_varlen_func"
    if dropout_p:
        raise ValueError(f"{name}: dropout_p: expected 0, got {dropout_p}")
    batch = cu_seqlens_q.numel() - 1
    _check_int32(name, "cu_seqlens_q", cu_seqlens_q, batch + 1)
    _check_int32(name, "cu_seqlens_k", cu_seqlens_k, batch + 1)
    _check_int32(name, "seqused_k", seqused_k, batch)
    inputs = q, k, v
    if block_table is None:
        if cu_seqlens_k is None:
            raise ValueError(f"{name}: cu_seqlens_k: expected a tensor, as block_table is None, got None")
        lengths = cu_seqlens_k.diff()
        if seqused_k is not None and (seqused_k > lengths).any():  # the next sequence's keys lie behind a sequence's
            raise ValueError(
                f"{name}: seqused_k: expected at most the numbers of keys {lengths.tolist()}, as block_table is None, "
                f"got {seqused_k.tolist()}"
            )
        k, v, block_table = _as_blocks(k, v, cu_seqlens_k)
    if seqused_k is None:
        if cu_seqlens_k is None:
            raise ValueError(f"{name}: cu_seqlens_k: expected a tensor, as seqused_k is None, got None")
        seqused_k = cu_seqlens_k.diff()
    sequences = seqused_k, cu_seqlens_q
    options = _options(name, *sequences, softmax_scale, causal, window_size, softcap, alibi_slopes)
    result, lse = _attend(q, k, v, block_table, *sequences, out, **options, sinks=s_aux)
    result = without_gradient(name, result, *inputs)
    if not return_attn_probs:
        return result
    return result, without_gradient(name, lse.t().contiguous(), *inputs), None


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a cache, into which this step's keys and values are written first.

    Parameters
    ----------
    q : Tensor
        ``[batch, seqlen_q, nheads, headdim]``, fp32, fp16 or bf16.
    k_cache, v_cache : Tensor
        ``[batch_cache, seqlen_cache, nheads_k, headdim]``, or with `block_table`
        ``[num_blocks, page_block_size, nheads_k, headdim]``; written when `k` is given. Any strides but 1 in the last
        dimension. Never copied.
    k, v : Tensor, optional
        ``[batch, seqlen_new, nheads_k, headdim]``, written behind the `cache_seqlens` keys that are there.
    rotary_cos, rotary_sin : Tensor, optional
        ``[seqlen_ro, rotary_dim / 2]``. The new keys are turned by their positions before they are written, and the
        queries by theirs when `causal` or with a window, else all by `cache_seqlens`. Only with `k`; neither `q` nor
        `k` is changed: both are copied.
    cache_seqlens : Tensor or int, optional
        int32 ``[batch]``: keys in the cache before this step. None: the whole cache, only without `k`.
    cache_batch_idx : Tensor, optional
        int32 ``[batch]``: the cache's row of each sequence; 0, 1, 2, ... by default. Not with `block_table`.
    cache_leftpad : None
        Not supported.
    block_table : Tensor, optional
        int32 ``[batch, max_blocks]``.
    softmax_scale, causal, window_size, softcap, alibi_slopes
        As in `flash_attn_varlen_func`.
    rotary_interleaved : bool
        Whether ``(2i, 2i + 1)`` turn together (GPT-J), or ``(i, i + rotary_dim / 2)`` (GPT-NeoX).
    num_splits : int
        Changes nothing: the work is split by what there is to do.
    return_softmax_lse : bool
        Also return the lse.

    Returns
    -------
    out : Tensor
        ``[batch, seqlen_q, nheads, headdim]``.
    softmax_lse : Tensor
        fp32 ``[batch, nheads, seqlen_q]``; only with `return_softmax_lse`.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.
    """
    name = "flash_attn_with_kvcache"
    if cache_leftpad is not None:
        raise ValueError(f"{name}: cache_leftpad: expected None, it is not supported")
    if q.dim() != 4:
        raise ValueError(f"{name}: q: expected shape [batch, seqlen_q, nheads, headdim], got {list(q.shape)}")
    batch, seqlen_q = q.shape[:2]
    if block_table is None:
        rows = torch.arange(batch, device=q.device) if cache_batch_idx is None else cache_batch_idx
        block_table = rows.to(torch.int32).unsqueeze(1)
    elif cache_batch_idx is not None:
        raise ValueError(f"{name}: cache_batch_idx: expected None, as block_table is given")
    if cache_seqlens is None:
        if k is not None:
            raise ValueError(f"{name}: cache_seqlens: expected a tensor or a number, as k is given, got None")
        cache_seqlens = block_table.shape[1] * k_cache.shape[1]
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    _check_int32(name, "cache_seqlens", cache_seqlens, batch)
    if (k is None) != (v is None):
        raise ValueError(f"{name}: v: expected {'None' if k is None else 'a tensor'}, as k is")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError(
            f"{name}: rotary_sin: expected {'None' if rotary_cos is None else 'a tensor'}, as rotary_cos is"
        )
    inputs = q, k_cache, v_cache, k, v
    if k is not None and v is not None:
        if k.dim() != 4 or k.shape[0] != batch:
            raise ValueError(f"{name}: k: expected shape [{batch}, seqlen_new, nheads_k, headdim], got {list(k.shape)}")
        positions = cache_seqlens.long().unsqueeze(1) + torch.arange(k.shape[1], device=q.device)
        if rotary_cos is not None and rotary_sin is not None:
            table = torch.cat((rotary_cos, rotary_sin), dim=-1).float()
            steps = seqlen_q if causal or tuple(window_size) != (-1, -1) else 1
            q_positions = cache_seqlens.long().unsqueeze(1) + torch.arange(steps, device=q.device)
            q = _rotated(q, q_positions.expand(batch, seqlen_q), table, rotary_interleaved)
            k = _rotated(k, positions, table, rotary_interleaved)
        slots = _slots(positions, block_table, k_cache.shape[1])
    elif rotary_cos is not None:
        raise ValueError(f"{name}: rotary_cos: expected None, as k is None")
    queries = q.flatten(0, 1)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * seqlen_q
    seq_lens = cache_seqlens if k is None else cache_seqlens + k.shape[1]
    options = _options(name, seq_lens, starts, softmax_scale, causal, window_size, softcap, alibi_slopes)
    cache = k_cache, v_cache, block_table, seq_lens
    if k is not None and v is not None:
        # Of no queries: shapes, dtypes and options are refused before the cache is written.
        _attend(queries[:0], *cache, starts * 0, None, **options)
        reshape_and_cache(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, slots)
    out, lse = _attend(queries, *cache, starts, None, **options)
    out = without_gradient(name, out.unflatten(0, (batch, seqlen_q)), *inputs)
    if not return_softmax_lse:
        return out
    lse = lse.unflatten(0, (batch, seqlen_q)).transpose(1, 2).contiguous()
    return out, without_gradient(name, lse, *inputs)


def _check_int32(name: str, argument: str, tensor: Tensor | None, length: int) -> None:
    if tensor is not None and (tensor.dtype != torch.int32 or tensor.shape != (length,)):
        raise ValueError(
            f"{name}: {argument}: expected int32 of shape [{length}], got {tensor.dtype} of shape {list(tensor.shape)}"
        )


def _options(
    name: str,
    seq_lens: Tensor,
    starts: Tensor,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int],
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """What `paged_attention` takes in their place."""
    longest = int(seq_lens.max()) if max(window_size) > 0 and len(seq_lens) else 0
    left, right = (None if size < 0 or 0 < longest <= size else size for size in window_size)
    causal = causal or right == 0
    if not causal and left != right:
        raise ValueError(
            f"{name}: window_size: expected the same on both sides without causal, got {tuple(window_size)}"
        )
    if not causal and left is not None and ((starts.diff() > seq_lens) & (seq_lens > 0)).any():
        raise ValueError(
            f"{name}: window_size: expected (-1, -1) without causal where a sequence has more queries than keys, "
            f"got {tuple(window_size)}"
        )
    if alibi_slopes is not None:
        if not causal:
            raise ValueError(f"{name}: alibi_slopes: expected None without causal, where it is not supported")
        if alibi_slopes.dim() != 1:
            raise ValueError(f"{name}: alibi_slopes: expected shape [nheads], got {list(alibi_slopes.shape)}")
    return {
        "scale": softmax_scale,
        "causal": causal,
        "sliding_window": None if left is None else left + 1,
        "soft_cap": softcap or None,
        "alibi_slopes": alibi_slopes,
    }


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    starts: Tensor,
    out: Tensor | None,
    *,
    causal: bool,
    sinks: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`paged_attention`, also where a sequence has more queries than keys; out, and lse ``[total_q, nheads]``."""

    def attend(q: Tensor, starts: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
        cache = k, v, block_table, seq_lens
        return paged_attention(q, *cache, starts, out=out, causal=causal, sinks=sinks, return_lse=True, **options)

    # Their first queries come before all keys: positions that `paged_attention` refuses.
    missing = (starts.diff() - seq_lens).clamp(min=0) * (seq_lens > 0)
    if not causal or not missing.any():
        return attend(q, starts, out)
    place = torch.arange(len(q), device=q.device) - starts[:-1].repeat_interleave(starts.diff())
    seen = place >= missing.repeat_interleave(starts.diff())
    out = torch.empty_like(q) if out is None else out
    out.zero_()
    lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
    if sinks is not None:
        lse[:] = sinks
    fewer = torch.cat((starts[:1], starts[1:] - missing.cumsum(0, dtype=torch.int32)))
    out[seen], lse[seen] = attend(q[seen], fewer, None)
    return out, lse


def _as_blocks(k: Tensor, v: Tensor, cu_seqlens_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values one after the other, as views of blocks, and the table of these."""
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(
                f"flash_attn: {name}: expected shape [total_k, nheads_k, headdim], as block_table is None, "
                f"got {list(tensor.shape)}"
            )
    boundaries = cu_seqlens_k.tolist()
    if boundaries[0] != 0 or boundaries[-1] > len(k):
        raise ValueError(
            f"flash_attn: cu_seqlens_k: expected values from 0 to at most total_k = {len(k)}, got {boundaries[0]} "
            f"to {boundaries[-1]}"
        )
    size = math.gcd(*boundaries) or 1
    firsts, counts = cu_seqlens_k[:-1] // size, cu_seqlens_k.diff() // size
    most = int(counts.max()) if len(counts) else 0
    table = firsts.unsqueeze(1) + torch.arange(most, dtype=torch.int32, device=k.device)
    blocks = len(k) // size, size
    k, v = (tensor[: blocks[0] * size].unflatten(0, blocks) for tensor in (k, v))
    return k, v, table.to(torch.int32)


def _slots(positions: Tensor, block_table: Tensor, block_size: int) -> Tensor:
    """int64 ``[batch * seqlen]``: the slots of these positions ``[batch, seqlen]``."""
    room = block_table.shape[1] * block_size
    if positions.numel() and int(positions.min()) < 0:
        raise ValueError(f"flash_attn: cache_seqlens: expected values >= 0, got {int(positions.min())}")
    if positions.numel() and int(positions.max()) >= room:
        raise ValueError(
            f"flash_attn: cache_seqlens: expected room for k in {room} slots, got {int(positions.max()) + 1}"
        )
    blocks = block_table.long().gather(1, positions // block_size)
    return (blocks * block_size + positions % block_size).flatten()


def _rotated(heads: Tensor, positions: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """A copy of heads ``[batch, seqlen, nheads, headdim]``, turned by their positions ``[batch, seqlen]``."""
    heads = heads.clone(memory_format=torch.contiguous_format)
    flat = heads.flatten(0, 1)
    rotary_embedding(positions.flatten().contiguous(), flat, flat[:, :0], table, interleaved=interleaved)
    return heads
