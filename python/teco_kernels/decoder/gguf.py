"""GGUF files as a source: metadata read directly, tensors renamed; dequantised by the `gguf` package, or in codes.

`gguf.GGUFReader` makes an array per metadata element, which takes seconds for a vocabulary; this reader takes a
fraction of one.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from teco_kernels.decoder.gguf_blocks import BLOCK, BLOCK_FORMATS, read_blocks
from teco_kernels.decoder.loader import Source
from teco_kernels.decoder.parts import cover, cut_inputs
from teco_kernels.decoder.tokenizer import Tokenizer

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALL = slice(None)
_MAX_DIMS = 4  # of a ggml tensor
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class _TensorInfo:
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int

    @property
    def nbytes(self) -> int:
        elements, nbytes = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // elements * nbytes


class _Reader:
    """A cursor over the file; reading past its end is a ValueError naming it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path}: not a GGUF file")
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.position = 4

    def truncated(self) -> ValueError:
        return ValueError(f"{self.path}: truncated or damaged GGUF file (in its metadata)")

    def take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise self.truncated()
        return self.data[start : self.position]

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def scalar(self, code: str) -> Any:
        return self.scalars(code, 1)[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.scalar("I"), self.scalar("Q")
            if element == _STRING:
                return [self.string() for _ in range(count)]
            kind = element
            if kind in _SCALARS:
                return list(self.scalars(_SCALARS[kind], count))
        if kind not in _SCALARS:
            raise self.truncated()
        return self.scalar(_SCALARS[kind])


class GGUFSource(Source):
    """A GGUF file of the llama (also Mistral), qwen2 or qwen3 architecture."""

    def __init__(self, path: Path) -> None:
        reader = _Reader(path)
        version, num_tensors, num_values = reader.scalar("I"), reader.scalar("Q"), reader.scalar("Q")
        if version not in (2, 3):
            raise ValueError(f"{path}: expected GGUF version 2 or 3, little-endian; got {version}")
        self._metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = reader.string()
            self._metadata[key] = reader.value(reader.scalar("I"))
        self._architecture = self._metadata.get("general.architecture")
        if self._architecture not in _ARCHITECTURES:
            raise ValueError(
                f"{path}: unknown architecture {self._architecture!r}; supported are {', '.join(_ARCHITECTURES)}"
            )
        self._data = np.frombuffer(reader.data, dtype=np.uint8)
        self._infos: dict[str, _TensorInfo] = {}
        self._rope_factors: _TensorInfo | None = None
        infos = [self._read_info(reader) for _ in range(num_tensors)]
        alignment = self._metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{path}: expected a positive integer 'general.alignment', got {alignment!r}")
        self._start = -(-reader.position // alignment) * alignment
        for name, info in infos:
            if self._start + info.offset + info.nbytes > len(self._data):
                raise ValueError(f"{path}: truncated GGUF file: it ends before the end of tensor {name!r}")
            if name == "rope_freqs.weight":
                self._rope_factors = info
            else:
                self._infos[self._hugging_face_name(path, name)] = info
        super().__init__(path, self._hugging_face_config(path), str(path))

    @staticmethod
    def _read_info(reader: _Reader) -> tuple[str, _TensorInfo]:
        name = reader.string()
        num_dims = reader.scalar("I")
        if not name or not 1 <= num_dims <= _MAX_DIMS:
            raise reader.truncated()
        shape = reader.scalars("Q", num_dims)[::-1]
        kind, offset = reader.scalar("I"), reader.scalar("Q")
        try:
            info = _TensorInfo(shape, GGMLQuantizationType(kind), offset)
            elements, _ = GGML_QUANT_SIZES[info.kind]
        except (ValueError, KeyError):
            raise ValueError(f"{reader.path}: tensor {name!r} has an unknown storage type {kind}") from None
        if shape[-1] % elements:
            raise ValueError(
                f"{reader.path}: tensor {name!r} has shape {list(shape)}, {info.kind.name} asks for rows of whole "
                f"blocks of {elements}"
            )
        return name, info

    @staticmethod
    def _hugging_face_name(path: Path, name: str) -> str:
        match name.split("."):
            case ["blk", layer, part, suffix] if part in _LAYER_NAMES:
                return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{suffix}"
            case [part, suffix] if part in _TOP_NAMES:
                return f"{_TOP_NAMES[part]}.{suffix}"
        raise ValueError(f"{path}: unknown tensor {name!r}: the file does not hold a plain transformer")

    def _hugging_face_config(self, path: Path) -> dict[str, Any]:
        """The metadata as the config.json that `ModelConfig` reads."""
        architecture = self._architecture

        def get(key: str, default: Any = None) -> Any:
            return self._metadata.get(f"{architecture}.{key}", default)

        eps = get("attention.layer_norm_rms_epsilon", 1e-6)
        tokens = self._metadata.get("tokenizer.ggml.tokens")
        config: dict[str, Any] = {
            "model_type": architecture,
            "architectures": [f"{str(architecture).capitalize()}ForCausalLM"],
            "hidden_act": "silu",
            "vocab_size": get("vocab_size", len(tokens) if isinstance(tokens, list) else None),
            "hidden_size": get("embedding_length"),
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": get("attention.head_count"),
            "num_key_value_heads": get("attention.head_count_kv", get("attention.head_count")),
            "max_position_embeddings": get("context_length"),
            "rms_norm_eps": round(eps, 12) if isinstance(eps, float) else eps,  # stored as fp32
            "rope_theta": get("rope.freq_base", 10000.0),
            "tie_word_embeddings": "lm_head.weight" not in self._infos,
            "attention_bias": architecture != "qwen2" and "model.layers.0.self_attn.q_proj.bias" in self._infos,
            "bos_token_id": self._metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._metadata.get("tokenizer.ggml.eos_token_id"),
            "torch_dtype": "float32",
        }
        if get("attention.key_length"):
            config["head_dim"] = get("attention.key_length")
        if architecture == "llama" and get("attention.sliding_window"):
            config |= {"model_type": "mistral", "sliding_window": get("attention.sliding_window")}
        if get("rope.scaling.type", "none") != "none":
            config["rope_scaling"] = {
                "rope_type": get("rope.scaling.type"),
                "factor": get("rope.scaling.factor", 1.0),
                "original_max_position_embeddings": get("rope.scaling.original_context_length"),
            }
        if self._rope_factors is not None:
            config["rope_scaling"] = self._llama3_scaling(path, config["rope_theta"])
        return config

    def _llama3_scaling(self, path: Path, theta: float) -> dict[str, Any]:
        """Llama 3's rope scaling, which GGUF stores as a divisor per frequency; all its models share these numbers."""
        assert self._rope_factors is not None
        if not isinstance(theta, float):
            raise ValueError(f"{path}: expected a number 'rope.freq_base', got {theta!r}")
        stored = self._dequantize("rope_freqs.weight", self._rope_factors).double()
        factor, low, high, context = stored.max().item(), 1.0, 4.0, 8192
        wavelength = 2 * math.pi * theta ** (torch.arange(len(stored), dtype=torch.float64) / len(stored))
        smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
        if not torch.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
            raise ValueError(f"{path}: tensor 'rope_freqs.weight' holds a rope scaling other than Llama 3's")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }

    def names(self) -> list[str]:
        return list(self._infos)

    def blocks(self, name: str, shape: tuple[int, int], outputs: slice, inputs: slice) -> dict[str, Any] | None:
        info = self._infos.get(name)
        if info is None or info.kind not in BLOCK_FORMATS:
            return None
        if info.shape != shape:
            raise ValueError(
                f"{self.path}: tensor {name!r} has shape {list(info.shape)}, the configuration asks for {list(shape)}"
            )
        blocks, inputs = cover(inputs, BLOCK)
        rows = torch.from_numpy(self._rows(info, outputs, blocks).copy())
        return cut_inputs(read_blocks(self._undo_permutation(name, rows), info.kind), inputs, BLOCK)

    def _read(self, name: str) -> torch.Tensor:
        return self._undo_permutation(name, self._dequantize(name, self._infos[name]))

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._infos[name].shape

    def _read_part(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        info = self._infos[name]
        rows, columns = (_ALL, *part)[-2:]
        blocks, columns = cover(columns, GGML_QUANT_SIZES[info.kind][0])
        return self._undo_permutation(name, self._dequantize(name, info, rows, blocks)[..., columns])

    def _undo_permutation(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows of a q or k projection from llama files' order (rotary pairs adjacent) to Hugging Face's (halves)."""
        if self._architecture != "llama":
            return rows
        # Rows of whole heads, all or a part of them. A size that cannot be right is left for `tensor` to report.
        head_dim, is_rotated = self.config.head_dim, any(f".self_attn.{part}." in name for part in ("q_proj", "k_proj"))
        if is_rotated and head_dim % 2 == 0 and len(rows) % head_dim == 0:
            split = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
            return split.swapaxes(1, 2).reshape(rows.shape).contiguous()
        return rows

    def _rows(self, info: _TensorInfo, rows: slice = _ALL, blocks: slice = _ALL) -> np.ndarray:
        """The bytes of a tensor, row by row; of a part of the rows of a matrix, of the blocks that rows consist of."""
        start = self._start + info.offset
        elements, nbytes = GGML_QUANT_SIZES[info.kind]
        raw = self._data[start : start + info.nbytes].reshape(*info.shape[:-1], info.shape[-1] // elements, nbytes)
        raw = (raw[rows] if raw.ndim == 3 else raw)[..., blocks, :]
        return raw.reshape(*raw.shape[:-2], raw.shape[-2] * nbytes)

    def _dequantize(self, name: str, info: _TensorInfo, rows: slice = _ALL, blocks: slice = _ALL) -> torch.Tensor:
        raw = self._rows(info, rows, blocks)
        if info.kind == GGMLQuantizationType.F16:
            return torch.from_numpy(raw.view(np.float16).copy())
        try:
            values = quants.dequantize(raw, info.kind)
        except NotImplementedError:
            raise ValueError(f"{self.path}: tensor {name!r} is stored as {info.kind.name}, not a weight type") from None
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(*raw.shape[:-1], -1))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self._metadata, self.path)
