"""Matmul with a GPTQ weight: dequantised in registers, never in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from teco_kernels.ops._library import operator, register_fake_writing_only
from teco_kernels.ops.dense import PANEL, from_panels, to_panels
from teco_kernels.ops.packing import BITS, ZeroPointFormat, unpack_rows, unpack_zeros

_gptq_matmul = operator("gptq_matmul")
register_fake_writing_only("gptq_matmul")

#: Inputs of one block: four bytes a lane, eight times.
BLOCK = 32

Activation = Literal["exact", "int8"]


def _pack_blocks(codes: Tensor, bits: int) -> Tensor:
    """Blocks of a panel as the kernel reads them: uint8 ``[..., 32, 16]`` to bytes ``[..., 64 * bits]``."""
    quads = codes.unflatten(-2, (-1, 4)).transpose(-1, -2)  # [..., 8, 16, 4]: four inputs of a column side by side
    whole = 8 // bits  # quads that lie whole in a word
    words = torch.zeros_like(quads[..., :bits, :, :])
    for place in range(whole):
        words |= quads[..., place : bits * whole : whole, :, :] << bits * place
    if bits == 3:
        words[..., :2, :, :] |= quads[..., 6:, :, :] << 6
        words[..., 2, :, :] |= quads[..., 6, :, :] >> 2 << 6 | quads[..., 7, :, :] >> 2 << 7
    return words.flatten(-3)


def _unpack_blocks(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `_pack_blocks`."""
    words = packed.unflatten(-1, (bits, PANEL, 4))
    places = [words >> bits * place & (1 << bits) - 1 for place in range(8 // bits)]
    quads = torch.stack(places, dim=-3).flatten(-4, -3)
    if bits == 3:
        high = torch.stack([words[..., 2, :, :] >> shift & 4 for shift in (4, 5)], dim=-3)
        quads = torch.cat((quads, words[..., :2, :, :] >> 6 | high), dim=-3)
    return quads.transpose(-1, -2).flatten(-3, -2)


@dataclass(frozen=True)
class GPTQWeight:
    """A quantised weight, packed for `gptq_matmul`; made by `from_checkpoint` or `from_codes`.

    The value of a weight is ``scale * (code - zero)`` with the scale and zero point of its column and group, or
    ``scale * code + minimum``. Scales and minima are kept in fp16: a product has at most 20 significant bits and is
    exact in fp32, and only the sum with a minimum is rounded.

    Attributes
    ----------
    packed : Tensor
        uint8 ``[ceil(out_features / 16), num_groups, 64 + blocks_per_group * bits * 64]``: panels of 16 columns, each
        one contiguous stream (the layout is described at GptqMatmulParams in csrc/params.h).
    input_order : Tensor or None
        int32, the input at each packed place, -1 for padding; None when that is 0, 1, 2, ...
    bias : Tensor or None
        ``[out_features]``, fp32.
    in_features, out_features, bits : int
        Sizes without padding.
    group_size : int
        Inputs that share a scale (the largest number, when groups differ).
    has_minimum : bool
        Whether groups have a minimum in place of a zero point.
    """

    packed: Tensor
    input_order: Tensor | None
    bias: Tensor | None
    in_features: int
    out_features: int
    bits: int
    group_size: int
    has_minimum: bool = False

    @classmethod
    def from_checkpoint(
        cls,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        g_idx: Tensor | None = None,
        *,
        bits: int,
        zero_point_format: ZeroPointFormat = "v1",
        bias: Tensor | None = None,
    ) -> GPTQWeight:
        """Pack the tensors of a GPTQ checkpoint. They are not needed afterwards.

        Parameters
        ----------
        qweight : Tensor
            int32 ``[in_features * bits / 32, out_features]``, codes packed along the inputs, lowest bits first.
        qzeros : Tensor
            int32 ``[num_groups, out_features * bits / 32]``, zero points packed along the outputs.
        scales : Tensor
            ``[num_groups, out_features]``, floating; rounded to fp16.
        g_idx : Tensor, optional
            int32 ``[in_features]``, the group of each input, in any order (act-order). None: equal consecutive groups.
        bits : int
            2, 3, 4 or 8. With 3, in_features and out_features are multiples of 32.
        zero_point_format : {"v1", "v2"}
            "v1" checkpoints store the zero point minus one, "v2" the zero point itself.
        bias : Tensor, optional
            ``[out_features]``.

        Raises
        ------
        ValueError
            Naming the tensor whose shape, dtype or values contradict the others.

        References
        ----------
        Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        arXiv 2210.17323.
        """
        _check_checkpoint(qweight, qzeros, scales, bits, zero_point_format)
        zeros = unpack_zeros(qzeros, bits, zero_point_format)
        return cls._pack(unpack_rows(qweight, bits), scales, zeros, g_idx, bits, False, bias)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scales: Tensor,
        *,
        bits: int,
        zeros: Tensor | None = None,
        minimum: Tensor | None = None,
        g_idx: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> GPTQWeight:
        """Pack codes that another format than GPTQ's has stored (AWQ, GGUF). They are not needed afterwards.

        Parameters
        ----------
        codes : Tensor
            uint8 ``[in_features, out_features]``, below ``2**bits``.
        scales : Tensor
            ``[num_groups, out_features]``, floating; rounded to fp16.
        bits : int
            2, 3, 4 or 8.
        zeros : Tensor, optional
            Zero points from 0 to ``2**bits``, integers ``[num_groups, out_features]``: a weight is
            ``scale * (code - zero)``.
        minimum : Tensor, optional
            In their place ``[num_groups, out_features]``, floating; rounded to fp16: a weight is
            ``scale * code + minimum``.
        g_idx : Tensor, optional
            int32 ``[in_features]``, the group of each input, in any order. None: equal consecutive groups.
        bias : Tensor, optional
            ``[out_features]``.

        Raises
        ------
        ValueError
            Naming the tensor whose shape, dtype or values contradict the others.
        """
        if (zeros is None) == (minimum is None):
            raise ValueError("zeros, minimum: expected one of the two")
        offsets = zeros if minimum is None else minimum
        assert offsets is not None
        _check_codes(codes, scales, offsets, bits, minimum is not None)
        return cls._pack(codes, scales, offsets, g_idx, bits, minimum is not None, bias)

    @classmethod
    def _pack(
        cls,
        codes: Tensor,
        scales: Tensor,
        offsets: Tensor,
        g_idx: Tensor | None,
        bits: int,
        has_minimum: bool,
        bias: Tensor | None,
    ) -> GPTQWeight:
        """Pack checked tensors; `offsets` are zero points or minima."""
        (in_features, out_features), num_groups = codes.shape, scales.shape[0]
        order, group_size = _packed_order(g_idx, in_features, num_groups)
        if order is not None:
            codes = codes[order.clamp(min=0).long()]
        blocks = to_panels(codes).unflatten(1, (num_groups, -1, BLOCK))  # [panels, groups, blocks, 32, 16]
        headers = torch.stack([to_panels(part.to(torch.float16)) for part in (scales, offsets)], dim=2)
        packed = torch.cat((headers.flatten(2).view(torch.uint8), _pack_blocks(blocks, bits).flatten(2)), dim=2)
        weight = cls(packed, order, None, in_features, out_features, bits, group_size, has_minimum)
        return weight if bias is None else weight._with_bias(bias)

    @classmethod
    def concatenate(cls, weights: list[GPTQWeight]) -> GPTQWeight:
        """Join weights along `out_features`, so that one call multiplies by all of them (q, k, v; gate, up).

        All must have the same in_features, bits, groups, kind of offsets and input order, and all but the last an
        `out_features` that is a multiple of 16.

        Raises
        ------
        ValueError
            When they differ, or a panel would be shared.
        """
        first = weights[0]
        for index, weight in enumerate(weights):
            if not first.can_join(weight):
                raise ValueError(
                    f"weights[{index}]: expected the in_features, bits, groups, offsets and input order of weights[0]"
                )
            if weight.out_features % PANEL and index < len(weights) - 1:
                raise ValueError(
                    f"weights[{index}]: expected out_features to be a multiple of {PANEL}, got {weight.out_features}"
                )
        joined = replace(
            first,
            packed=torch.cat([weight.packed for weight in weights]),
            out_features=sum(weight.out_features for weight in weights),
            bias=None,
        )
        if all(weight.bias is None for weight in weights):
            return joined
        parts = [w.bias if w.bias is not None else torch.zeros(w.out_features) for w in weights]
        return joined._with_bias(torch.cat(parts))

    def select(self, outputs: Tensor) -> GPTQWeight:
        """The weight of these outputs, int64 indices, in this order; codes, scales and offsets as they are."""
        codes, headers = self._codes()
        chosen = to_panels(from_panels(codes.flatten(1, 3), self.out_features)[:, outputs])
        blocks = chosen.unflatten(1, codes.shape[1:4])
        headers = to_panels(from_panels(headers.flatten(1, 2), self.out_features)[:, outputs]).flatten(1)
        headers = headers.unflatten(1, (codes.shape[1], -1)).view(torch.uint8)
        packed = torch.cat((headers, _pack_blocks(blocks, self.bits).flatten(2)), dim=2)
        bias = None if self.bias is None else self.bias[outputs]
        return replace(self, packed=packed, out_features=len(outputs), bias=bias)

    def split_groups(self, size: int) -> GPTQWeight:
        """The same weight in groups of `size` inputs, a multiple of 32 that divides those it has."""
        group_size = self.in_features // self.packed.shape[1]
        if self.input_order is not None or size % BLOCK or group_size % size:
            raise ValueError(f"size: groups of {group_size} inputs cannot be split into groups of {size}")
        times = group_size // size
        if times == 1:
            return self
        blocks = self.packed[..., 64:].unflatten(-1, (times, -1))
        headers = self.packed[..., None, :64].expand(*blocks.shape[:-1], 64)
        return replace(self, packed=torch.cat((headers, blocks), dim=-1).flatten(1, 2), group_size=size)

    def _codes(self) -> tuple[Tensor, Tensor]:
        """Codes uint8 ``[panels, groups, blocks, 32, 16]``; scales and offsets fp16 ``[panels, groups, 2, 16]``."""
        headers = self.packed[..., :64].view(torch.float16).unflatten(-1, (2, PANEL))
        return _unpack_blocks(self.packed[..., 64:].unflatten(-1, (-1, self.bits * 64)), self.bits), headers

    def can_join(self, other: GPTQWeight) -> bool:
        """Whether `concatenate` can join the two, as far as their inputs are concerned."""
        same_order = (
            other.input_order is None
            if self.input_order is None
            else other.input_order is not None and torch.equal(self.input_order, other.input_order)
        )
        return same_order and self._kind == other._kind

    @property
    def _kind(self) -> tuple[object, ...]:
        """What the panels of weights that are multiplied in one call have in common."""
        return self.in_features, self.bits, self.has_minimum, self.packed.shape[1:]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight: what a pass over it must read."""
        return self.packed.nbytes

    def dequantize(self) -> Tensor:
        """fp32 ``[in_features, out_features]``: ``scale * (code - zero)``, or ``scale * code + minimum``."""
        blocks, headers = self._codes()
        scales, offsets = headers.float().unsqueeze(3).unbind(2)  # [panels, groups, 1, 16]
        codes = blocks.flatten(2, 3).float()  # [panels, groups, inputs, 16]
        values = scales * codes + offsets if self.has_minimum else scales * (codes - offsets)
        columns = from_panels(values.flatten(1, 2), self.out_features)
        if self.input_order is None:
            return columns
        present = self.input_order >= 0
        out = torch.empty(self.in_features, self.out_features)
        out[self.input_order[present].long()] = columns[present]
        return out

    def _with_bias(self, bias: Tensor) -> GPTQWeight:
        if bias.shape != (self.out_features,):
            raise ValueError(f"bias: expected shape [{self.out_features}], got {list(bias.shape)}")
        if not bias.is_floating_point():
            raise TypeError(f"bias: expected a floating dtype, got {str(bias.dtype).removeprefix('torch.')}")
        return replace(self, bias=bias.detach().float().contiguous())


def _check_checkpoint(qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, zero_point_format: str) -> None:
    if bits not in BITS:
        raise ValueError(f"bits: expected one of {BITS}, got {bits}")
    if zero_point_format not in ("v1", "v2"):
        raise ValueError(f"zero_point_format: expected 'v1' or 'v2', got {zero_point_format!r}")
    for name, tensor in (("qweight", qweight), ("qzeros", qzeros)):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name}: expected dtype int32, got {str(tensor.dtype).removeprefix('torch.')}")
    if not scales.is_floating_point():
        raise TypeError(f"scales: expected a floating dtype, got {str(scales.dtype).removeprefix('torch.')}")
    if qweight.dim() != 2:
        raise ValueError(f"qweight: expected shape [in_features * bits / 32, out_features], got {list(qweight.shape)}")
    if bits == 3 and qweight.shape[0] % 3:
        raise ValueError(f"qweight: expected a multiple of 3 rows with 3 bits, got {list(qweight.shape)}")
    if not qweight.numel():
        raise ValueError(f"qweight: expected at least one input and one output, got shape {list(qweight.shape)}")
    out_features = qweight.shape[1]
    if scales.dim() != 2 or scales.shape[1] != out_features or scales.shape[0] < 1:
        raise ValueError(f"scales: expected shape [num_groups, {out_features}], got {list(scales.shape)}")
    if out_features * bits % 32 or qzeros.shape != (scales.shape[0], out_features * bits // 32):
        raise ValueError(
            f"qzeros: expected shape [{scales.shape[0]}, {out_features * bits / 32:g}] "
            f"({out_features} zero points of {bits} bits), got {list(qzeros.shape)}"
        )
    _check_fp16("scales", scales)


def _check_codes(codes: Tensor, scales: Tensor, offsets: Tensor, bits: int, has_minimum: bool) -> None:
    if bits not in BITS:
        raise ValueError(f"bits: expected one of {BITS}, got {bits}")
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes: expected dtype uint8, got {str(codes.dtype).removeprefix('torch.')}")
    if codes.dim() != 2 or not codes.numel():
        raise ValueError(f"codes: expected at least one input and one output, got shape {list(codes.shape)}")
    if bits < 8 and codes.max() >= 2**bits:
        raise ValueError(f"codes: expected values from 0 to {2**bits - 1}, got {codes.max()}")
    name = "minimum" if has_minimum else "zeros"
    if scales.dim() != 2 or scales.shape[1] != codes.shape[1] or scales.shape[0] < 1:
        raise ValueError(f"scales: expected shape [num_groups, {codes.shape[1]}], got {list(scales.shape)}")
    if offsets.shape != scales.shape:
        raise ValueError(f"{name}: expected the shape of scales, {list(scales.shape)}, got {list(offsets.shape)}")
    for tensor_name, tensor, floating in (("scales", scales, True), (name, offsets, has_minimum)):
        if tensor.is_floating_point() != floating:
            expected = "a floating" if floating else "an integer"
            got = str(tensor.dtype).removeprefix("torch.")
            raise TypeError(f"{tensor_name}: expected {expected} dtype, got {got}")
        if floating:
            _check_fp16(tensor_name, tensor)
    if not has_minimum and (offsets.min() < 0 or offsets.max() > 2**bits):
        raise ValueError(f"zeros: expected values from 0 to {2**bits}, got {offsets.min()} to {offsets.max()}")


def _check_fp16(name: str, tensor: Tensor) -> None:
    if not tensor.to(torch.float16).isfinite().all():
        raise ValueError(f"{name}: expected finite values that fp16 can hold, got NaN, infinity or a value above 65504")


def _packed_order(g_idx: Tensor | None, in_features: int, num_groups: int) -> tuple[Tensor | None, int]:
    """Input at each packed place (None for the identity), and the size of the largest group."""
    if g_idx is None:
        if in_features % num_groups:
            raise ValueError(f"scales: {num_groups} groups do not divide {in_features} input features; give g_idx")
        groups = torch.arange(in_features) // (in_features // num_groups)
    else:
        if g_idx.is_floating_point():
            raise TypeError(f"g_idx: expected an integer dtype, got {str(g_idx.dtype).removeprefix('torch.')}")
        groups = g_idx.long()
        if g_idx.shape != (in_features,):
            raise ValueError(f"g_idx: expected shape [{in_features}], got {list(g_idx.shape)}")
        if groups.numel() and (groups.min() < 0 or groups.max() >= num_groups):
            raise ValueError(f"g_idx: expected groups 0 to {num_groups - 1}, got {groups.min()} to {groups.max()}")
    sizes = torch.bincount(groups, minlength=num_groups)
    largest = int(sizes.max())
    padded = -(-largest // BLOCK) * BLOCK
    order = torch.full((num_groups, padded), -1, dtype=torch.int32)
    by_group = torch.sort(groups, stable=True)
    place_in_group = torch.arange(in_features) - (sizes.cumsum(0) - sizes)[by_group.values]
    order[by_group.values, place_in_group] = by_group.indices.to(torch.int32)
    order = order.flatten()
    identity = order.numel() == in_features and torch.equal(order, torch.arange(in_features, dtype=torch.int32))
    return (None if identity else order), largest


def gptq_matmul(
    x: Tensor,
    weight: GPTQWeight,
    *,
    activation: Activation = "exact",
    section_size: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply by a quantised weight: ``x @ dequantize(weight) + bias``.

    Parameters
    ----------
    x : Tensor
        ``[..., in_features]``, fp32, fp16 or bf16.
    weight : GPTQWeight
        The packed weight.
    activation : {"exact", "int8"}
        "exact": fp32 arithmetic on the dequantised weight. "int8": `x` is quantised to 8 bits per row and block of 32
        inputs (of the packed order), products and their sums are exact integers; several times faster, relative error
        about 0.6 %.
    section_size : int, optional
        With "int8" and without an `input_order`, not with Triton: inputs of a section, a multiple of the group size.
        Sections are summed apart, in fp32, these sums rounded to multiples of 2^-32 and added in fp64, as is the bias:
        exactly, up to 2^21, so that it does not matter which are added first. The last section may be shorter. The
        absolute error is 2^-33 per section: inputs that small lose their bits.
    out : Tensor, optional
        ``[..., out_features]``, dtype of `x`; written and returned. Must not overlap `x`. With sections it may be fp64:
        exact sums, which others, of other sections, can be added to; rounded to fp32, their sum has the bits of a
        product that has all the inputs.

    Returns
    -------
    Tensor
        ``[..., out_features]``, dtype of `x`. A row's bits do not depend on the other rows. A NaN or infinity in a row
        of `x` makes that row's outputs NaN with "int8", and follows IEEE arithmetic with "exact".
    """
    arguments = matmul_arguments(weight, activation)
    if section_size is not None and section_size < 1:
        raise ValueError(f"section_size: expected a positive number, got {section_size}")
    if out is None:
        out = x.new_empty((*x.shape[:-1], weight.out_features))
    _gptq_matmul(out, x, *arguments, section_size or 0)
    return out


def matmul_arguments(weight: GPTQWeight, activation: Activation) -> tuple[object, ...]:
    """What the compiled operators that multiply take of a weight."""
    if activation not in ("exact", "int8"):
        raise ValueError(f"activation: expected 'exact' or 'int8', got {activation!r}")
    return (
        weight.packed,
        weight.input_order,
        weight.bias,
        weight.in_features,
        weight.out_features,
        weight.bits,
        weight.has_minimum,
        activation == "int8",
    )


def gptq_matmul_reference(x: Tensor, weight: GPTQWeight, *, activation: Activation = "exact") -> Tensor:
    """float64 reference of `gptq_matmul`; "int8" is held against the unquantised product."""
    out = x.double() @ weight.dequantize().double()
    return out if weight.bias is None else out + weight.bias.double()
