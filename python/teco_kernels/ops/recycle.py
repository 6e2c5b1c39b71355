"""The two ends of the recycle head: its input from the last hidden state, its token from the LM head."""

from __future__ import annotations

import torch
from torch import Tensor

from teco_kernels.ops._library import operator, register_fake_writing_only
from teco_kernels.ops.dense import DenseWeight
from teco_kernels.ops.gptq import Activation, GPTQWeight, matmul_arguments
from teco_kernels.ops.norm import rms_norm_reference

_recycle_project = operator("recycle_project")
_gptq_recycle_project = operator("recycle_project", "gptq")
_lm_head_argmax = operator("lm_head_argmax")
_gptq_lm_head_argmax = operator("lm_head_argmax", "gptq")
register_fake_writing_only("recycle_project", "recycle_project.gptq", "lm_head_argmax", "lm_head_argmax.gptq")

#: A weight as these operators take it: packed, or ``[out_features, in_features]`` as `torch.nn.Linear` holds it.
Weight = Tensor | DenseWeight | GPTQWeight


def recycle_project(
    hidden: Tensor,
    token_ids: Tensor,
    embedding: Tensor | GPTQWeight,
    hidden_norm: Tensor,
    embedding_norm: Tensor,
    projection: Weight,
    eps: float,
    *,
    activation: Activation = "exact",
    out: Tensor | None = None,
) -> Tensor:
    """Input of the recycle head: ``projection([rms_norm(embedding[token_ids]) ; rms_norm(hidden)])`` in one pass.

    Parameters
    ----------
    hidden : Tensor
        ``[T, hidden_size]``, fp32, fp16 or bf16: the model's last hidden states.
    token_ids : Tensor
        int64 ``[T]``: the tokens that came of them.
    embedding : Tensor or GPTQWeight
        ``[vocab_size, hidden_size]``, fp32, fp16 or bf16, or packed, as for `embedding`.
    hidden_norm, embedding_norm : Tensor
        ``[hidden_size]``, dtype of `hidden`: weights of the two norms.
    projection : Tensor, DenseWeight or GPTQWeight
        From 2 * hidden_size inputs, those of the embedding first. A plain tensor ``[out_features, 2 * hidden_size]`` is
        read as it lies: several times slower than a packed one, with the same bits.
    eps : float
        Of both norms.
    activation : {"exact", "int8"}
        As for `gptq_matmul`, with a `GPTQWeight`; the others are always exact.
    out : Tensor, optional
        ``[T, out_features]``, dtype of `hidden`; written and returned. Must not overlap `hidden`.

    Returns
    -------
    Tensor
        ``[T, out_features]``, dtype of `hidden`, usually hidden_size wide. Bit for bit what `embedding`, `rms_norm`,
        `torch.cat` and the matmul give one after the other.

    Raises
    ------
    ValueError
        For a token that is not of the vocabulary. Replayed in a plan, such a token gives a row of NaN.

    References
    ----------
    Jiang et al., "RecycleGPT: An Autoregressive Language Model with Recyclable Module", arXiv 2308.03421. DeepSeek-AI,
    "DeepSeek-V3 Technical Report", arXiv 2412.19437 (the projection of its multi-token prediction).
    """
    _check_weight(projection, "recycle_project: projection")
    if out is None:
        out = hidden.new_empty((*hidden.shape[:-1], _out_features(projection)))
    inputs = (out, hidden, token_ids, *_embedding_arguments(embedding, hidden), hidden_norm, embedding_norm)
    if isinstance(projection, GPTQWeight):
        _gptq_recycle_project(*inputs, *matmul_arguments(projection, activation), eps)
    else:
        _recycle_project(*inputs, *_dense_arguments(projection), eps)
    return out


def lm_head_argmax(
    hidden: Tensor,
    weight: Weight,
    *,
    activation: Activation = "exact",
    logsumexp: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The token with the largest logit, and that logit; the logits are never in memory.

    Where `logsumexp` is given, ``exp(logit - logsumexp)`` is the token's probability under the softmax.

    Parameters
    ----------
    hidden : Tensor
        ``[T, hidden_size]``, fp32, fp16 or bf16, after the final norm.
    weight : Tensor, DenseWeight or GPTQWeight
        The LM head, ``[V, hidden_size]`` as a plain tensor, which is read as it lies: several times slower than a
        packed one, with the same bits. A bias counts.
    activation : {"exact", "int8"}
        As for `gptq_matmul`, with a `GPTQWeight`; the others are always exact.
    logsumexp : Tensor, optional
        fp32 ``[T]``, written: the logarithm of the sum of ``exp(logits)`` of a row, never below `logit`, and an
        infinity where that is one (a probability of NaN then comes of them). Bits do not depend on the other rows nor
        on threads. None: not computed.
    out : tuple of Tensor, optional
        ``(token_ids, logit)``, written and returned.

    Returns
    -------
    token_ids : Tensor
        int64 ``[T]``; among equal logits the lowest id.
    logit : Tensor
        fp32 ``[T]``. Bit for bit the largest element of the product with ``hidden.float()`` (-0 comes as 0): logits of
        fp16 and bf16 hidden states are compared before they would be rounded.

    Raises
    ------
    ValueError
        A row's logits hold NaN; the message names the first such row. `out` then has -1 and NaN for these rows,
        `logsumexp` NaN, and both are right for all others.
    """
    _check_weight(weight, "lm_head_argmax: weight")
    if out is None:
        shape, device = hidden.shape[:1], hidden.device
        out = torch.empty(shape, dtype=torch.int64, device=device), torch.empty(shape, device=device)
    token_ids, logit = out
    if isinstance(weight, GPTQWeight):
        _gptq_lm_head_argmax(token_ids, logit, logsumexp, hidden, *matmul_arguments(weight, activation))
    else:
        _lm_head_argmax(token_ids, logit, logsumexp, hidden, *_dense_arguments(weight))
    return token_ids, logit


def _check_weight(weight: object, name: str) -> None:
    if not isinstance(weight, (Tensor, DenseWeight, GPTQWeight)):
        raise TypeError(f"{name}: expected a tensor, a DenseWeight or a GPTQWeight, got {type(weight).__name__}")
    if isinstance(weight, Tensor) and weight.dim() != 2:
        raise ValueError(f"{name}: expected shape [out_features, in_features], got {list(weight.shape)}")


def _out_features(weight: Weight) -> int:
    return weight.shape[0] if isinstance(weight, Tensor) else weight.out_features


def _embedding_arguments(embedding: Tensor | GPTQWeight, hidden: Tensor) -> tuple[object, ...]:
    if isinstance(embedding, GPTQWeight):
        if hidden.shape[-1:] != (embedding.in_features,):
            raise ValueError(
                f"recycle_project: embedding: expected rows of the {hidden.shape[-1]} elements of hidden, "
                f"got {embedding.in_features}"
            )
        order, vocab_size = embedding.input_order, embedding.out_features
        return embedding.packed, order, vocab_size, embedding.bits, embedding.has_minimum
    if not isinstance(embedding, Tensor) or not embedding.dim():
        raise TypeError(
            f"recycle_project: embedding: expected a matrix or a GPTQWeight, got {type(embedding).__name__}"
        )
    return embedding, None, embedding.shape[0], 0, False


def _dense_arguments(weight: Tensor | DenseWeight) -> tuple[object, ...]:
    if isinstance(weight, Tensor):
        return weight, None, weight.shape[0]
    return weight.packed, weight.bias, weight.out_features


def _product_reference(x: Tensor, weight: Weight) -> Tensor:
    if isinstance(weight, Tensor):
        return x.double() @ weight.double().t()
    out = x.double() @ weight.dequantize().double()
    return out if weight.bias is None else out + weight.bias.double()


def recycle_project_reference(
    hidden: Tensor,
    token_ids: Tensor,
    embedding: Tensor | GPTQWeight,
    hidden_norm: Tensor,
    embedding_norm: Tensor,
    projection: Weight,
    eps: float,
    *,
    activation: Activation = "exact",
) -> Tensor:
    """float64 reference of `recycle_project`; "int8" is held against the unquantised product."""
    # As the operators round them: the embedding to the dtype of the hidden states.
    rows = embedding.dequantize().t() if isinstance(embedding, GPTQWeight) else embedding
    embedded = rms_norm_reference(rows[token_ids].to(hidden.dtype), embedding_norm, eps)
    return _product_reference(torch.cat((embedded, rms_norm_reference(hidden, hidden_norm, eps)), dim=-1), projection)


def lm_head_argmax_reference(
    hidden: Tensor, weight: Weight, *, activation: Activation = "exact", logsumexp: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """float64 reference of `lm_head_argmax`; "int8" is held against the unquantised product.

    Another token may come of logits that are equal but for rounding. `logsumexp` is written in its own dtype.
    """
    logits = _product_reference(hidden, weight)
    if logsumexp is not None:
        logsumexp.copy_(torch.logsumexp(logits, dim=-1))
    largest = logits.amax(dim=-1)
    ids = torch.arange(logits.shape[-1]).expand_as(logits)
    return torch.where(logits == largest.unsqueeze(-1), ids, logits.shape[-1]).amin(dim=-1), largest
