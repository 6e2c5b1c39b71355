"""Linear layers from a checkpoint: dense, 2:4 sparse or GPTQ, projections of one input merged into one matmul."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from teco_kernels.decoder.loader import Source
from teco_kernels.ops import (
    DenseWeight,
    GPTQWeight,
    Sparse24Weight,
    dense_matmul,
    gptq_matmul,
    sparse24_matmul,
)
from teco_kernels.ops.gptq import Activation
from teco_kernels.ops.packing import BITS, codes_per_period

Weight = DenseWeight | Sparse24Weight | GPTQWeight


class Linear:
    """``x [T, in_features] -> [T, out_features]``, a row's bits depending on that row alone.

    Parameters
    ----------
    weights : sequence of DenseWeight, Sparse24Weight or GPTQWeight
        Projections of the same input, whose outputs are concatenated; merged into one where they allow it.
    activation : {"exact", "int8"}
        For GPTQ weights, as in `gptq_matmul`.
    """

    def __init__(self, weights: Sequence[Weight], activation: Activation) -> None:
        self.weights = _merge_gptq(weights)
        self.activation = activation
        self._sizes = [weight.out_features for weight in self.weights]
        self.nbytes = sum(weight.nbytes for weight in self.weights)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply; `out` ``[T, out_features]``, which must not overlap `x`, is written and returned when given."""
        if out is None:
            out = x.new_empty(*x.shape[:-1], sum(self._sizes))
        for weight, columns in zip(self.weights, out.split(self._sizes, dim=-1), strict=True):
            if isinstance(weight, GPTQWeight):
                gptq_matmul(x, weight, activation=self.activation, out=columns)
            elif isinstance(weight, Sparse24Weight):
                sparse24_matmul(x, weight, out=columns)
            else:
                dense_matmul(x, weight, out=columns)
        return out


def _merge_gptq(weights: Sequence[Weight]) -> list[Weight]:
    """Join neighbours where they allow it; `dynamic` rules may give them different bits, group sizes or orders."""
    merged = list(weights[:1])
    for weight in weights[1:]:
        last = merged[-1]
        if isinstance(last, GPTQWeight) and isinstance(weight, GPTQWeight):
            try:
                merged[-1] = GPTQWeight.concatenate([last, weight])
                continue
            except ValueError:
                pass
        merged.append(weight)
    return merged


class WeightLoader:
    """Reads the layers of a model from its source, each in the form that the checkpoint has it in.

    Parameters
    ----------
    source : Source
    dtype : torch.dtype
        Compute dtype. Matmuls take any dtype of weight, so only wider ones are rounded to it.
    activation : {"exact", "int8"}
    """

    def __init__(self, source: Source, dtype: torch.dtype, activation: Activation) -> None:
        self._source = source
        self._dtype = dtype
        self._activation: Activation = activation
        quantization = source.quantization_config
        if quantization is not None and quantization.get("quant_method") != "gptq":
            raise ValueError(
                f"{source.path}: expected quant_method gptq in the quantization_config, "
                f"got {quantization.get('quant_method')!r}"
            )
        self._quantization: Mapping[str, Any] = quantization or {}
        sparsity = source.raw_config.get("sparsity_config")
        self._is_sparse24 = isinstance(sparsity, dict) and sparsity.get("sparsity_structure") == "2:4"

    def matrix(self, name: str, shape: tuple[int, int]) -> Tensor:
        """A floating-point weight in the dtype it is stored in, but no wider than the compute dtype."""
        weight = self._floating(name, shape)
        return weight.to(self._dtype) if weight.dtype.itemsize > self._dtype.itemsize else weight

    def vector(self, name: str, size: int) -> Tensor:
        """A one-dimensional weight in the compute dtype."""
        return self._floating(name, (size,)).to(self._dtype)

    def _floating(self, name: str, shape: tuple[int, ...]) -> Tensor:
        weight = self._source.tensor(name, shape)
        if weight.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"{self._source.path}: tensor {name!r}: expected a floating dtype of 16 to 64 bits, "
                f"got {str(weight.dtype).removeprefix('torch.')}"
            )
        return weight

    def linear(self, names: Sequence[str], in_features: int, out_features: Sequence[int], *, bias: bool) -> Linear:
        """The projections `names` of one input, with `out_features` each."""
        if any(self._source.has(f"{name}.qweight") for name in names):
            weights: list[Weight] = [
                self._gptq(name, in_features, size, bias)
                if self._source.has(f"{name}.qweight")
                else self._dense([name], in_features, [size], bias)
                for name, size in zip(names, out_features, strict=True)
            ]
            return Linear(weights, self._activation)
        return Linear([self._dense(names, in_features, out_features, bias)], self._activation)

    def _dense(self, names: Sequence[str], in_features: int, out_features: Sequence[int], bias: bool) -> Weight:
        sizes = list(zip(names, out_features, strict=True))
        rows = [self.matrix(f"{name}.weight", (size, in_features)) for name, size in sizes]
        biases = [self.vector(f"{name}.bias", size) for name, size in sizes if bias]
        weight, joined_bias = torch.cat(rows), torch.cat(biases) if bias else None
        if self._is_sparse24 and names[0].startswith("model.layers."):
            try:
                return Sparse24Weight.from_dense(weight, joined_bias)
            except ValueError as error:
                raise ValueError(f"{self._source.path}: layer {names[0]!r}: {error}") from None
        return DenseWeight.from_tensor(weight, joined_bias)

    def _gptq(self, name: str, in_features: int, out_features: int, bias: bool) -> GPTQWeight:
        settings = self._settings(name)
        bits, group_size = settings["bits"], settings["group_size"]
        multiple = codes_per_period(bits)
        if in_features % multiple or out_features % multiple:
            raise ValueError(
                f"{self._source.path}: layer {name!r}: expected sizes that are multiples of {multiple}, as {bits}-bit "
                f"checkpoints pack them, got {in_features} to {out_features}"
            )
        groups = 1 if group_size == -1 else -(-in_features // group_size)
        read, has = self._source.tensor, self._source.has
        qweight = read(f"{name}.qweight", (in_features * bits // 32, out_features))
        qzeros = read(f"{name}.qzeros", (groups, out_features * bits // 32))
        scales = read(f"{name}.scales", (groups, out_features))
        g_idx = read(f"{name}.g_idx", (in_features,)) if has(f"{name}.g_idx") else None
        # Some quantizers write a bias of zeros where the model has none.
        bias_tensor = self._floating(f"{name}.bias", (out_features,)) if bias or has(f"{name}.bias") else None
        try:
            return GPTQWeight.from_checkpoint(
                qweight,
                qzeros,
                scales,
                g_idx,
                bits=bits,
                zero_point_format="v2" if settings.get("checkpoint_format") == "gptq_v2" else "v1",
                bias=bias_tensor,
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self._source.path}: layer {name!r}: {error}") from None

    def _settings(self, name: str) -> dict[str, Any]:
        """The quantisation of one layer: the first `dynamic` rule whose pattern matches its name overrides the rest."""
        settings = dict(self._quantization)
        rules = settings.pop("dynamic", None) or {}
        try:
            # A rule "-:pattern" exempts layers; those have no qweight and do not come here.
            for rule, override in rules.items():
                if not rule.startswith("-:") and re.match(rule.removeprefix("+:"), name):
                    settings |= override
                    break
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise ValueError(
                f"{self._source.path}: expected an object 'dynamic' of patterns and settings in the "
                f"quantization_config: {error}"
            ) from None
        bits, group_size = settings.get("bits"), settings.get("group_size")
        if bits not in BITS or type(group_size) is not int or (group_size != -1 and group_size < 1):
            raise ValueError(
                f"{self._source.path}: layer {name!r}: expected 'bits' {' or '.join(map(str, BITS))} and a "
                f"'group_size' (-1: one group) in the quantization_config, got {bits!r} and {group_size!r}"
            )
        if (layout := settings.get("checkpoint_format", "gptq")) not in ("gptq", "gptq_v2"):
            raise ValueError(
                f"{self._source.path}: layer {name!r}: expected 'checkpoint_format' gptq or gptq_v2, got {layout!r}"
            )
        return settings
