"""Gated activations."""

from __future__ import annotations

from torch import Tensor

from teco_kernels.ops._library import operator, register_fake_writing_only

_silu_and_mul = operator("silu_and_mul")
register_fake_writing_only("silu_and_mul")


def silu_and_mul(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """SwiGLU's product: ``silu(gate) * up``, `gate` and `up` being the halves of the last dimension.

    Parameters
    ----------
    x : Tensor
        ``[..., 2 * d]``, fp32, fp16 or bf16: the gate first, then the up projection.
    out : Tensor, optional
        ``[..., d]``, dtype of `x`; written and returned. Must not overlap `x`, but may be the gate's half.

    Returns
    -------
    Tensor
        ``[..., d]``, dtype of `x`.

    References
    ----------
    Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
    """
    if out is None:
        out = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    _silu_and_mul(out, x)
    return out


def silu_and_mul_reference(x: Tensor) -> Tensor:
    """float64 reference of `silu_and_mul`."""
    gate, up = x.double().chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up
