"""Where a model comes from: a Hugging Face directory or a GGUF file, behind one interface. Pickles are never read."""

from __future__ import annotations

import json
import zlib
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from teco_kernels.decoder.config import ModelConfig
from teco_kernels.decoder.json_file import read_json
from teco_kernels.decoder.tokenizer import Tokenizer


class Tensors(ABC):
    """Tensors that are read when asked for, by name.

    Attributes
    ----------
    path : Path
        The directory or file.
    raw_config : dict
        Contents of its ``config.json`` (made from the metadata of a GGUF file).
    quantization_config : dict or None
        How the weights are quantised; None when `tensor` gives plain weights.
    """

    def __init__(self, path: Path, raw_config: dict[str, Any], origin: str) -> None:
        self.path = path
        self.raw_config = raw_config
        self.quantization_config: dict[str, Any] | None = raw_config.get("quantization_config")
        if not isinstance(self.quantization_config, dict | None):
            raise ValueError(f"{origin}: expected an object 'quantization_config', got {self.quantization_config!r}")

    @abstractmethod
    def names(self) -> list[str]:
        """Names of all tensors."""

    @abstractmethod
    def _read(self, name: str) -> torch.Tensor:
        """The tensor `name`, which exists."""

    @abstractmethod
    def _shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`, which exists."""

    def _read_part(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        """A part of the tensor `name`, which exists, without reading all of it where the file allows that."""
        return self._read(name)[part]

    def tensor(
        self, name: str, shape: tuple[int, ...] | None = None, part: tuple[slice, ...] | None = None
    ) -> torch.Tensor:
        """Read one tensor, in the dtype it is stored in (fp32 when the file stores it in a block format).

        Parameters
        ----------
        name : str
        shape : tuple of int, optional
            What its shape must be.
        part : tuple of slice, optional
            Of its dimensions, to be read instead of the whole.

        Raises
        ------
        ValueError
            When there is no such tensor, or its shape is not `shape`.
        """
        if name not in self._name_set:
            raise ValueError(f"{self.path}: tensor {name!r} is missing")
        found = self._shape(name) if shape is not None else None
        if found != shape:
            raise ValueError(
                f"{self.file_of(name)}: tensor {name!r} has shape {list(found or ())}, "
                f"the configuration asks for {list(shape or ())}"
            )
        return self._read(name) if part is None else self._read_part(name, part)

    def blocks(self, name: str, shape: tuple[int, int], outputs: slice, inputs: slice) -> dict[str, Any] | None:
        """A part of the matrix `name` as arguments of `GPTQWeight.from_codes`, when the file stores it in such a form.

        Raises
        ------
        ValueError
            When its shape is not `shape`, ``(out_features, in_features)``.
        """
        return None

    def fingerprint(self) -> int:
        """A checksum by which copies of a model are known: its configuration, and of each tensor the first row."""
        total = zlib.crc32(json.dumps(self.raw_config, sort_keys=True, default=str).encode())
        for name in sorted(self.names()):
            shape = self._shape(name)
            rest = (slice(None),) * (len(shape) - 1)
            tensor = self._read_part(name, (slice(0, 1), *rest)) if rest else self._read(name)
            total = zlib.crc32(f"{name} {shape} {tensor.dtype}".encode(), total)
            total = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes(), total)
        return total

    def file_of(self, name: str) -> Path:
        """The file that holds tensor `name`; `path` when none does."""
        return self.path

    def has(self, name: str) -> bool:
        """Whether there is a tensor `name`."""
        return name in self._name_set

    @cached_property
    def _name_set(self) -> frozenset[str]:
        return frozenset(self.names())


class Source(Tensors):
    """A checkpoint, its tensors under their Hugging Face names.

    Attributes
    ----------
    config : ModelConfig
        What `raw_config` says, checked.
    """

    def __init__(self, path: Path, raw_config: dict[str, Any], origin: str) -> None:
        self.config = ModelConfig.from_dict(raw_config, origin)
        super().__init__(path, raw_config, origin)

    @cached_property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to the model."""


class DirectorySource(Source):
    """A Hugging Face directory: config.json, safetensors in one file or in shards, tokenizer.json."""

    def __init__(self, path: Path) -> None:
        raw = read_json(path / "config.json")
        if "eos_token_id" in (generation := read_json(path / "generation_config.json", optional=True)):
            raw["eos_token_id"] = generation["eos_token_id"]
        if "quantization_config" not in raw and (older := read_json(path / "quantize_config.json", optional=True)):
            raw["quantization_config"] = {"quant_method": "gptq", **older}
        super().__init__(path, raw, str(path / "config.json"))
        self._files = {file: open_safetensors(file) for file in self._shards()}
        self._file_of = {name: file for file, handle in self._files.items() for name in handle.keys()}  # noqa: SIM118

    def _shards(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise ValueError(f"{index}: expected an object 'weight_map' of file names")
            return [self.path / name for name in sorted(set(weight_map.values()))]
        if (single := self.path / "model.safetensors").exists():
            return [single]
        if files := sorted(self.path.glob("*.safetensors")):
            return files
        raise ValueError(f"{self.path}: expected *.safetensors files, found none (pickled weights are never read)")

    def names(self) -> list[str]:
        return list(self._file_of)

    def file_of(self, name: str) -> Path:
        return self._file_of.get(name, self.path)

    def _read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[self._file_of[name]].get_tensor(name)
        return tensor

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[self._file_of[name]].get_slice(name).get_shape())

    def _read_part(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        tensor: torch.Tensor = self._files[self._file_of[name]].get_slice(name)[part]
        return tensor

    @cached_property
    def tokenizer(self) -> Tokenizer:
        eos = self.raw_config.get("eos_token_id")
        eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(type(token) is int for token in eos):
            raise ValueError(f"{self.path / 'config.json'}: expected integers 'eos_token_id', got {eos!r}")
        return Tokenizer.from_directory(self.path, eos)


def load_source(path: str | Path) -> Source:
    """Open a Hugging Face directory or a ``.gguf`` file.

    Raises
    ------
    ValueError
        Naming the file, when there is no such path, something in it is missing, cut off or not understood.
    """
    path = Path(path)
    if path.is_dir():
        return DirectorySource(path)
    if path.is_file():
        from teco_kernels.decoder.gguf import GGUFSource

        return GGUFSource(path)
    raise ValueError(f"{path}: expected a Hugging Face directory or a .gguf file, found neither")


def open_safetensors(path: Path) -> Any:
    """A lazily read safetensors file."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{path}: file is missing") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated or damaged safetensors file: {error}") from None
