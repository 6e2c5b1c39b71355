"""Quantised layers of a checkpoint as `GPTQWeight`: GPTQ and AWQ tensors, and the blocks of GGUF files."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teco_kernels.decoder.loader import Tensors
from teco_kernels.decoder.parts import cover, select_groups
from teco_kernels.ops import GPTQWeight
from teco_kernels.ops.gptq import BLOCK
from teco_kernels.ops.packing import (
    BITS,
    ZeroPointFormat,
    codes_per_period,
    looks_like,
    unpack_awq,
    unpack_rows,
    unpack_zeros,
)

_METHODS = ("gptq", "awq")
_ZERO_POINT_FORMATS: dict[str, ZeroPointFormat] = {"gptq": "v1", "gptq_v2": "v2"}


class QuantizedLayers:
    """Reads layers whose codes are kept as the checkpoint has them.

    Parameters
    ----------
    source : Tensors

    Raises
    ------
    ValueError
        When the checkpoint is quantised by a method that is not understood.
    """

    def __init__(self, source: Tensors) -> None:
        self._source = source
        settings = source.quantization_config
        self._method = None if settings is None else settings.get("quant_method")
        if settings is not None and self._method not in _METHODS:
            raise ValueError(
                f"{source.path}: expected quant_method {' or '.join(_METHODS)} in the quantization_config, "
                f"got {self._method!r}"
            )
        self._settings: Mapping[str, Any] = settings or {}
        if self._method == "awq":
            _check_awq(source.path, self._settings)
        self._warned = False

    def read(
        self, name: str, in_features: int, out_features: int, *, bias: bool, inputs: slice, outputs: slice
    ) -> GPTQWeight | None:
        """The layer `name`, or a part of it; None when it is not quantised, or in a way that `GPTQWeight` cannot hold.

        Parameters
        ----------
        name : str
        in_features, out_features : int
            Of the whole layer.
        bias : bool
            Whether the model has one. (Some GPTQ quantizers write one of zeros where it has none.)
        inputs, outputs : slice
            What is read of them. The bias comes with the part that has the first input.

        Raises
        ------
        ValueError
            When its tensors contradict each other, the configuration or the sizes, naming the file and the layer.
        """
        source = self._source
        make: Callable[..., GPTQWeight]
        is_whole = inputs == slice(0, in_features) and outputs == slice(0, out_features)
        if (blocks := source.blocks(f"{name}.weight", (out_features, in_features), outputs, inputs)) is not None:
            tensors, file = blocks, source.file_of(f"{name}.weight")
            has_bias = bias
            make = GPTQWeight.from_codes
        elif source.has(f"{name}.qweight"):
            file = source.file_of(f"{name}.qweight")
            has_bias = bias or source.has(f"{name}.bias")
            make = GPTQWeight.from_codes
            if self._method == "awq":
                tensors = self._awq(name, in_features, out_features, inputs, outputs)
            elif is_whole:
                tensors = self._gptq(name, in_features, out_features)
                make = GPTQWeight.from_checkpoint
            else:
                tensors = self._gptq_part(name, in_features, out_features, inputs, outputs)
        else:
            return None
        if has_bias and inputs.start == 0:
            tensors["bias"] = source.tensor(f"{name}.bias", (out_features,), (outputs,))
        try:
            return make(**tensors)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: layer {name!r}: {error}") from None

    def group_size(self, name: str, in_features: int, out_features: int) -> int | None:
        """Inputs of a group, where all groups of the layer are equal and one after the other; else None."""
        source = self._source
        shape, first = (out_features, in_features), slice(0, 1)
        if source.blocks(f"{name}.weight", shape, first, first) is not None:
            size = BLOCK  # of all formats that are kept as they are stored
        elif not source.has(f"{name}.qweight"):
            return None
        elif self._method == "awq":
            size = self._settings["group_size"]
            size = in_features if size == -1 else size
        else:
            _, groups, _ = self._gptq_format(name, in_features, out_features)
            size = -(-in_features // groups)
            g_idx = self._g_idx(name, in_features)
            if g_idx is not None and not torch.equal(g_idx.long(), torch.arange(in_features) // size):
                return None
        return size if in_features % size == 0 else None

    def _gptq(self, name: str, in_features: int, out_features: int) -> dict[str, Any]:
        """Arguments of `GPTQWeight.from_checkpoint`."""
        bits, groups, label = self._gptq_format(name, in_features, out_features)
        read = self._source.tensor
        tensors = {
            "qweight": read(f"{name}.qweight", (in_features * bits // 32, out_features)),
            "qzeros": read(f"{name}.qzeros", (groups, out_features * bits // 32)),
            "scales": read(f"{name}.scales", (groups, out_features)),
        }
        self._compare_with_label(name, tensors["qzeros"], bits, label)
        g_idx = self._g_idx(name, in_features)
        return {**tensors, "g_idx": g_idx, "bits": bits, "zero_point_format": _ZERO_POINT_FORMATS[label]}

    def _gptq_part(
        self, name: str, in_features: int, out_features: int, inputs: slice, outputs: slice
    ) -> dict[str, Any]:
        """Arguments of `GPTQWeight.from_codes`, of the words that a part lies in."""
        bits, groups, label = self._gptq_format(name, in_features, out_features)
        read, period = self._source.tensor, codes_per_period(bits)
        words = period * bits // 32

        def part(name: str, shape: tuple[int, int], rows: slice, columns: slice) -> Tensor:
            tensor = read(name, shape, (rows, columns))
            if tensor.dtype != torch.int32:
                got = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(f"{self._source.file_of(name)}: tensor {name!r}: expected dtype int32, got {got}")
            return tensor

        g_idx = self._g_idx(name, in_features)
        if g_idx is None:
            g_idx = torch.arange(in_features) // -(-in_features // groups)
        elif g_idx.is_floating_point() or g_idx.min() < 0 or g_idx.max() >= groups:
            raise ValueError(
                f"{self._source.file_of(f'{name}.g_idx')}: tensor '{name}.g_idx': expected integers 0 to {groups - 1}"
            )
        rows, order = select_groups(g_idx[inputs].long())
        first, end = int(rows.min()), int(rows.max()) + 1
        periods, rest = cover(inputs, period)
        shape = (in_features * bits // 32, out_features)
        qweight = part(f"{name}.qweight", shape, slice(periods.start * words, periods.stop * words), outputs)
        codes = unpack_rows(qweight, bits)[rest]
        periods, rest = cover(outputs, period)
        shape = (groups, out_features * bits // 32)
        columns = slice(periods.start * words, periods.stop * words)
        qzeros = part(f"{name}.qzeros", shape, slice(first, end), columns)
        self._compare_with_label(name, qzeros, bits, label)
        zeros = unpack_zeros(qzeros, bits, _ZERO_POINT_FORMATS[label])[:, rest]
        scales = read(f"{name}.scales", (groups, out_features), (slice(first, end), outputs))
        rows = rows - first
        return {"codes": codes, "zeros": zeros[rows], "scales": scales[rows], "g_idx": order, "bits": bits}

    def _gptq_format(self, name: str, in_features: int, out_features: int) -> tuple[int, int, str]:
        """Bits, number of groups, and the label of the format."""
        settings = self._settings_of(name)
        bits, group_size = settings["bits"], settings["group_size"]
        multiple = codes_per_period(bits)
        if in_features % multiple or out_features % multiple:
            raise ValueError(
                f"{self._source.path}: layer {name!r}: expected sizes that are multiples of {multiple}, as {bits}-bit "
                f"checkpoints pack them, got {in_features} to {out_features}"
            )
        groups = 1 if group_size == -1 else -(-in_features // group_size)
        if groups > 1 and settings.get("desc_act") and not self._source.has(f"{name}.g_idx"):
            raise ValueError(
                f"{self._source.path}: layer {name!r}: expected a tensor '{name}.g_idx', as 'desc_act' is set in the "
                f"quantization_config, found none"
            )
        return bits, groups, settings["checkpoint_format"]

    def _g_idx(self, name: str, in_features: int) -> Tensor | None:
        return self._source.tensor(f"{name}.g_idx", (in_features,)) if self._source.has(f"{name}.g_idx") else None

    def _compare_with_label(self, name: str, qzeros: Tensor, bits: int, label: str) -> None:
        """Warn once when a file's zero points speak for the other format than its label: such files exist."""
        other = "gptq_v2" if label == "gptq" else "gptq"
        # Any other dtype than int32 is refused soon.
        if self._warned or qzeros.dtype != torch.int32 or not looks_like(qzeros, bits, _ZERO_POINT_FORMATS[other]):
            return
        self._warned = True
        warnings.warn(
            f"{self._source.file_of(f'{name}.qzeros')}: layer {name!r}: 'checkpoint_format' is {label!r}, but the zero "
            f"points look like those of {other!r}. They are read as it says; if the model answers nonsense, change it "
            f"in the quantization_config",
            stacklevel=2,
        )

    def _awq(self, name: str, in_features: int, out_features: int, inputs: slice, outputs: slice) -> dict[str, Any]:
        """Arguments of `GPTQWeight.from_codes`."""
        path, group_size = self._source.path, self._settings.get("group_size")
        if type(group_size) is not int or (group_size != -1 and group_size < 1):
            raise ValueError(
                f"{path}: expected a 'group_size' (-1: one group) in the quantization_config, got {group_size!r}"
            )
        group_size = in_features if group_size == -1 else group_size
        if in_features % group_size or out_features % 8:
            raise ValueError(
                f"{path}: layer {name!r}: expected whole groups of {group_size} inputs and a multiple of 8 outputs, as "
                f"AWQ packs them, got {in_features} to {out_features}"
            )
        read, groups = self._source.tensor, in_features // group_size
        in_groups, rest = cover(inputs, group_size)
        words, columns = cover(outputs, 8)
        parts = {
            "qweight": read(f"{name}.qweight", (in_features, out_features // 8), (inputs, words)),
            "qzeros": read(f"{name}.qzeros", (groups, out_features // 8), (in_groups, words)),
        }
        try:
            codes, zeros = (unpack_awq(tensor)[:, columns] for tensor in parts.values())
        except ValueError as error:
            raise ValueError(f"{self._source.file_of(f'{name}.qweight')}: layer {name!r}: {error}") from None
        scales = read(f"{name}.scales", (groups, out_features), (in_groups, outputs))
        rows, g_idx = select_groups(torch.arange(rest.start, rest.stop) // group_size)
        return {"codes": codes, "zeros": zeros[rows], "scales": scales[rows], "g_idx": g_idx, "bits": 4}

    def _settings_of(self, name: str) -> dict[str, Any]:
        """The quantisation of one layer: the first `dynamic` rule whose pattern matches its name overrides the rest."""
        path = self._source.path
        settings = dict(self._settings)
        rules = settings.pop("dynamic", None) or {}
        try:
            # A rule "-:pattern" exempts layers; those have no qweight and do not come here.
            for rule, override in rules.items():
                if not rule.startswith("-:") and re.match(rule.removeprefix("+:"), name):
                    settings |= override
                    break
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise ValueError(
                f"{path}: expected an object 'dynamic' of patterns and settings in the quantization_config: {error}"
            ) from None
        bits, group_size = settings.get("bits"), settings.get("group_size")
        if bits not in BITS or type(group_size) is not int or (group_size != -1 and group_size < 1):
            raise ValueError(
                f"{path}: layer {name!r}: expected 'bits' {' or '.join(map(str, BITS))} and a "
                f"'group_size' (-1: one group) in the quantization_config, got {bits!r} and {group_size!r}"
            )
        layout = settings.setdefault("checkpoint_format", "gptq")
        if not isinstance(layout, str) or layout not in _ZERO_POINT_FORMATS:
            raise ValueError(f"{path}: layer {name!r}: expected 'checkpoint_format' gptq or gptq_v2, got {layout!r}")
        return settings


def _check_awq(path: Path, settings: Mapping[str, Any]) -> None:
    version = settings.get("version") or settings.get("format") or "gemm"
    # Written GEMM by the one that the others learned from.
    if str(version).lower() != "gemm" or settings.get("bits", 4) != 4:
        raise ValueError(
            f"{path}: expected AWQ of 4 bits and 'version' gemm in the quantization_config, "
            f"got {settings.get('bits')!r} bits and {version!r}"
        )
