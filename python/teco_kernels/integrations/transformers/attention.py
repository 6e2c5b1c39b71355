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
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **options: Any,
) -> Tensor | None:
    """Where each row's keys begin and end, int32 ``[batch, 1, 1, 2]``; None where they are all there is.

    Of four dimensions, because transformers takes these for made masks, and makes others of those with two.

    Raises
    ------
    ValueError
        For masks that are not causal, and holes in `attention_mask`: padding is on the left, or on the right of a
        prompt.
    """
    packed = not allow_is_causal_skip and q_length > 1
    if use_vmap or packed or "allow_is_bidirectional_skip" in options:
        raise ValueError(
            f"{ATTENTION}: expected a causal mask with nothing added to it; use sdpa for this model or input"
        )
    end = int(q_offset) - kv_offset + q_length  # a static cache is longer
    begins = torch.zeros(batch_size, dtype=torch.int64)
    if attention_mask is not None:
        seen = attention_mask[:, kv_offset : kv_offset + end].bool()
        begins = seen.int().argmax(dim=1)
        holes = (seen[:, :-1] & ~seen[:, 1:]).any() and q_length < end  # at the end of a prompt no real query sees them
        if holes or (~seen[:, :-1] & seen[:, 1:]).sum(1).max() > 1:
            raise ValueError(f"{ATTENTION}: attention_mask: expected padding on the left only")
    if end == kv_length and not begins.any():
        return None
    return torch.stack((begins, torch.full_like(begins, end)), dim=1).int().view(batch_size, 1, 1, 2)


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

    `attention_mask` is what `mask` made, or None. With `cu_seq_lens_q`, one row holds several sequences.

    Raises
    ------
    ValueError
        Naming what is not supported: dropout, a mask or bias of one's own, attention weights as output.
    """
    if dropout:
        raise ValueError(f"{ATTENTION}: dropout: expected 0, got {dropout}; it has no gradients either")
    if position_bias is not None or options.get("output_attentions"):
        raise ValueError(f"{ATTENTION}: expected neither position_bias nor output_attentions")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    sinks = None if s_aux is None else s_aux.float()
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # [batch, T or S, heads, D]
    if cu_seq_lens_q is not None:
        out = flash_attn_varlen_func(
            query[0],
            key[0],
            value[0],
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
        assert isinstance(out, Tensor)
        return out.unsqueeze(0), None
    batch, length = query.shape[:2]
    table = torch.arange(batch, dtype=torch.int32).unsqueeze(1)
    lengths = torch.full((batch,), key.shape[1], dtype=torch.int32)
    if attention_mask is not None:
        if attention_mask.shape != (batch, 1, 1, 2) or attention_mask.dtype != torch.int32:
            raise ValueError(
                f"{ATTENTION}: attention_mask: expected None or a mask of padding [batch, length], "
                f"got one of shape {list(attention_mask.shape)}"
            )
        begins, ends = attention_mask.view(batch, 2).unbind(1)
        lengths = ends - begins
        if begins.any():
            key, value, table = _behind_padding(key, value, begins)
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
    return result.unflatten(0, (batch, length)), None


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
