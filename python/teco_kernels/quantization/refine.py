"""What GPTQ leaves to gain: its greedy choices are looked at once more, with the whole Hessian in view."""

from __future__ import annotations

import torch
from torch import Tensor

from teco_kernels.quantization.grid import FP16_MAX, FP16_TINY


def refine(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    target: Tensor,
    hessian: Tensor,
    bits: int,
    sweeps: int,
    kept: Tensor | None = None,
) -> None:
    """Lower ``tr((W - Q)^T H (W - Q))`` by descending in the scales and in the codes by turns; zero points stay.

    GPTQ fits the grid of a group before it knows what the group's weights will have to make good, and rounds an input
    without knowing how those after it will be rounded. Here every scale and every code is chosen anew with all others
    known. No step raises any output's error.

    Parameters
    ----------
    codes : Tensor
        uint8 ``[in_features, out_features]``. Overwritten.
    scales : Tensor
        float64 ``[num_groups, out_features]``, values that fp16 holds. Overwritten.
    zeros : Tensor
        float64 ``[num_groups, out_features]``.
    target : Tensor
        float64 ``[in_features, out_features]``, the weight W to come near to.
    hessian : Tensor
        float64 ``[in_features, in_features]``, positive definite (damped).
    bits, sweeps : int
    kept : Tensor, optional
        bool ``[in_features, out_features]``: where false, codes stay at their zero points.

    References
    ----------
    Behdin et al., "QuantEase: Optimization-based Quantization for Language Models", arXiv 2309.01885 (the codes);
    Kim et al., "Two-Stage Grid Optimization for Group-wise Quantization of LLMs", arXiv 2602.02126 (the scales, there
    by coordinate descent).
    """
    weighted_target = hessian @ target
    for _ in range(sweeps):
        _fit_scales(codes, scales, zeros, hessian, weighted_target)
        _descend(codes, scales, zeros, target, hessian, bits, kept)


def _fit_scales(codes: Tensor, scales: Tensor, zeros: Tensor, hessian: Tensor, weighted_target: Tensor) -> None:
    """For each output, the scales that minimise the error for its codes: ``S^T H S s = S^T H w``.

    S holds an output's codes less their zero points, one column per group.
    """
    groups, outputs = scales.shape
    size = len(codes) // groups
    steps = codes.double().unflatten(0, (groups, size)).sub_(zeros.unsqueeze(1)).flatten(0, 1)
    normal = scales.new_empty(outputs, groups, groups)
    for group in range(groups):
        start = group * size
        products = (hessian[start:, start : start + size] @ steps[start : start + size]).mul_(steps[start:])
        column = products.unflatten(0, (-1, size)).sum(1).t()
        normal[:, group:, group] = column
        normal[:, group, group:] = column
    right = (steps * weighted_target).unflatten(0, (groups, size)).sum(1).t()

    def error(candidate: Tensor) -> Tensor:  # up to what does not depend on the scales
        s = candidate.t()
        return ((normal @ s.unsqueeze(-1)).squeeze(-1) - 2 * right).mul_(s).sum(1)

    # Whatever scale a group has whose codes all equal its zero point, it keeps it.
    idle = normal.diagonal(dim1=1, dim2=2) == 0
    factor, failed = torch.linalg.cholesky_ex(normal + idle.double().diag_embed())
    fitted = torch.cholesky_solve(torch.where(idle, scales.t(), right).unsqueeze(-1), factor).squeeze(-1).t()
    usable = ((fitted > FP16_TINY) & (fitted < FP16_MAX)).all(0) & (failed == 0)
    fitted = torch.where(usable, fitted, scales).to(torch.float16).double()
    better = error(fitted) < error(scales)
    scales.copy_(torch.where(better, fitted, scales))


def _descend(
    codes: Tensor, scales: Tensor, zeros: Tensor, target: Tensor, hessian: Tensor, bits: int, kept: Tensor | None
) -> None:
    """Choose the best code for one input after the other, all other codes being as they are."""
    groups = len(scales)
    size = len(codes) // groups
    diagonal = hessian.diagonal().tolist()
    values = codes.double().unflatten(0, (groups, size)).sub_(zeros.unsqueeze(1)).mul_(scales.unsqueeze(1))
    values = values.flatten(0, 1)
    missing = target - values
    for group in range(groups):
        start, end = group * size, (group + 1) * size
        scale, zero = scales[group], zeros[group]
        # Gradients of the group's inputs; what changes within the group is added when an input's turn comes.
        gradient = hessian[start:end] @ missing
        changes = torch.zeros_like(gradient)
        for place, row in enumerate(range(start, end)):
            pull = torch.addmv(gradient[place], changes[:place].t(), hessian[start:row, row], alpha=-1)
            best = pull.div_(diagonal[row]).add_(values[row]).div_(scale).add_(zero)
            best.round_().clamp_(0, 2**bits - 1)
            if kept is not None:
                best = torch.where(kept[row], best, zero)
            codes[row] = best
            torch.sub(best.sub_(zero).mul_(scale), values[row], out=changes[place])
        missing[start:end] -= changes
