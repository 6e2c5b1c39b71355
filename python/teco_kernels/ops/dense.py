"""Matmul with a floating-point weight whose bits do not depend on the number of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from teco_kernels.ops._library import operator, register_fake_writing_only

_dense_matmul = operator("dense_matmul")
register_fake_writing_only("dense_matmul")

#: Output columns that are packed into one contiguous stream.
PANEL = 16


def to_panels(columns: Tensor) -> Tensor:
    """Pack ``[rows, columns]`` into panels ``[ceil(columns / 16), rows, 16]``, the last one filled up with zeros."""
    rows, count = columns.shape
    padded = torch.nn.functional.pad(columns, (0, -count % PANEL))
    return padded.view(rows, padded.shape[1] // PANEL, PANEL).transpose(0, 1).contiguous()


def from_panels(panels: Tensor, count: int) -> Tensor:
    """Inverse of `to_panels`: ``[rows, count]``."""
    return panels.transpose(0, 1).flatten(1)[:, :count]


@dataclass(frozen=True)
class DenseWeight:
    """A floating-point weight, packed for `dense_matmul`.

    Attributes
    ----------
    packed : Tensor
        ``[ceil(out_features / 16), in_features, 16]``, fp32, fp16 or bf16.
    bias : Tensor or None
        ``[out_features]``, fp32.
    out_features : int
        Columns that are not padding.
    """

    packed: Tensor
    bias: Tensor | None
    out_features: int

    @classmethod
    def from_tensor(cls, weight: Tensor, bias: Tensor | None = None) -> DenseWeight:
        """Pack a weight ``[out_features, in_features]``, as `torch.nn.Linear` holds it, in its own dtype."""
        if weight.dim() != 2:
            raise ValueError(f"weight: expected shape [out_features, in_features], got {list(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
        packed = to_panels(weight.detach().t())
        return cls(packed, None if bias is None else bias.detach().float().contiguous(), weight.shape[0])

    def select(self, outputs: Tensor) -> DenseWeight:
        """The weight of these outputs, int64 indices, in this order."""
        columns = from_panels(self.packed, self.out_features)[:, outputs]
        return DenseWeight(to_panels(columns), None if self.bias is None else self.bias[outputs], len(outputs))

    @property
    def in_features(self) -> int:
        """Length of an input row."""
        return self.packed.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored weight."""
        return self.packed.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight: what one row must read."""
        return self.packed.nbytes

    def dequantize(self) -> Tensor:
        """The weight as fp32 ``[in_features, out_features]``."""
        return from_panels(self.packed.float(), self.out_features)


def dense_matmul(x: Tensor, weight: DenseWeight, *, out: Tensor | None = None) -> Tensor:
    """Multiply by a packed floating-point weight: ``x @ weight + bias``.

    Parameters
    ----------
    x : Tensor
        ``[..., in_features]``, fp32, fp16 or bf16; any weight dtype.
    weight : DenseWeight
        The packed weight.
    out : Tensor, optional
        ``[..., out_features]``, dtype of `x`; written and returned. Must not overlap `x`.

    Returns
    -------
    Tensor
        ``[..., out_features]``, dtype of `x`. Accumulation is fp32, one chain of fused multiply-adds per element in the
        order of the inputs: a row's bits do not depend on the other rows.
    """
    if out is None:
        out = x.new_empty((*x.shape[:-1], weight.out_features))
    _dense_matmul(out, x, weight.packed, weight.bias, weight.out_features)
    return out


def dense_matmul_reference(x: Tensor, weight: DenseWeight) -> Tensor:
    """float64 reference of `dense_matmul`, also for a `GPTQWeight`, and for a `Sparse24Weight` where `x` is finite."""
    out = x.double() @ weight.dequantize().double()
    return out if weight.bias is None else out + weight.bias.double()
