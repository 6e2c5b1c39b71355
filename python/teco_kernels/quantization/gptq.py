"""GPTQ: rounding weights one input at a time, the error of each made good by the inputs still to come."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from teco_kernels.ops.packing import BITS, ZeroPointFormat, pack_rows, pack_zeros, unpack_rows, unpack_zeros
from teco_kernels.quantization.greedy import GreedyPass
from teco_kernels.quantization.grid import Grid, fit_grid
from teco_kernels.quantization.refine import refine
from teco_kernels.quantization.sparsity import MaskSelector, Sparsity, SparsityLike, check_weight

#: How inputs are ordered for rounding, see `gptq_quantize`.
ActOrder = bool | Literal["static_groups", "group_aware"]

_OUTPUTS_AT_ONCE = 2048


@dataclass(frozen=True)
class GPTQTensors:
    """A quantised weight as a GPTQ checkpoint holds it.

    Attributes
    ----------
    qweight : Tensor
        int32 ``[in_features * bits / 32, out_features]``.
    qzeros : Tensor
        int32 ``[num_groups, out_features * bits / 32]``.
    scales : Tensor
        fp16 ``[num_groups, out_features]``.
    g_idx : Tensor
        int32 ``[in_features]``, the group of each input.
    bits : int
    group_size : int
        Inputs that share a scale.
    zero_point_format : {"v1", "v2"}
        How `qzeros` is to be read, see `pack_zeros`.
    error, rounding_error : float
        ``||(W - Q) X|| / ||W X||`` over the inputs X that the Hessian was made from: of this weight, and of rounding to
        nearest on grids of the same kind. NaN when there was no Hessian.
    dampening : float
        What the Hessian's diagonal was raised by, as a share of its mean.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bits: int
    group_size: int
    zero_point_format: ZeroPointFormat = "v1"
    error: float = float("nan")
    rounding_error: float = float("nan")
    dampening: float = 0.0

    def dequantize(self) -> Tensor:
        """The weight as fp32 ``[out_features, in_features]``, as `torch.nn.Linear` holds it."""
        groups = self.g_idx.long()
        codes = unpack_rows(self.qweight, self.bits).float()
        zeros = unpack_zeros(self.qzeros, self.bits, self.zero_point_format).float()
        return (self.scales.float()[groups] * (codes - zeros[groups])).t().contiguous()

    def tensors(self) -> dict[str, Tensor]:
        """The four tensors by their names in a checkpoint."""
        return {"qweight": self.qweight, "qzeros": self.qzeros, "scales": self.scales, "g_idx": self.g_idx}


@dataclass(frozen=True)
class HessianFactor:
    """What GPTQ needs of a Hessian; weights with the same inputs (q, k, v) share it.

    Attributes
    ----------
    hessian : Tensor
        float64 ``[in_features, in_features]``, as it came.
    dead : Tensor
        bool ``[in_features]``: inputs that were always zero.
    order : Tensor
        int64 ``[in_features]``: the order in which inputs are rounded.
    upper : Tensor
        float64: the upper triangular U with ``U^T U`` the inverse of the damped Hessian, in that order.
    dampening : float
        As in `GPTQTensors`.
    act_order : ActOrder
        What made the order.
    group_size : int or None
        The only one for which the order is right; None for any.
    """

    hessian: Tensor = field(repr=False)
    dead: Tensor = field(repr=False)
    order: Tensor = field(repr=False)
    upper: Tensor = field(repr=False)
    dampening: float
    act_order: ActOrder = False
    group_size: int | None = None

    @classmethod
    def from_hessian(
        cls, hessian: Tensor, *, act_order: ActOrder = False, dampening: float = 0.01, group_size: int | None = None
    ) -> HessianFactor:
        """Factorise; parameters as in `gptq_quantize`. The group size is needed for a group-aware order only."""
        _check_hessian(hessian)
        check_options(act_order=act_order, dampening=dampening)
        hessian = hessian.double()
        diagonal = hessian.diagonal()
        dead = diagonal == 0
        if act_order == "group_aware":
            group_size = len(hessian) if group_size == -1 else group_size
            if group_size is None or group_size < 1 or len(hessian) % group_size:
                raise ValueError(
                    f"group_size: expected -1 or a divisor of {len(hessian)} input features, got {group_size}"
                )
            order = _group_aware_order(diagonal, group_size)
        else:
            group_size = None
            order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(hessian))
        # A Hessian from fewer tokens than inputs is singular: more is added until the factorisation succeeds.
        for share in [dampening, *(d for d in (0.01, 0.03, 0.1, 0.3, 1.0) if d > dampening)]:
            if (upper := _inverse_factor(_damped(hessian, dead, order, share))) is not None:
                return cls(hessian, dead, order, upper, share, act_order, group_size)
        raise ValueError("hessian: expected a positive semidefinite matrix, it is not even with its diagonal doubled")

    @property
    def layout(self) -> Tensor:
        """The order of inputs in which those of a group stand side by side, int64 ``[in_features]``."""
        return self.order if self.act_order is True else torch.arange(len(self.order))

    def correction(self, drift: Tensor) -> Tensor:
        """The matrix C for which ``W + W C`` gives on inputs x, as nearly as it can, what W gives on their originals.

        The least squares of ``||W X' - W' X||``: ``C = D H^-1`` with the drift D. Quantising W' then is quantising W
        against the outputs that it had, and not only those that it has now.

        Parameters
        ----------
        drift : Tensor
            float64 ``[in_features, in_features]``, the mean of ``2 (x' - x) x^T``, in the scale of the Hessian.

        References
        ----------
        Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", arXiv 2504.02692 (the
        aim, reached there within the sweep); Arai and Ichikawa, "Quantization Error Propagation: Revisiting Layer-Wise
        Post-Training Quantization", arXiv 2504.09629 (this form of it).
        """
        ordered = drift[:, self.order] @ self.upper.t() @ self.upper
        return torch.empty_like(ordered).index_copy_(1, self.order, ordered)

    def damped(self) -> Tensor:
        """The damped Hessian in the order of `layout`."""
        return _damped(self.hessian, self.dead, self.layout, self.dampening)


def gptq_quantize(
    weight: Tensor,
    hessian: Tensor | HessianFactor,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    act_order: ActOrder = False,
    dampening: float = 0.01,
    clip_search: bool = False,
    refine_sweeps: int = 0,
    sparsity: SparsityLike | None = None,
    mask_block_size: int = 128,
    block_size: int = 64,
    zero_point_format: ZeroPointFormat = "v1",
) -> GPTQTensors:
    """Quantise the weight of a linear layer so that its output changes little on given inputs.

    Minimises ``tr((W - Q) H (W - Q)^T)`` greedily: input after input is rounded, and what rounding it did to the output
    is made good, as well as can be, by the weights of the inputs that follow. Arithmetic is float64: cheap beside the
    calibration pass, and it leaves nothing to the choice of `block_size`.

    Parameters
    ----------
    weight : Tensor
        ``[out_features, in_features]``, floating, as `torch.nn.Linear` holds it. Not changed.
    hessian : Tensor or HessianFactor
        ``[in_features, in_features]``: the sum of ``x x^T`` over input rows x, in any scale; or its factor, made once
        for several weights with the same inputs (`act_order` and `dampening` are then the factor's).
    bits : int
        2, 3, 4 or 8.
    group_size : int
        Inputs that share a scale and a zero point; divides `in_features`. -1: one group.
    symmetric : bool
        Zero point fixed in the middle.
    act_order : bool or {"static_groups", "group_aware"}
        Round inputs in descending order of their energy, so that those that matter most are rounded while most weights
        can still make up for it.

        - False: in the order they have.
        - True: groups hold inputs of like energy, from all over; `g_idx` is in no order, which costs a matmul a gather.
        - "static_groups": groups hold neighbours, and their grids are fitted to the weight as it came, before the first
          input is rounded.
        - "group_aware": groups hold neighbours; sorted are the inputs inside each group, and then the groups by
          the largest energy in them. Grids are fitted to corrected weights, as they are without an order.
    dampening : float
        Added to the Hessian's diagonal, as a share of its mean; raised by itself when the factorisation fails.
    clip_search : bool
        See `fit_grid`; squared errors are weighted with the inputs' energy.
    refine_sweeps : int
        Passes of `refine` over the result, on the damped Hessian.
    sparsity : float or str, optional
        Prune in the same pass, as `sparsegpt_prune` does; a pruned weight's code is its zero point.
    mask_block_size : int
        As in `sparsegpt_prune`.
    block_size : int
        Inputs whose corrections reach the rest of the weight in one matrix product. A matter of speed only.
    zero_point_format : {"v1", "v2"}
        What readers of the checkpoint expect; "v1" is what most do.

    Returns
    -------
    GPTQTensors
        Outputs (rows) that rounding to nearest serves better than the greedy order keep their rounded codes, so the
        error is never above that of rounding (of the weights that `sparsity` keeps).

    Raises
    ------
    ValueError, TypeError
        Naming the argument: shapes that contradict each other or fill no whole words, values that are not finite.

    References
    ----------
    Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    arXiv 2210.17323; Gafni et al., "Dual Precision Quantization for Efficient and Accurate Deep Neural Networks
    Inference", arXiv 2505.14638 (the group-aware order).
    """
    group_size = _check_weight(weight, bits, group_size)
    if isinstance(hessian, Tensor) and hessian.shape != (weight.shape[1],) * 2:
        raise ValueError(f"hessian: expected shape [{weight.shape[1]}, {weight.shape[1]}], got {list(hessian.shape)}")
    if block_size < 1:
        raise ValueError(f"block_size: expected a positive number, got {block_size}")
    check_options(refine_sweeps=refine_sweeps)
    if isinstance(hessian, Tensor):
        hessian = HessianFactor.from_hessian(hessian, act_order=act_order, dampening=dampening, group_size=group_size)
    factor = hessian
    if len(factor.order) != weight.shape[1]:
        raise ValueError(f"hessian: expected the factor of {weight.shape[1]} inputs, got one of {len(factor.order)}")
    if factor.group_size not in (None, group_size):
        raise ValueError(
            f"group_size: expected {factor.group_size}, for which the Hessian's factor was ordered, got {group_size}"
        )
    masks = None if sparsity is None else MaskSelector(Sparsity.parse(sparsity), factor, mask_block_size)
    # Outputs do not know of each other: taking some at a time bounds the float64 copies and keeps them in the cache.
    parts = [
        _quantize_outputs(part, factor, bits, group_size, symmetric, clip_search, refine_sweeps, masks, block_size)
        for part in weight.detach().split(_OUTPUTS_AT_ONCE)
    ]
    error, rounding_error, norm = (sum(part.squares[i] for part in parts) for i in range(3))
    return _Quantised.concatenate([part.quantised for part in parts]).pack(
        factor.layout,
        bits,
        zero_point_format,
        error=_ratio(error, norm),
        rounding_error=_ratio(rounding_error, norm),
        dampening=factor.dampening,
    )


def round_to_nearest(
    weight: Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    clip_search: bool = False,
    zero_point_format: ZeroPointFormat = "v1",
) -> GPTQTensors:
    """Quantise a weight without looking at its inputs; parameters as in `gptq_quantize`."""
    group_size = _check_weight(weight, bits, group_size)
    target = weight.detach().double().t().contiguous()
    rounded = _Quantised.empty_like(target, group_size)
    for start in range(0, len(target), group_size):
        grid = fit_grid(target[start : start + group_size], bits, symmetric=symmetric, clip_search=clip_search)
        rounded.round_group(start, target, grid)
    return rounded.pack(torch.arange(len(target)), bits, zero_point_format)


@dataclass(frozen=True)
class _Part:
    """Some outputs of a weight: the result, and the squared errors of it and of rounding, and the squared norm."""

    quantised: _Quantised
    squares: tuple[float, float, float]


def _quantize_outputs(
    weight: Tensor,
    factor: HessianFactor,
    bits: int,
    group_size: int,
    symmetric: bool,
    clip_search: bool,
    refine_sweeps: int,
    masks: MaskSelector | None,
    block_size: int,
) -> _Part:
    layout = factor.layout
    target = weight.double().t().contiguous()  # [in_features, out_features]: an input is one contiguous row
    target[factor.dead] = 0
    target = target[layout]
    hessian = factor.hessian[layout][:, layout]
    energy = hessian.diagonal()

    def fit(weights: Tensor, energy: Tensor) -> Grid:
        return fit_grid(weights, bits, symmetric=symmetric, clip_search=clip_search, importance=energy)

    rounded = _Quantised.empty_like(target, group_size)
    for start in range(0, len(target), group_size):
        group = slice(start, start + group_size)
        rounded.round_group(start, target, fit(target[group], energy[group]))

    solved = _Quantised.empty_like(target, group_size)
    static = factor.act_order == "static_groups"
    if static:
        solved.scales.copy_(rounded.scales)
        solved.zeros.copy_(rounded.zeros)
    # From here to the end of the loop rows are in the order of rounding; `places` are theirs in the layout.
    places = torch.argsort(layout)[factor.order]
    group_of, energy = (places // group_size).tolist(), energy[places]
    greedy = GreedyPass(target[places], factor.upper, block_size)
    kept = torch.ones_like(solved.codes, dtype=torch.bool)
    for row in range(len(target)):
        if row % group_size == 0 and not static:
            grid = fit(greedy.weights(group_size), energy[row : row + group_size])
            solved.set_grid(group_of[row], grid)
        if masks is not None and row % masks.span == 0:
            kept[places[row : row + masks.span]] = masks.select(greedy.weights(masks.span), row)
        (current,), place = greedy.weights(), places[row]
        grid = solved.grid(group_of[row], bits)
        codes = torch.where(kept[place], grid.codes(current), grid.zero)
        solved.codes[place] = codes.to(torch.uint8)
        greedy.fix(current, grid.values(codes))
    rounded.prune(kept)

    if refine_sweeps:
        refine(solved.codes, solved.scales, solved.zeros, target, factor.damped(), bits, refine_sweeps, kept)

    rounding_errors = _output_errors(rounded.values() - target, hessian)
    solved_errors = _output_errors(solved.values() - target, hessian)
    squares = (torch.minimum(solved_errors, rounding_errors), rounding_errors, _output_errors(target, hessian))
    total, rounding_total, norm = (square.sum().item() for square in squares)
    return _Part(solved.where(solved_errors <= rounding_errors, rounded), (total, rounding_total, norm))


@dataclass(frozen=True)
class _Quantised:
    """Codes, scales and zero points, groups side by side: [in, out], [groups, out], [groups, out]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int

    @classmethod
    def empty_like(cls, target: Tensor, group_size: int) -> _Quantised:
        groups = target.new_zeros(target.shape[0] // group_size, target.shape[1])
        return cls(torch.zeros_like(target, dtype=torch.uint8), groups, groups.clone(), group_size)

    @classmethod
    def concatenate(cls, parts: list[_Quantised]) -> _Quantised:
        codes, scales, zeros = (
            torch.cat([getattr(p, name) for p in parts], 1) for name in ("codes", "scales", "zeros")
        )
        return cls(codes, scales, zeros, parts[0].group_size)

    def grid(self, group: int, bits: int) -> Grid:
        return Grid(self.scales[group], self.zeros[group], bits)

    def set_grid(self, group: int, grid: Grid) -> None:
        self.scales[group] = grid.scale
        self.zeros[group] = grid.zero

    def round_group(self, row: int, target: Tensor, grid: Grid) -> None:
        group = slice(row, row + self.group_size)
        self.codes[group] = grid.codes(target[group]).to(torch.uint8)
        self.set_grid(row // self.group_size, grid)

    def prune(self, kept: Tensor) -> None:
        """Set the codes of weights that are not kept to their zero points."""
        zeros = self.zeros.repeat_interleave(self.group_size, dim=0).to(torch.uint8)
        self.codes.copy_(torch.where(kept, self.codes, zeros))

    def values(self) -> Tensor:
        codes = self.codes.double().unflatten(0, (-1, self.group_size))
        return codes.sub_(self.zeros.unsqueeze(1)).mul_(self.scales.unsqueeze(1)).flatten(0, 1)

    def where(self, condition: Tensor, other: _Quantised) -> _Quantised:
        """These columns where `condition` [out] holds, the other's elsewhere."""
        return _Quantised(
            torch.where(condition, self.codes, other.codes),
            torch.where(condition, self.scales, other.scales),
            torch.where(condition, self.zeros, other.zeros),
            self.group_size,
        )

    def pack(
        self,
        layout: Tensor,
        bits: int,
        zero_point_format: ZeroPointFormat,
        *,
        error: float = float("nan"),
        rounding_error: float = float("nan"),
        dampening: float = 0.0,
    ) -> GPTQTensors:
        codes, g_idx = torch.empty_like(self.codes), torch.empty(len(layout), dtype=torch.int32)
        codes[layout] = self.codes
        g_idx[layout] = torch.arange(len(layout), dtype=torch.int32) // self.group_size
        return GPTQTensors(
            qweight=pack_rows(codes, bits),
            qzeros=pack_zeros(self.zeros, bits, zero_point_format),
            scales=self.scales.to(torch.float16),
            g_idx=g_idx,
            bits=bits,
            group_size=self.group_size,
            zero_point_format=zero_point_format,
            error=error,
            rounding_error=rounding_error,
            dampening=dampening,
        )


def _damped(hessian: Tensor, dead: Tensor, order: Tensor, share: float) -> Tensor:
    ordered = hessian[order][:, order]
    ordered.diagonal()[dead[order]] = 1.0
    ordered.diagonal().add_(share * (hessian.diagonal().mean().item() or 1.0))
    return ordered


def _group_aware_order(energy: Tensor, group_size: int) -> Tensor:
    groups = energy.unflatten(0, (-1, group_size))
    inside = torch.argsort(groups, dim=1, descending=True, stable=True)
    across = torch.argsort(groups.amax(1), descending=True, stable=True)
    return (inside + torch.arange(0, len(energy), group_size).unsqueeze(1))[across].flatten()


def _inverse_factor(matrix: Tensor) -> Tensor | None:
    """Upper triangular U with ``U^T U = matrix^-1``; None when the matrix is not positive definite.

    With its order reversed, the Cholesky factor of a matrix is upper triangular, ``matrix = R R^T``, and U is the
    inverse of R: no matrix is inverted and factorised again.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if failed:
        return None
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return upper if upper.isfinite().all() else None


def _output_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """``d H d^T`` for each output's column d of ``[in_features, out_features]``."""
    return (hessian @ difference).mul_(difference).sum(0)


def _ratio(squared: float, squared_norm: float) -> float:
    return math.sqrt(max(squared, 0.0) / squared_norm) if squared_norm > 0 else 0.0


def check_options(*, act_order: ActOrder = False, dampening: float = 0.0, refine_sweeps: int = 0) -> None:
    """Raise what `gptq_quantize` raises for these, whatever the weight."""
    names = ("static_groups", "group_aware")
    if not isinstance(act_order, bool) and act_order not in names:
        raise ValueError(f"act_order: expected one of {(False, True, *names)}, got {act_order!r}")
    if not 0 <= dampening <= 1:
        raise ValueError(f"dampening: expected 0 to 1, got {dampening}")
    if refine_sweeps < 0:
        raise ValueError(f"refine_sweeps: expected 0 or more, got {refine_sweeps}")


def check_sizes(out_features: int, in_features: int, bits: int, group_size: int) -> int:
    """Raise what `gptq_quantize` raises for a weight of these sizes; return the group size, in inputs."""
    if bits not in BITS:
        raise ValueError(f"bits: expected one of {BITS}, got {bits!r}")
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if not size or size * bits % 32:
            raise ValueError(f"weight: expected {name} * {bits} bits to fill 32-bit words, got {name} {size}")
    group_size = in_features if group_size == -1 else group_size
    if group_size < 1 or in_features % group_size:
        raise ValueError(f"group_size: expected -1 or a divisor of {in_features} input features, got {group_size}")
    return group_size


def _check_weight(weight: Tensor, bits: int, group_size: int) -> int:
    """Check the arguments and return the group size, in inputs."""
    check_weight(weight)
    return check_sizes(weight.shape[0], weight.shape[1], bits, group_size)


def _check_hessian(hessian: Tensor) -> None:
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"hessian: expected a square matrix, got shape {list(hessian.shape)}")
    if not hessian.is_floating_point():
        raise TypeError(f"hessian: expected a floating dtype, got {str(hessian.dtype).removeprefix('torch.')}")
    if not hessian.isfinite().all():
        raise ValueError("hessian: expected finite values, got NaN or infinity")
    if (hessian.diagonal() < 0).any():
        raise ValueError("hessian: expected a positive semidefinite matrix, got a negative value on its diagonal")
