"""Quantised layers of another engine's checkpoint, read as this package reads its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from teco_kernels.decoder.loader import Tensors, open_safetensors

#: Tensors that a quantised layer may have, behind its name and a dot.
PARTS = ("qweight", "qzeros", "scales", "g_idx")


class HeldTensors(Tensors):
    """Tensors in memory, of a model whose quantization_config is given."""

    def __init__(self, tensors: Mapping[str, Tensor], quantization_config: Mapping[str, Any], name: str) -> None:
        self._tensors = tensors
        super().__init__(Path(name), {"quantization_config": dict(quantization_config)}, name)

    def names(self) -> list[str]:
        return list(self._tensors)

    def _read(self, name: str) -> Tensor:
        return self._tensors[name]

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)


class SafetensorsFiles(Tensors):
    """Tensors of some safetensors files, of a model whose quantization_config is given."""

    def __init__(self, files: Iterable[str | Path], quantization_config: Mapping[str, Any]) -> None:
        paths = [Path(file) for file in files]
        self._file_of: dict[str, Any] = {}
        for path in paths:
            handle = open_safetensors(path)
            self._file_of |= dict.fromkeys(handle.keys(), (path, handle))
        super().__init__(paths[0].parent, {"quantization_config": dict(quantization_config)}, str(paths[0].parent))

    def names(self) -> list[str]:
        return list(self._file_of)

    def file_of(self, name: str) -> Path:
        return self._file_of[name][0] if name in self._file_of else self.path

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name][1].get_tensor(name)
        return tensor

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file_of[name][1].get_slice(name).get_shape())
