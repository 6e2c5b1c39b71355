"""RMS norm, alone and fused with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor

from teco_kernels.ops._library import operator, register_fake_writing_only

_rms_norm = operator("rms_norm")
_fused_add_rms_norm = operator("fused_add_rms_norm")
register_fake_writing_only("rms_norm", "fused_add_rms_norm")


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """Root-mean-square norm over the last dimension: ``x / sqrt(mean(x**2) + eps) * weight``.

    Parameters
    ----------
    x : Tensor
        ``[..., hidden_size]``, fp32, fp16 or bf16. Leading dimensions must collapse into rows of one stride, or of two
        strides when there are three dimensions.
    weight : Tensor
        ``[hidden_size]``, dtype of `x`.
    eps : float
        Added to the mean square.
    out : Tensor, optional
        Written and returned instead of a new tensor; shape and dtype of `x`. May be `x` itself.

    Returns
    -------
    Tensor
        Shape and dtype of `x`. Accumulation is fp32; a row's bits depend on that row alone.

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.
    """
    if out is None:
        out = torch.empty_like(x)
    _rms_norm(out, x, weight, eps)
    return out


def fused_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the residual, then norm the sum, in one pass.

    Parameters
    ----------
    x, residual : Tensor
        ``[..., hidden_size]``, fp32, fp16 or bf16, same shape and dtype.
    weight : Tensor
        ``[hidden_size]``, dtype of `x`.
    eps : float
        Added to the mean square.
    out : tuple of Tensor, optional
        ``(normed, new_residual)``, written and returned; may be ``(x, residual)`` themselves.

    Returns
    -------
    normed, new_residual : Tensor
        ``new_residual = x + residual`` rounded to the dtype, ``normed = rms_norm(new_residual)``.
    """
    if out is None:
        out = torch.empty_like(x), torch.empty_like(residual)
    normed, new_residual = out
    _fused_add_rms_norm(normed, new_residual, x, residual, weight, eps)
    return normed, new_residual


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float64 reference of `rms_norm`."""
    x64 = x.double()
    return x64 / torch.sqrt(x64.square().mean(-1, keepdim=True) + eps) * weight.double()


def fused_add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """float64 reference of `fused_add_rms_norm`; the norm sees the residual as it is stored."""
    new_residual = x.double() + residual.double()
    return rms_norm_reference(new_residual.to(x.dtype), weight, eps), new_residual
