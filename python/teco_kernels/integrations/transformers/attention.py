"""transformers' attention over `paged_attention`: ``attn_implementation="teco_paged"``.

Keys and values of any transformers cache are read where they are: a row of the batch is one block of a paged cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from teco_kernels.integrations.flash_attn import flash_attn_varlen_func
from teco_kernels.integrations.gradients import without_gradient
from teco_kernels.ops import paged_attention

ATTENTION = "teco_paged"


def register_attention() -> None:
    """Make `ATTENTION` known to transformers."""
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, mask)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config: Any = None,
    **options: Any,
) -> Tensor | None:
    """Where each row's keys begin and end, and the sliding window or 0, int32 ``[batch, 1, 1, 3]``; None for all keys.

    A row that holds several sequences has begin -1: where they are is known from ``cu_seq_lens_q`` alone. Of four
    dimensions, because transformers takes these for made masks, and makes others of those with two.

    Raises
    ------
    ValueError
        For masks that are not causal, chunks, and holes in `attention_mask`: padding is on the left, or on the right of
        a prompt.
    """
    end = int(q_offset) - kv_offset + q_length  # a static cache is longer
    has_additions = not allow_is_causal_skip and q_length > 1
    # What transformers adds without a cache and padding are the boundaries of packed sequences, or else blocks whose
    # queries see later keys.
    is_packed = (
        has_additions
        and attention_mask is None
        and q_length == kv_length
        and _is_causal(mask_function, batch_size, q_length)
    )
    if use_vmap or "allow_is_bidirectional_skip" in options or (has_additions and not is_packed):
        raise ValueError(
            f"{ATTENTION}: expected a causal mask with nothing added to it; use sdpa for this model or input"
        )
    if local_size is not None and local_size == getattr(config, "attention_chunk_size", None):
        if kv_offset + end > local_size:
            raise ValueError(
                f"{ATTENTION}: attention_chunk_size: expected at most {local_size} keys, as chunks are not supported, "
                f"got {kv_offset + end}; use sdpa"
            )
        local_size = None
    window = local_size if local_size is not None and local_size < end else 0
    begins = torch.full((batch_size,), -int(is_packed), dtype=torch.int64)
    if attention_mask is not None:
        seen = attention_mask[:, kv_offset : kv_offset + end].bool()
        begins = seen.int().argmax(dim=1)
        runs = seen[:, 0].int() + (~seen[:, :-1] & seen[:, 1:]).sum(1)
        # Behind the keys of a row at the end of a prompt: no real query sees that far.
        is_padded_behind = (seen[:, :-1] & ~seen[:, 1:]).any()
        if (runs > 1).any() or (is_padded_behind and q_length < end):
            raise ValueError(f"{ATTENTION}: attention_mask: expected padding on the left only")
    if end == kv_length and not window and not begins.any():
        return None
    rows = [begins, torch.full_like(begins, end), torch.full_like(begins, window)]
    return torch.stack(rows, dim=1).int().view(batch_size, 1, 1, 3)


def _is_causal(function: Callable[..., Tensor] | None, batch: int, length: int) -> bool:
    """Whether a mask hides every later key."""
    if function is None:
        return False
    place = torch.arange(length)
    row = torch.arange(batch).view(-1, 1, 1, 1)
    seen = function(row, torch.zeros_like(row), place.view(-1, 1), place)
    return not (seen & (place > place.view(-1, 1))).any()


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: ``query [batch, Hq, T, D]``, ``key, value [batch, Hkv, S, D]`` -> ``[batch, T, Hq, D]``.

    `attention_mask` is what `mask` made, or None; its window counts before `sliding_window`. With `cu_seq_lens_q`, the
    rows of the batch, one after the other, hold sequences of these boundaries.

    Raises
    ------
    ValueError
        Naming what is not supported: dropout, a mask or bias of one's own, attention weights as output.
    RuntimeError
        In a backward pass: there are no gradients.
    """
    if dropout:
        raise ValueError(f"{ATTENTION}: dropout: expected 0, got {dropout}")
    if position_bias is not None or options.get("output_attentions"):
        raise ValueError(f"{ATTENTION}: expected neither position_bias nor output_attentions")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    sinks = None if s_aux is None else s_aux.float()
    inputs = query, key, value
    query, key, value = (states.transpose(1, 2) for states in inputs)  # [batch, T or S, heads, D]
    batch, length = query.shape[:2]
    table = torch.arange(batch, dtype=torch.int32).unsqueeze(1)
    lengths = torch.full((batch,), key.shape[1], dtype=torch.int32)
    if attention_mask is not None:
        if attention_mask.shape != (batch, 1, 1, 3) or attention_mask.dtype != torch.int32:
            raise ValueError(
                f"{ATTENTION}: attention_mask: expected None or a mask of padding [batch, length], "
                f"got one of shape {list(attention_mask.shape)}"
            )
        begins, ends, windows = attention_mask.view(batch, 3).unbind(1)
        sliding_window = int(windows[0]) or sliding_window
        is_packed, is_padded = bool(begins[0] < 0), bool((begins > 0).any())
        if is_packed and cu_seq_lens_q is None:
            raise ValueError(f"{ATTENTION}: cu_seq_lens_q: expected a tensor, as position_ids begin anew, got None")
        if is_padded and cu_seq_lens_q is not None:
            raise ValueError(f"{ATTENTION}: cu_seq_lens_q: expected None with padding in attention_mask")
        if is_padded:
            key, value, table = _behind_padding(key, value, begins)
        lengths = ends - begins
    if cu_seq_lens_q is not None:
        packed = flash_attn_varlen_func(
            query.flatten(0, 1),
            key.flatten(0, 1),
            value.flatten(0, 1),
            cu_seq_lens_q,
            cu_seq_lens_k,
            0,
            0,
            softmax_scale=scaling,
            causal=causal,
            window_size=(-1 if sliding_window is None else sliding_window - 1, -1),
            softcap=softcap or 0.0,
            s_aux=sinks,
        )
        assert isinstance(packed, Tensor)
        return packed.unflatten(0, (batch, length)), None
    starts = None if length == 1 else torch.arange(batch + 1, dtype=torch.int32) * length
    rows = query.reshape(batch * length, *query.shape[2:])
    where = key, value, table, lengths
    mask_options = {"causal": causal, "sliding_window": sliding_window}
    attend: Callable[..., Tensor] = paged_attention
    if starts is not None and attention_mask is not None and (lengths < length).any():
        # The queries of padding come before all keys; nobody reads what they give.
        place = torch.arange(length).expand(batch, -1)
        real = (place >= (length - lengths).unsqueeze(1)).flatten()
        fewer = torch.nn.functional.pad(lengths.clamp(max=length).cumsum(0), (1, 0)).int()
        result = torch.zeros_like(rows)
        result[real] = attend(
            rows[real], *where, fewer, scale=scaling, soft_cap=softcap or None, sinks=sinks, **mask_options
        )
    else:
        result = attend(rows, *where, starts, scale=scaling, soft_cap=softcap or None, sinks=sinks, **mask_options)
    return without_gradient(ATTENTION, result.view(batch, length, *result.shape[1:]), *inputs), None


def _behind_padding(key: Tensor, value: Tensor, begins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values ``[batch, S, heads, D]`` as views of blocks of one, and a table without each row's first ones.

    Block `i` begins `i` steps from a key to the next behind the first one. The rows of the batch lie a whole number of
    such steps apart, or are copied until they do.
    """
    batch, length = key.shape[:2]
    if key.stride() != value.stride() or key.stride(0) % key.stride(1):
        key, value = key.contiguous(), value.contiguous()
    step = key.stride(1)
    row = key.stride(0) // step
    shape = ((batch - 1) * row + length, 1, *key.shape[2:])
    strides = (step, step, *key.stride()[2:])
    places = torch.arange(length, dtype=torch.int32) + begins.unsqueeze(1)
    table = torch.arange(batch, dtype=torch.int32).unsqueeze(1) * row + places
    blocks = [part.as_strided(shape, strides) for part in (key, value)]
    return blocks[0], blocks[1], table.int()
