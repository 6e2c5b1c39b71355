"""A recycle head on disk: a folder with config.json and model.safetensors, in the tensor names of MTP modules.

Names inside are those of DeepSeek-V3's multi-token prediction (``enorm``, ``hnorm``, ``eh_proj``), under one prefix and
with layers and a last norm of their own as Qwen3-Next has them: ``mtp.enorm.weight``, ``mtp.hnorm.weight``,
``mtp.eh_proj.weight`` (its input is the embedding, then the hidden state), ``mtp.layers.0.self_attn.q_proj.weight`` and
so on as in a Llama layer, ``mtp.norm.weight``; ``mtp.out_proj.weight`` where the layers are not as wide as the base
model. ``draft_vocabulary`` int64 ``[draft_vocab_size]`` has the token ids that the head can say, ascending; without it
it says all. Embedding and LM head are the base model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from teco_kernels.decoder.config import ModelConfig
from teco_kernels.decoder.json_file import read_json

MODEL_TYPE = "teco_recycle"
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"


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


def read_recycle_head(path: str | Path, base: ModelConfig) -> tuple[RecycleHeadConfig, dict[str, Tensor]]:
    """Read a head for a base model.

    Parameters
    ----------
    path : str or Path
        The folder.
    base : ModelConfig
        Of the model that it is to serve.

    Returns
    -------
    RecycleHeadConfig
    dict of str to Tensor
        As in the file, shapes checked.

    Raises
    ------
    ValueError
        Naming the file: when something is missing, damaged or of another shape, and when the head was made for a model
        of another hidden size or vocabulary.
    """
    path = Path(path)
    config = RecycleHeadConfig.from_dict(read_json(path / CONFIG_NAME), str(path / CONFIG_NAME))
    for what, made_for, got in (
        ("hidden size", config.base_hidden_size, base.hidden_size),
        ("vocabulary", config.base_vocab_size, base.vocab_size),
    ):
        if made_for != got:
            raise ValueError(f"{path}: this recycle head is for models of {what} {made_for}, the model has {got}")
    file_path = path / WEIGHTS_NAME
    try:
        with safe_open(file_path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{file_path}: file is missing") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file_path}: truncated or damaged safetensors file: {error}") from None
    shapes = config.shapes()
    for name in sorted(tensors.keys() ^ shapes.keys()):
        raise ValueError(f"{file_path}: tensor {name!r} is {'missing' if name in shapes else 'unknown'}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{file_path}: tensor {name!r} has shape {list(tensors[name].shape)}, "
                f"the configuration asks for {list(shape)}"
            )
    if (ids := tensors.get("draft_vocabulary")) is not None and not _is_ascending(ids, base.vocab_size):
        raise ValueError(
            f"{file_path}: tensor 'draft_vocabulary': expected int64 token ids, ascending, below {base.vocab_size}"
        )
    return config, tensors


def _is_ascending(ids: Tensor, end: int) -> bool:
    return bool(ids.dtype == torch.int64 and ids[0] >= 0 and ids[-1] < end and (ids.diff() > 0).all())
