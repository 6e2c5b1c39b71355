"""SparseGPT: pruning weights one input at a time, the error of each made good by the inputs still to come."""

from __future__ import annotations

import torch
from torch import Tensor

from teco_kernels.quantization.gptq import HessianFactor
from teco_kernels.quantization.greedy import GreedyPass
from teco_kernels.quantization.sparsity import MaskSelector, Sparsity, SparsityLike, check_weight

_OUTPUTS_AT_ONCE = 2048


def sparsegpt_prune(
    weight: Tensor,
    hessian: Tensor | HessianFactor,
    *,
    sparsity: SparsityLike,
    dampening: float = 0.01,
    mask_block_size: int = 128,
    block_size: int = 64,
) -> Tensor:
    """Prune the weight of a linear layer so that its output changes little on given inputs.

    Minimises ``tr((W - Q) H (W - Q)^T)`` greedily, as `gptq_quantize` does: input after input, weights are set to zero,
    and what that did to the output is made good, as well as can be, by the weights of the inputs that follow. Which
    weights go is decided when their turn comes: those with the lowest ``w^2 / [H^-1]_ii``, H being the Hessian of the
    inputs that are left. To prune and quantise in one pass, give `gptq_quantize` a `sparsity`.

    Parameters
    ----------
    weight : Tensor
        ``[out_features, in_features]``, floating, as `torch.nn.Linear` holds it. Not changed.
    hessian : Tensor or HessianFactor
        As in `gptq_quantize`.
    sparsity : float or str
        The share of weights to prune, 0 to 1, in every block of `mask_block_size` inputs and up to 2048 outputs; or
        "n:m" ("2:4", "4:8"), n of every m consecutive inputs of an output being kept.
    dampening : float
        As in `gptq_quantize`.
    mask_block_size : int
        Inputs whose masks are chosen together, unless there is a pattern.
    block_size : int
        As in `gptq_quantize`.

    Returns
    -------
    Tensor
        Shape and dtype of `weight`; pruned weights are 0. A share of 0 changes nothing.

    Raises
    ------
    ValueError, TypeError
        Naming the argument; also when a pattern meets a Hessian that is ordered across its groups.

    References
    ----------
    Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774.
    """
    check_weight(weight)
    parsed = Sparsity.parse(sparsity)
    if block_size < 1:
        raise ValueError(f"block_size: expected a positive number, got {block_size}")
    if isinstance(hessian, Tensor):
        hessian = HessianFactor.from_hessian(hessian, dampening=dampening)
    if len(hessian.order) != weight.shape[1]:
        raise ValueError(f"hessian: expected {weight.shape[1]} inputs, got {len(hessian.order)}")
    masks = MaskSelector(parsed, hessian, mask_block_size)
    # Outputs do not know of each other but through the masks: taking some at a time bounds the float64 copies.
    parts = [_prune_outputs(part, hessian, masks, block_size) for part in weight.detach().split(_OUTPUTS_AT_ONCE)]
    return torch.cat(parts).to(weight.dtype) if parts else weight.clone()


def _prune_outputs(weight: Tensor, factor: HessianFactor, masks: MaskSelector, block_size: int) -> Tensor:
    target = weight.double().t()[factor.order]
    greedy, pruned = GreedyPass(target, factor.upper, block_size), torch.empty_like(target)
    for row in range(len(target)):
        if row % masks.span == 0:
            keep = masks.select(greedy.weights(masks.span), row)
        (current,) = greedy.weights()
        pruned[row] = torch.where(keep[row % masks.span], current, 0.0)
        greedy.fix(current, pruned[row])
    result = torch.empty_like(pruned)
    result[factor.order] = pruned
    return result.t()
