"""Rows of the embedding matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from teco_kernels.ops._library import operator, register_fake_writing_only

_embedding = operator("embedding")
register_fake_writing_only("embedding")


def embedding(
    token_ids: Tensor, weight: Tensor, *, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Gather the embeddings of tokens, converting them on the way.

    Parameters
    ----------
    token_ids : Tensor
        int64 ``[T]``.
    weight : Tensor
        ``[vocab_size, hidden_size]``, fp32, fp16 or bf16.
    dtype : torch.dtype, optional
        Of the result, when there is no `out`; that of `weight` when not given.
    out : Tensor, optional
        ``[T, hidden_size]``, fp32, fp16 or bf16; written and returned.

    Returns
    -------
    Tensor
        ``[T, hidden_size]``.

    Raises
    ------
    ValueError
        For a token that is not of the vocabulary.
    """
    if out is None:
        out = weight.new_empty((len(token_ids), weight.shape[-1]), dtype=dtype)
    _embedding(out, token_ids, weight)
    return out


def embedding_reference(token_ids: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """float64 reference of `embedding`."""
    return weight.double()[token_ids]
