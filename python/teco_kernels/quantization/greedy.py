"""The pass that GPTQ and SparseGPT share: one input is fixed after another, the others make up for it."""

from __future__ import annotations

from torch import Tensor


class GreedyPass:
    """Fixes the weights of one input after another, in order.

    What that does to a layer's output, the weights of the inputs still to come make good as well as can be (Optimal
    Brain Surgeon: for the error ``tr((W - Q) H (W - Q)^T)`` their best change is a multiple of a row of the inverse
    Hessian, and all rows that the pass will need are those of one triangular factor).

    Parameters
    ----------
    weight : Tensor
        float64 ``[in_features, out_features]`` in the order of the pass. Not changed.
    upper : Tensor
        The factor of `HessianFactor`.
    block_size : int
        Inputs whose corrections reach the rest of the weight in one matrix product. A matter of speed only.

    Attributes
    ----------
    row : int
        The input whose turn it is.
    """

    def __init__(self, weight: Tensor, upper: Tensor, block_size: int) -> None:
        self.row = 0
        self._weight = weight.clone()
        self._upper = upper
        self._pivots: list[float] = upper.diagonal().tolist()
        self._errors = weight.new_empty(min(block_size, len(weight)), weight.shape[1])
        self._start = 0  # corrections for inputs before this one have reached all of `_weight`

    def weights(self, count: int = 1) -> Tensor:
        """The next `count` inputs' weights, corrected for all that was done so far: ``[count, out_features]``."""
        done, turn = slice(self._start, self.row), slice(self.row, self.row + count)
        errors = self._errors[: self.row - self._start]
        return self._weight[turn].addmm(self._upper[done, turn].t(), errors, alpha=-1)

    def fix(self, current: Tensor, value: Tensor) -> None:
        """Give the input whose turn it is, and whose weights are `current`, weights of `value`: ``[out_features]``."""
        error = self._errors[self.row - self._start]
        error.copy_(current).sub_(value).div_(self._pivots[self.row])
        self.row += 1
        if self.row - self._start == len(self._errors):
            corrections = self._upper[self._start : self.row, self.row :]
            self._weight[self.row :].addmm_(corrections.t(), self._errors, alpha=-1)
            self._start = self.row
