"""Input of the recycle head: embedding, two norms and the projection, one kernel after the other over a row of scratch
memory per token. Bound by the projection's weight, as its matmul is; the rows go through L2.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from teco_kernels.triton_kernels.dense_matmul import dense_matmul
from teco_kernels.triton_kernels.embedding import embedding as plain_embedding
from teco_kernels.triton_kernels.embedding import gptq_embedding
from teco_kernels.triton_kernels.gptq_matmul import gptq_matmul
from teco_kernels.triton_kernels.rms_norm import rms_norm


def _input(
    hidden: Tensor,
    token_ids: Tensor,
    embedding: Tensor,
    order: Tensor | None,
    vocab_size: int,
    bits: int,
    has_minimum: bool,
    hidden_norm: Tensor,
    embedding_norm: Tensor,
    eps: float,
) -> Tensor:
    """What the projection multiplies, ``[T, 2 * hidden_size]``."""
    size = hidden.shape[1]
    rows = hidden.new_empty((len(hidden), 2 * size))
    embedded = rows[:, :size]
    if bits:
        gptq_embedding(embedded, token_ids, embedding, order, vocab_size, size, bits, has_minimum, None)
    else:
        plain_embedding(embedded, token_ids, embedding, None)
    rms_norm(embedded, embedded, embedding_norm, eps)
    is_outside = (token_ids < 0) | (token_ids >= vocab_size)  # ids on a GPU are not checked before
    embedded.masked_fill_(is_outside.unsqueeze(1), float("nan"))
    rms_norm(rows[:, size:], hidden, hidden_norm, eps)
    return rows


def recycle_project(
    out: Tensor,
    hidden: Tensor,
    token_ids: Tensor,
    embedding: Tensor,
    embedding_order: Tensor | None,
    vocab_size: int,
    embedding_bits: int,
    embedding_has_minimum: bool,
    hidden_norm: Tensor,
    embedding_norm: Tensor,
    projection: Tensor,
    bias: Tensor | None,
    out_features: int,
    eps: float,
) -> None:
    """Launch the kernels, with a floating projection."""
    rows = _input(
        hidden,
        token_ids,
        embedding,
        embedding_order,
        vocab_size,
        embedding_bits,
        embedding_has_minimum,
        hidden_norm,
        embedding_norm,
        eps,
    )
    dense_matmul(out, rows, projection, bias, out_features)


def gptq_recycle_project(
    out: Tensor,
    hidden: Tensor,
    token_ids: Tensor,
    embedding: Tensor,
    embedding_order: Tensor | None,
    vocab_size: int,
    embedding_bits: int,
    embedding_has_minimum: bool,
    hidden_norm: Tensor,
    embedding_norm: Tensor,
    projection: Tensor,
    *matmul_and_eps: Any,
) -> None:
    """Launch the kernels, with a packed projection; then come the arguments of `gptq_matmul`, and eps."""
    *matmul, eps = matmul_and_eps
    rows = _input(
        hidden,
        token_ids,
        embedding,
        embedding_order,
        vocab_size,
        embedding_bits,
        embedding_has_minimum,
        hidden_norm,
        embedding_norm,
        eps,
    )
    gptq_matmul(out, rows, projection, *matmul)
