"""Rotary position embedding; the tables it reads are made by `teco_kernels.ops.rope`."""

from __future__ import annotations

from torch import Tensor

from teco_kernels.ops._library import operator, register_fake_writing_only

_rotary_embedding = operator("rotary_embedding")
register_fake_writing_only("rotary_embedding")


def rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor, cos_sin_cache: Tensor, *, interleaved: bool = False
) -> None:
    """Rotate the first `rotary_dim` elements of every query and key head by their token's position, in place.

    Parameters
    ----------
    positions : Tensor
        int64 ``[T]``, each from 0 to ``max_position - 1``; a position outside raises ValueError and nothing is written.
    query : Tensor
        ``[T, Hq, D]``, fp32, fp16 or bf16; written. Any strides but 1 in the last dimension: views of a merged
        projection are rotated where they are.
    key : Tensor
        ``[T, Hkv, D]``, dtype of `query`; written. Must not overlap `query`.
    cos_sin_cache : Tensor
        fp32 ``[max_position, rotary_dim]``: the cosines, then the sines, of `rotary_dim` / 2 angles per position.
        `rotary_dim` is even and at most `D`; see `teco_kernels.ops.rope.cos_sin_cache`.
    interleaved : bool
        The pairs that turn together: ``(i, i + rotary_dim / 2)`` (Hugging Face, GPT-NeoX) or, interleaved,
        ``(2i, 2i + 1)`` (GPT-J, Meta's Llama weights).

    References
    ----------
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864.
    """
    _rotary_embedding(positions, query, key, cos_sin_cache, interleaved)


def rotary_embedding_reference(
    positions: Tensor, query: Tensor, key: Tensor, cos_sin_cache: Tensor, *, interleaved: bool = False
) -> None:
    """float64 reference of `rotary_embedding`; also in place, rounded once."""
    cos, sin = cos_sin_cache[positions].double().unsqueeze(1).chunk(2, dim=-1)
    rotary_dim = cos_sin_cache.shape[1]
    for heads in (query, key):
        part = heads[..., :rotary_dim]
        x, y = (part[..., ::2], part[..., 1::2]) if interleaved else part.chunk(2, dim=-1)
        x64, y64 = x.double(), y.double()
        x.copy_(x64 * cos - y64 * sin)
        y.copy_(y64 * cos + x64 * sin)
