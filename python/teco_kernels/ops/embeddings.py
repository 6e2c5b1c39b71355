"""Rows of the embedding matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from teco_kernels.ops._library import operator, register_fake_writing_only
from teco_kernels.ops.gptq import GPTQWeight

_embedding = operator("embedding")
_gptq_embedding = operator("embedding", "gptq")
register_fake_writing_only("embedding", "embedding.gptq")


def embedding(
    token_ids: Tensor,
    weight: Tensor | GPTQWeight,
    *,
    first_token: int | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Gather the embeddings of tokens, converting them on the way.

    Parameters
    ----------
    token_ids : Tensor
        int64 ``[T]``.
    weight : Tensor or GPTQWeight
        ``[vocab_size, hidden_size]``, fp32, fp16 or bf16. Or packed, as the head of a tied model is: `out_features` are
        the vocabulary, `in_features` the hidden size, and a bias, which is the head's, is left out.
    first_token : int, optional
        `weight` has the rows of tokens `first_token` and on only, a part of the vocabulary; any other token gives
        zeros. The sum over the parts, as ranks make it that hold one each, is what the whole weight gives.
    dtype : torch.dtype, optional
        Of the result, when there is no `out`; that of `weight` when not given, fp32 for a packed one.
    out : Tensor, optional
        ``[T, hidden_size]``, fp32, fp16 or bf16; written and returned. Must not overlap `weight`.

    Returns
    -------
    Tensor
        ``[T, hidden_size]``. Of a packed weight, the columns that `GPTQWeight.dequantize` gives, rounded once.

    Raises
    ------
    ValueError
        For a token that is not of the vocabulary, where the weight has all of it.
    """
    if isinstance(weight, GPTQWeight):
        if out is None:
            out = weight.packed.new_empty((len(token_ids), weight.in_features), dtype=dtype or torch.float32)
        _gptq_embedding(
            out,
            token_ids,
            weight.packed,
            weight.input_order,
            weight.out_features,
            weight.in_features,
            weight.bits,
            weight.has_minimum,
            first_token,
        )
        return out
    if out is None:
        out = weight.new_empty((len(token_ids), weight.shape[-1]), dtype=dtype)
    _embedding(out, token_ids, weight, first_token)
    return out


def embedding_reference(
    token_ids: Tensor,
    weight: Tensor | GPTQWeight,
    first_token: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """float64 reference of `embedding`."""
    rows = weight.dequantize().t() if isinstance(weight, GPTQWeight) else weight
    if first_token is None:
        return rows[token_ids].double()
    here = token_ids - first_token
    present = (here >= 0) & (here < len(rows))
    return torch.where(present[:, None], rows[here.where(present, 0)].double(), 0.0)
