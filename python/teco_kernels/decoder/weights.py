"""Linear layers from a checkpoint: dense, 2:4 sparse or quantised, projections of one input in one matmul."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from teco_kernels.decoder.loader import Tensors
from teco_kernels.decoder.quantized_layers import QuantizedLayers
from teco_kernels.ops import (
    DenseWeight,
    GPTQWeight,
    Sparse24Weight,
    dense_matmul,
    gptq_matmul,
    sparse24_matmul,
)
from teco_kernels.ops.gptq import BLOCK, Activation
from teco_kernels.ops.sparse24 import check_pattern

#: What becomes of quantised matrices: they are run as they are, or dequantised when they are loaded.
Quantization = Literal["keep", "dequantize"]

Weight = DenseWeight | Sparse24Weight | GPTQWeight


class Linear:
    """``x [T, in_features] -> [T, out_features]``, a row's bits depending on that row alone.

    Parameters
    ----------
    weights : sequence of DenseWeight, Sparse24Weight or GPTQWeight
        Projections of the same input, whose outputs are concatenated; merged into one where they allow it.
    activation : {"exact", "int8"}
        For GPTQ weights, as in `gptq_matmul`.
    section_size : int, optional
        Of GPTQ weights with int8 activations, see `gptq_matmul`.
    """

    def __init__(self, weights: Sequence[Weight], activation: Activation, section_size: int | None = None) -> None:
        self.weights = _merge_gptq(weights)
        self.section_size = section_size
        self.activation: Activation = activation
        self._sizes = [weight.out_features for weight in self.weights]
        self.nbytes = sum(weight.nbytes for weight in self.weights)

    def select(self, outputs: Tensor) -> Linear:
        """A layer that gives these of the outputs only, int64, in this order, with the same bits; of one weight."""
        (weight,) = self.weights
        assert not isinstance(weight, Sparse24Weight)  # never the head, of which this is asked
        return Linear([weight.select(outputs)], self.activation)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply; `out` ``[T, out_features]``, which must not overlap `x`, is written and returned when given.

        Of sections, it may be fp64: exact sums.
        """
        if out is None:
            out = x.new_empty(*x.shape[:-1], sum(self._sizes))
        # A step of a Python engine makes a hundred calls; most have one weight, and need no views of its columns.
        parts = out.split(self._sizes, dim=-1) if len(self._sizes) > 1 else (out,)
        for weight, columns in zip(self.weights, parts, strict=True):
            if isinstance(weight, GPTQWeight):
                gptq_matmul(x, weight, activation=self.activation, section_size=self.section_size, out=columns)
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


class _Layer(NamedTuple):
    """A projection, and what is read of it."""

    name: str
    in_features: int
    out_features: int
    bias: bool
    inputs: slice
    outputs: slice


class WeightLoader:
    """Reads the layers of a model from its source, each in the form that the checkpoint has it in.

    Parameters
    ----------
    source : Tensors
    dtype : torch.dtype
        Compute dtype. Matmuls take any dtype of weight, so only wider ones are rounded to it.
    activation : {"exact", "int8"}
    quantization : {"keep", "dequantize"}
        Whether quantised matrices are run as they are, or become dense ones.
    """

    def __init__(
        self, source: Tensors, dtype: torch.dtype, activation: Activation, quantization: Quantization = "keep"
    ) -> None:
        self._source = source
        self._dtype = dtype
        self._activation: Activation = activation
        self._layers = QuantizedLayers(source)
        self._dequantize = quantization == "dequantize"
        sparsity = source.raw_config.get("sparsity_config")
        self._is_sparse24 = isinstance(sparsity, dict) and sparsity.get("sparsity_structure") == "2:4"

    def matrix(self, name: str, shape: tuple[int, int], part: tuple[slice, slice] | None = None) -> Tensor:
        """A floating-point weight in the dtype it is stored in, but no wider than the compute dtype."""
        return self._no_wider(self._floating(name, shape, part))

    def embedding(
        self, name: str, vocab_size: int, hidden_size: int, *, tokens: range | None = None
    ) -> Tensor | GPTQWeight:
        """The matrix ``[vocab_size, hidden_size]``, or the rows of some tokens, as `ops.embedding` takes it."""
        tokens = range(vocab_size) if tokens is None else tokens
        inputs, outputs = slice(0, hidden_size), slice(tokens.start, tokens.stop)
        weight = self._quantised(name, hidden_size, vocab_size, False, inputs, outputs)
        if weight is None:
            return self.matrix(f"{name}.weight", (vocab_size, hidden_size), (outputs, inputs))
        return self._no_wider(weight.dequantize().t()).contiguous() if self._dequantize else weight

    def tied_head(self, embedding: Tensor | GPTQWeight) -> Linear:
        """The head of a model whose embedding it is; a packed one is multiplied by where it lies."""
        weight = embedding if isinstance(embedding, GPTQWeight) else DenseWeight.from_tensor(embedding)
        return Linear([weight], self._activation)

    def _no_wider(self, weight: Tensor) -> Tensor:
        return weight.to(self._dtype) if weight.dtype.itemsize > self._dtype.itemsize else weight

    def vector(self, name: str, size: int) -> Tensor:
        """A one-dimensional weight in the compute dtype."""
        return self._floating(name, (size,)).to(self._dtype)

    def _floating(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...] | None = None) -> Tensor:
        weight = self._source.tensor(name, shape, part)
        if weight.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"{self._source.file_of(name)}: tensor {name!r}: expected a floating dtype of 16 to 64 bits, "
                f"got {str(weight.dtype).removeprefix('torch.')}"
            )
        return weight

    def linear(
        self,
        names: Sequence[str],
        in_features: int,
        out_features: Sequence[int],
        *,
        bias: bool,
        inputs: range | None = None,
        outputs: Sequence[range] | None = None,
        section_size: int | None = None,
    ) -> Linear:
        """The projections `names` of one input, with `out_features` each.

        Parameters
        ----------
        names, in_features, out_features, bias
            Of the whole layers.
        inputs : range, optional
            Multiply by these only: what comes is a part of a sum. The part with input 0 adds the bias.
        outputs : sequence of range, optional
            Give only these of each.
        section_size : int, optional
            Sum sections of so many inputs apart, where the whole layers allow it: then every part of them does so.
        """
        kept = slice(0, in_features) if inputs is None else slice(inputs.start, inputs.stop)
        parts = [range(size) for size in out_features] if outputs is None else outputs
        layers = [
            _Layer(name, in_features, size, bias, kept, slice(part.start, part.stop))
            for name, size, part in zip(names, out_features, parts, strict=True)
        ]
        quantised = [self._quantised(*layer) for layer in layers]
        group_size = None if section_size is None else self._group_size_in_sections(layers, section_size)
        if self._dequantize or all(weight is None for weight in quantised):
            return Linear([self._dense(layers, quantised)], self._activation)
        weights: list[Weight] = [
            self._dense([layer], [None]) if weight is None else weight
            for layer, weight in zip(layers, quantised, strict=True)
        ]
        if group_size is None:
            return Linear(weights, self._activation)
        split = [weight.split_groups(group_size) for weight in weights if isinstance(weight, GPTQWeight)]
        return Linear(split, self._activation, section_size)

    def _group_size_in_sections(self, layers: Sequence[_Layer], section_size: int) -> int | None:
        """Of groups that neither sections nor ranks cut; None where the layers' sums cannot be made of sections."""
        sizes = [self._layers.group_size(layer.name, layer.in_features, layer.out_features) for layer in layers]
        known = [size for size in sizes if size is not None]
        size = math.gcd(section_size, *known)
        fits = self._activation == "int8" and len(known) == len(sizes) and size % BLOCK == 0
        return size if fits else None

    def _quantised(
        self, name: str, in_features: int, out_features: int, bias: bool, inputs: slice, outputs: slice
    ) -> GPTQWeight | None:
        if self._dequantize and self._source.has(f"{name}.weight"):  # which the source dequantises when it is read
            return None
        return self._layers.read(name, in_features, out_features, bias=bias, inputs=inputs, outputs=outputs)

    def _dense(self, layers: Sequence[_Layer], quantised: Sequence[GPTQWeight | None]) -> Weight:
        """Layers in one weight; those that were read in quantised form are dequantised."""
        rows, biases = [], []
        for layer, weight in zip(layers, quantised, strict=True):
            name = layer.name
            if weight is not None:
                rows.append(self._no_wider(weight.dequantize().t()))
                biases.append(weight.bias)
            else:
                shape = layer.out_features, layer.in_features
                rows.append(self.matrix(f"{name}.weight", shape, (layer.outputs, layer.inputs)))
                has_bias = layer.bias and layer.inputs.start == 0
                bias = self._floating(f"{name}.bias", shape[:1], (layer.outputs,)) if has_bias else None
                biases.append(None if bias is None else bias.to(self._dtype))
        joined = torch.cat(rows)
        parts = [torch.zeros(len(row)) if part is None else part for row, part in zip(rows, biases, strict=True)]
        joined_bias = None if all(part is None for part in biases) else torch.cat(parts)
        if self._is_sparse24 and layers[0].name.startswith("model.layers."):
            try:
                return Sparse24Weight.from_dense(joined, joined_bias)
            except ValueError:
                self._name_broken_pattern([layer.name for layer in layers], rows)
                raise
        return DenseWeight.from_tensor(joined, joined_bias)

    def _name_broken_pattern(self, names: Sequence[str], rows: Sequence[Tensor]) -> None:
        """Raise what packing the joined layers raised, for the layer that it comes from."""
        for name, weight in zip(names, rows, strict=True):
            try:
                check_pattern(weight)
            except ValueError as error:
                file = self._source.file_of(f"{name}.weight")
                raise ValueError(f"{file}: tensor '{name}.weight': {error}") from None
