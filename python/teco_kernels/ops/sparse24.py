"""Matmul with a 2:4 sparse weight: of every four inputs of an output, two count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from teco_kernels.ops._library import operator, register_fake_writing_only
from teco_kernels.ops.dense import from_panels, to_panels

_sparse24_matmul = operator("sparse24_matmul")
register_fake_writing_only("sparse24_matmul")

#: Inputs of which two are kept, and groups of them whose places fill a word.
GROUP, GROUPS_PER_WORD = 4, 8


@dataclass(frozen=True)
class Sparse24Weight:
    """A weight with at most two values in every four inputs, packed for `sparse24_matmul`; made by `from_dense`.

    Beside the values stand their places, two bits each: 9/16 of a dense weight's bytes with 16-bit values, 17/32
    with fp32.

    Attributes
    ----------
    values : Tensor
        ``[ceil(out_features / 16), in_features / 4, 2, 16]``, fp32, fp16 or bf16.
    indices : Tensor
        int32 ``[ceil(out_features / 16), ceil(in_features / 32), 16]``: of each value, its place among the four inputs,
        that of the first of group g in bits ``4 * (g % 8)`` and up, that of the second in the two bits above.
    bias : Tensor or None
        ``[out_features]``, fp32.
    in_features, out_features : int
        Sizes without padding.
    """

    values: Tensor
    indices: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None) -> Sparse24Weight:
        """Pack a pruned weight ``[out_features, in_features]``, as `torch.nn.Linear` holds it, in its own dtype.

        Raises
        ------
        ValueError
            When in_features is no multiple of 4, or more than two of four weights are not 0.

        References
        ----------
        Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378 (the pattern).
        """
        if weight.dim() != 2:
            raise ValueError(f"weight: expected shape [out_features, in_features], got {list(weight.shape)}")
        out_features, in_features = weight.shape
        if bias is not None and bias.shape != (out_features,):
            raise ValueError(f"bias: expected shape [{out_features}], got {list(bias.shape)}")
        weight = weight.detach()
        check_pattern(weight)
        groups = to_panels(weight.t()).unflatten(1, (in_features // GROUP, GROUP))  # [panels, groups, 4, 16]
        # Places of what is not zero (and of a zero, where there is not enough of it), in the order of the inputs.
        places = (groups == 0).to(torch.uint8).argsort(dim=2, stable=True)[:, :, :2].sort(dim=2).values
        nibbles = places[:, :, 0] | places[:, :, 1] << 2
        nibbles = torch.nn.functional.pad(nibbles, (0, 0, 0, -nibbles.shape[1] % GROUPS_PER_WORD))
        shifts = 4 * torch.arange(GROUPS_PER_WORD).unsqueeze(1)
        words = (nibbles.unflatten(1, (-1, GROUPS_PER_WORD)) << shifts).sum(dim=2)
        return cls(
            groups.gather(2, places),
            torch.where(words >= 2**31, words - 2**32, words).to(torch.int32),  # the highest bit is the sign
            None if bias is None else bias.detach().float().contiguous(),
            in_features,
            out_features,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight: what one row must read."""
        return self.values.nbytes + self.indices.nbytes

    def dequantize(self) -> Tensor:
        """The weight as fp32 ``[in_features, out_features]``, zeros among it."""
        shifts = 4 * torch.arange(GROUPS_PER_WORD).unsqueeze(1)
        nibbles = (self.indices.unsqueeze(2) >> shifts).flatten(1, 2)[:, : self.in_features // GROUP]
        places = torch.stack((nibbles & 3, nibbles >> 2 & 3), dim=2)
        panels, groups, _, columns = places.shape
        dense = torch.zeros(panels, groups, GROUP, columns).scatter_(2, places.long(), self.values.float())
        return from_panels(dense.flatten(1, 2), self.out_features)


def check_pattern(weight: Tensor) -> None:
    """Raise ValueError, naming the first place, unless at most two of every four consecutive inputs are not 0."""
    if weight.shape[-1] % GROUP:
        raise ValueError(f"weight: expected in_features to be a multiple of {GROUP}, got {weight.shape[-1]}")
    counts = weight.unflatten(-1, (-1, GROUP)).count_nonzero(dim=-1)
    if (wrong := (counts > 2).nonzero()).numel():
        output, group = wrong[0].tolist()
        raise ValueError(
            f"weight: expected at most 2 weights other than 0 in every {GROUP} inputs, got {counts[output, group]} at "
            f"output {output}, inputs {GROUP * group} to {GROUP * group + GROUP - 1}"
        )


def sparse24_matmul(x: Tensor, weight: Sparse24Weight, *, out: Tensor | None = None) -> Tensor:
    """Multiply by a packed 2:4 sparse weight: ``x @ weight + bias``.

    Parameters
    ----------
    x : Tensor
        ``[..., in_features]``, fp32, fp16 or bf16; any weight dtype.
    weight : Sparse24Weight
        The packed weight.
    out : Tensor, optional
        ``[..., out_features]``, dtype of `x`; written and returned. Must not overlap `x`.

    Returns
    -------
    Tensor
        ``[..., out_features]``, dtype of `x`. Accumulation is fp32, one chain of fused multiply-adds per element in the
        order of the inputs: a row's bits do not depend on the other rows, and are those of `dense_matmul` with the same
        weight. Pruned weights are skipped, not multiplied by: where `x` holds NaN or infinity, outputs without a
        weight there do not see it, but for groups with fewer than two weights, which are filled up with zeros that
        count as weights. A sum of zero may have another sign than that of `dense_matmul`.
    """
    if out is None:
        out = x.new_empty((*x.shape[:-1], weight.out_features))
    _sparse24_matmul(out, x, weight.values, weight.indices, weight.bias, weight.in_features, weight.out_features)
    return out
