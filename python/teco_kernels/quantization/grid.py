"""Grids: the values that codes can stand for, ``scale * (code - zero)``, one grid per output and group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FP16_MAX, FP16_TINY = 65504.0, 2.0**-24
#: The search narrows a grid to no less than this share of the range.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass(frozen=True)
class Grid:
    """Scales and zero points, float64 ``[..., out_features]``; scales are values that fp16 holds exactly."""

    scale: Tensor
    zero: Tensor
    bits: int

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest code of each weight, as float64 of the broadcast shape."""
        return (weight / self.scale + self.zero).round_().clamp_(0, 2**self.bits - 1)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for."""
        return self.scale * (codes - self.zero)


def fit_grid(
    weight: Tensor, bits: int, *, symmetric: bool, clip_search: bool = False, importance: Tensor | None = None
) -> Grid:
    """Fit one grid per column to a group of weights.

    Parameters
    ----------
    weight : Tensor
        float64 ``[group_size, out_features]``.
    bits : int
    symmetric : bool
        Zero point in the middle, range from the largest magnitude; else from the smallest to the largest value.
    clip_search : bool
        Try narrower ranges and neighbouring zero points too, each with the scale that fits its codes best in the sense
        of least squares, and keep the grid of the least squared rounding error: a few large weights are clipped so that
        all the others are rounded more finely.
    importance : Tensor, optional
        ``[group_size]``, weights of the squared errors in that search.

    Returns
    -------
    Grid
        ``[out_features]``. Zero points are at least 1, because v1 checkpoints cannot store 0.

    Raises
    ------
    ValueError
        For weights so large that fp16 holds no scale for them.
    """
    low, high = weight.aminmax(dim=0)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    best = _grid_over(low, high, bits, symmetric)
    if not clip_search:
        return best

    weights = 1.0 if importance is None else importance.unsqueeze(1)
    least, shift_choices = _squared_error(best, weight, weights), (0.0,) if symmetric else (0.0, -1.0, 1.0)
    for share in _SHARES:
        narrowed = _grid_over(low * share, high * share, bits, symmetric)
        for shift in shift_choices:
            grid = Grid(narrowed.scale, (narrowed.zero + shift).clamp_(1, 2**bits - 1), bits)
            grid = _least_squares_scale(grid, weight, weights)
            now = _squared_error(grid, weight, weights)
            better = now < least
            least = torch.where(better, now, least)
            best = Grid(torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero), bits)
    return best


def _squared_error(grid: Grid, weight: Tensor, importance: Tensor | float) -> Tensor:
    return (grid.values(grid.codes(weight)) - weight).square_().mul_(importance).sum(0)


def _least_squares_scale(grid: Grid, weight: Tensor, importance: Tensor | float) -> Grid:
    """The scale that is best for the codes that the weights have on this grid."""
    steps = grid.codes(weight).sub_(grid.zero)
    weighted = steps * importance
    scale = (weighted * weight).sum(0) / (weighted * steps).sum(0)
    usable = scale.isfinite() & (scale > FP16_TINY) & (scale < FP16_MAX)
    return Grid(torch.where(usable, scale, grid.scale).to(torch.float16).double(), grid.zero, grid.bits)


def _grid_over(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Grid:
    top = 2**bits - 1
    scale = (high - low) / top
    if not symmetric:
        # With a zero point of 1 or more there are `top - 1` steps above it.
        scale = torch.maximum(scale, high / (top - 1))
    if scale.numel() and not scale.max() <= FP16_MAX:
        raise ValueError(f"weight: expected finite values whose scale fp16 can hold, got a scale of {scale.max()}")
    # A group of zeros gets any scale; one that fp16 would flush to zero gets the smallest there is.
    scale = torch.where(scale == 0, 1.0, scale.clamp(min=FP16_TINY)).to(torch.float16).double()
    if symmetric:
        return Grid(scale, torch.full_like(scale, 2 ** (bits - 1)), bits)
    return Grid(scale, (-low / scale).round_().clamp_(1, top), bits)
