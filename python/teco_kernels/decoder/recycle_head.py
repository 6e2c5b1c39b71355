"""A recycle head on disk: a folder with config.json and model.safetensors, in the tensor names of MTP modules.

Names inside are those of DeepSeek-V3's multi-token prediction (``enorm``, ``hnorm``, ``eh_proj``), under one prefix and
with layers and a last norm of their own as Qwen3-Next has them: ``mtp.enorm.weight``, ``mtp.hnorm.weight``,
``mtp.eh_proj.weight`` (its input is the embedding, then the hidden state), ``mtp.layers.0.self_attn.q_proj.weight`` and
so on as in a Llama layer, ``mtp.norm.weight``; ``mtp.out_proj.weight`` where the layers are not as wide as the base
model. ``draft_vocabulary`` int64 ``[draft_vocab_size]`` has the token ids that the head can say, ascending; without it
it says all. Embedding and LM head are the base model's. Matrices may be quantised, as in a GPTQ checkpoint, with a
``quantization_config`` in config.json.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teco_kernels.decoder.config import ModelConfig
from teco_kernels.decoder.json_file import read_json
from teco_kernels.decoder.loader import Tensors, open_safetensors

MODEL_TYPE = "teco_recycle"
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
_SHIPPED = Path(__file__).parent.parent / "recycle_heads"


@dataclass(frozen=True)
class RecycleHeadConfig:
    """Shape of a recycle head.

    Attributes
    ----------
    base_hidden_size, base_vocab_size : int
        Of the model that it belongs to.
    hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim
        Of its own layers, as in `ModelConfig`.
    draft_vocab_size : int or None
        Tokens that it can say; None for all.
    rope_theta : float
        Plain rotary embeddings.
    """

    base_hidden_size: int
    base_vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    draft_vocab_size: int | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors in the file, by name."""
        base, hidden, inner = self.base_hidden_size, self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "mtp.enorm.weight": (base,),
            "mtp.hnorm.weight": (base,),
            "mtp.eh_proj.weight": (hidden, 2 * base),
            "mtp.norm.weight": (base,),
        }
        for index in range(self.num_layers):
            shapes |= {
                f"mtp.layers.{index}.{name}.weight": shape
                for name, shape in {
                    "input_layernorm": (hidden,),
                    "self_attn.q_proj": (queries, hidden),
                    "self_attn.k_proj": (keys, hidden),
                    "self_attn.v_proj": (keys, hidden),
                    "self_attn.o_proj": (hidden, queries),
                    "post_attention_layernorm": (hidden,),
                    "mlp.gate_proj": (inner, hidden),
                    "mlp.up_proj": (inner, hidden),
                    "mlp.down_proj": (hidden, inner),
                }.items()
            }
        if hidden != base:
            shapes["mtp.out_proj.weight"] = (base, hidden)
        if self.draft_vocab_size is not None:
            shapes["draft_vocabulary"] = (self.draft_vocab_size,)
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        return {"model_type": MODEL_TYPE, **asdict(self)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], origin: str) -> RecycleHeadConfig:
        """Read what `to_dict` gives; ValueError naming `origin` and the key for anything else."""
        if raw.get("model_type") != MODEL_TYPE:
            raise ValueError(f"{origin}: expected 'model_type' {MODEL_TYPE!r}, got {raw.get('model_type')!r}")
        values: dict[str, Any] = {}
        for key, kind in cls.__annotations__.items():
            value = raw.get(key)
            wanted: Any = (int, float) if kind == "float" else int
            none_too = "None" in kind
            if (
                isinstance(value, bool)
                or not (isinstance(value, wanted) or (value is None and none_too))
                or not (value is None or 0 < value < 2**31)
            ):
                raise ValueError(f"{origin}: expected a positive number {key!r}, got {value!r}")
            values[key] = value
        config = cls(**values)
        if config.num_heads % config.num_kv_heads:
            raise ValueError(
                f"{origin}: expected 'num_heads' to be a multiple of 'num_kv_heads', "
                f"got {config.num_heads} and {config.num_kv_heads}"
            )
        return config


class RecycleHeadTensors(Tensors):
    """The tensors of a head on disk, plain or quantised as in a GPTQ checkpoint.

    Parameters
    ----------
    path : str or Path
        The folder.
    base : ModelConfig
        Of the model that it is to serve.

    Attributes
    ----------
    config : RecycleHeadConfig
    draft_vocabulary : Tensor or None
        int64 ``[draft_vocab_size]``, ascending: the tokens that it can say; None for all.

    Raises
    ------
    ValueError
        Naming the file: when something is missing, damaged or unknown, and when the head was made for a model of
        another hidden size or vocabulary.
    """

    def __init__(self, path: str | Path, base: ModelConfig) -> None:
        path = Path(path)
        origin = str(path / CONFIG_NAME)
        raw = read_json(path / CONFIG_NAME)
        self.config = RecycleHeadConfig.from_dict(raw, origin)
        super().__init__(path, raw, origin)
        for what, made_for, got in (
            ("hidden size", self.config.base_hidden_size, base.hidden_size),
            ("vocabulary", self.config.base_vocab_size, base.vocab_size),
        ):
            if made_for != got:
                raise ValueError(f"{path}: this recycle head is for models of {what} {made_for}, the model has {got}")
        self._handle = open_safetensors(path / WEIGHTS_NAME)
        shapes = self.config.shapes()
        found = {_plain_name(name) for name in self.names()}
        for name in sorted(found ^ shapes.keys()):
            state = "missing" if name in shapes else "unknown"
            raise ValueError(f"{path / WEIGHTS_NAME}: tensor {name!r} is {state}")
        self.draft_vocabulary = self._draft_vocabulary()

    def names(self) -> list[str]:
        return list(self._handle.keys())

    def file_of(self, name: str) -> Path:
        return self.path / WEIGHTS_NAME

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._handle.get_tensor(name)
        return tensor

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle.get_slice(name).get_shape())

    def _draft_vocabulary(self) -> Tensor | None:
        size, name = self.config.draft_vocab_size, "draft_vocabulary"
        if size is None:
            return None
        ids = self.tensor(name, (size,))
        if ids.dtype != torch.int64 or ids[0] < 0 or ids[-1] >= self.config.base_vocab_size or (ids.diff() <= 0).any():
            raise ValueError(
                f"{self.file_of(name)}: tensor {name!r}: expected int64 token ids, ascending, "
                f"below {self.config.base_vocab_size}"
            )
        return ids


def norm_fingerprint(norm: Tensor) -> str:
    """Of a model's final norm: what tells a model from others of its sizes, and is the same however it is quantised."""
    return hashlib.sha256(norm.half().numpy().tobytes()).hexdigest()[:16]


def shipped_recycle_head(norm: Tensor, base: ModelConfig) -> Path | None:
    """The folder of the head that this package has for the model of these sizes with this final norm, if any."""
    wanted = {
        "base_norm": norm_fingerprint(norm),
        "base_hidden_size": base.hidden_size,
        "base_vocab_size": base.vocab_size,  # which a fine-tuned model may have changed
    }
    for config in sorted(_SHIPPED.glob(f"*/{CONFIG_NAME}")):
        if wanted.items() <= read_json(config).items():
            return config.parent
    return None


def _plain_name(name: str) -> str:
    """The name of the unquantised tensor that a tensor is a part of."""
    stem, _, part = name.rpartition(".")
    return f"{stem}.weight" if part in ("qweight", "qzeros", "scales", "g_idx") else name
