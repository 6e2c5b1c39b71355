"""Which weights to leave out: how many, where they may lie, and by what score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from teco_kernels.quantization.gptq import HessianFactor

#: A share of the weights, such as 0.5, or a pattern, such as "2:4"; see `Sparsity`.
SparsityLike = float | str


@dataclass(frozen=True)
class Sparsity:
    """How many weights are pruned, and whether they may lie anywhere.

    Attributes
    ----------
    share : float
        Of the weights that are pruned.
    pattern : tuple of int or None
        ``(n, m)``: of every m consecutive inputs of an output, starting at a multiple of m, n are kept. None: the
        pruned weights lie anywhere.
    """

    share: float
    pattern: tuple[int, int] | None = None

    @classmethod
    def parse(cls, sparsity: SparsityLike) -> Sparsity:
        """From a share of 0 to 1, or from "n:m"; either may be text.

        Raises
        ------
        ValueError
            When it is neither.
        """
        try:
            if isinstance(sparsity, str) and ":" in sparsity:
                kept, group = map(int, sparsity.split(":"))
                if 0 < kept <= group:
                    return cls(1 - kept / group, (kept, group))
            elif 0 <= (share := float(sparsity)) <= 1:
                return cls(share)
        except ValueError:
            pass
        raise ValueError(f"sparsity: expected a share of 0 to 1, or n:m with n of m weights kept, got {sparsity!r}")

    def __str__(self) -> str:
        return f"{self.share:.0%}" if self.pattern is None else "{}:{}".format(*self.pattern)

    def keep(self, scores: Tensor) -> Tensor:
        """True where a weight is kept: all but the lowest scores, among all of them or within each group of a pattern.

        Parameters
        ----------
        scores : Tensor
            ``[out_features, in_features]``. Of equal scores the first is the lower.
        """
        if self.pattern is None:
            return _all_but_lowest(scores.flatten(), round(self.share * scores.numel())).view_as(scores)
        kept, group = self.pattern
        self.check(scores.shape[-1])
        return _all_but_lowest(scores.unflatten(-1, (-1, group)), group - kept).flatten(-2)

    def check(self, in_features: int) -> None:
        """Raise ValueError unless the groups of a pattern divide the inputs."""
        if self.pattern is not None and in_features % self.pattern[1]:
            raise ValueError(f"weight: expected in_features to be a multiple of {self.pattern[1]}, got {in_features}")


def _all_but_lowest(scores: Tensor, count: int) -> Tensor:
    """False at the `count` lowest scores along the last dimension."""
    lowest = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, lowest, False)


def magnitude_mask(weight: Tensor, *, sparsity: SparsityLike) -> Tensor:
    """Keep the largest weights: what to hold other methods against.

    Parameters
    ----------
    weight : Tensor
        ``[out_features, in_features]``, floating.
    sparsity : float or str
        The share of weights to prune, 0 to 1, of the whole matrix; or "n:m" ("2:4", "4:8"), n of every m consecutive
        inputs being kept.

    Returns
    -------
    Tensor
        bool ``[out_features, in_features]``, true where a weight is kept.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.
    """
    check_weight(weight)
    return Sparsity.parse(sparsity).keep(weight.detach().double().abs())


def wanda_mask(weight: Tensor, hessian: Tensor, *, sparsity: SparsityLike) -> Tensor:
    """Keep the weights with the largest ``|w| * ||x||``, x being what the weight's input was over a calibration text.

    Parameters
    ----------
    weight : Tensor
        ``[out_features, in_features]``, floating.
    hessian : Tensor
        ``[in_features, in_features]``: the sum of ``x x^T`` over input rows x, in any scale. Only its diagonal counts.
    sparsity : float or str
        As in `magnitude_mask`, but a share is that of every output's weights.

    Returns
    -------
    Tensor
        bool ``[out_features, in_features]``, true where a weight is kept. The others stay as they are.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    References
    ----------
    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695.
    """
    check_weight(weight)
    if hessian.shape != (weight.shape[1],) * 2:
        raise ValueError(f"hessian: expected shape [{weight.shape[1]}, {weight.shape[1]}], got {list(hessian.shape)}")
    energy = hessian.diagonal().double()
    if not energy.isfinite().all() or (energy < 0).any():
        raise ValueError("hessian: expected finite values, none below 0 on its diagonal")
    parsed, scores = Sparsity.parse(sparsity), weight.detach().double().abs() * energy.sqrt()
    if parsed.pattern is not None:
        return parsed.keep(scores)
    return _all_but_lowest(scores, round(parsed.share * weight.shape[1]))


def check_weight(weight: Tensor) -> None:
    """Raise unless `weight` is a finite floating matrix."""
    if not weight.is_floating_point():
        raise TypeError(f"weight: expected a floating dtype, got {str(weight.dtype).removeprefix('torch.')}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape [out_features, in_features], got {list(weight.shape)}")
    if not weight.isfinite().all():
        raise ValueError("weight: expected finite values, got NaN or infinity")


class MaskSelector:
    """Chooses what to keep of the next inputs' weights, by SparseGPT's score.

    Parameters
    ----------
    sparsity : Sparsity
    factor : HessianFactor
    mask_block_size : int
        As in `sparsegpt_prune`.

    Attributes
    ----------
    span : int
        Inputs whose masks are chosen together (fewer at the end).
    """

    def __init__(self, sparsity: Sparsity, factor: HessianFactor, mask_block_size: int) -> None:
        if mask_block_size < 1:
            raise ValueError(f"mask_block_size: expected a positive number, got {mask_block_size}")
        sparsity.check(len(factor.order))
        self._sparsity = sparsity
        self.span = mask_block_size
        if sparsity.pattern is not None:
            self.span = sparsity.pattern[1]
            groups = (factor.order // self.span).view(-1, self.span)
            if not torch.equal(groups, groups[:, :1].expand_as(groups)):
                raise ValueError(f"sparsity: expected an order of inputs that keeps groups of {self.span} together")
        # Whatever a dead input's weights are, pruning them costs nothing.
        pivots = factor.upper.diagonal().clone()
        pivots[factor.dead[factor.order]] = float("inf")
        self._pivots = pivots.unsqueeze(1)

    def select(self, weights: Tensor, row: int) -> Tensor:
        """True where a weight is kept: `weights` are ``[inputs, out_features]``, `row` the place of the first input."""
        scores = (weights / self._pivots[row : row + len(weights)]).square_()
        return self._sparsity.keep(scores.t()).t()
