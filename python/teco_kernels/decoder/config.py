"""What a model is, as numbers: one description for every supported family."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from teco_kernels.ops.rope import inverse_frequencies

# What a family's modelling code fixes and its config.json therefore leaves out.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_LAYER_TYPES = ("full_attention", "sliding_attention")
# Far above any real model. What is above was not meant, and would be memory asked for before a tensor could contradict.
_MAX_SIZE, _MAX_HEAD_DIM, _MAX_LAYERS = 2**31 - 1, 65_536, 10_000


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the Llama shape: RMS norm, rotary attention, gated MLP.

    Attributes
    ----------
    sliding_windows : tuple of int or None
        One per layer: a query sees keys at a distance below it; None sees all.
    rope_scaling : dict or None
        As in config.json, with ``rope_type`` linear, llama3 or yarn; None for plain rotary embeddings.
    qkv_bias, output_bias, mlp_bias : bool
        Whether the q/k/v, the attention output and the MLP projections carry a bias.
    qk_norm : bool
        Whether every head of q and k goes through an RMS norm before the rotary embedding.
    dtype : str
        What the checkpoint was saved in, e.g. ``"bfloat16"``.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tie_word_embeddings: bool
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: str = "float32"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], origin: str) -> ModelConfig:
        """Read the contents of a Hugging Face ``config.json``; `origin` names the file in errors.

        Raises
        ------
        ValueError
            For an unknown architecture, a missing or impossible number, or an unknown rope scaling.
        """
        family = raw.get("model_type")
        if not isinstance(family, str) or family not in _FAMILIES:
            raise ValueError(f"{origin}: unknown architecture {family!r}; supported are {', '.join(_FAMILIES)}")

        def number(key: str, default: Any = None, *, most: int = _MAX_SIZE) -> int:
            value = raw.get(key)
            value = default if value is None else value
            if type(value) is not int or value <= 0:
                raise ValueError(f"{origin}: expected a positive integer {key!r}, got {value!r}")
            if value > most:
                raise ValueError(f"{origin}: expected {key!r} to be at most {most}, got {value}")
            return value

        hidden_size, num_heads = number("hidden_size"), number("num_attention_heads")
        num_layers = number("num_hidden_layers", most=_MAX_LAYERS)
        head_dim = number("head_dim", hidden_size // num_heads, most=_MAX_HEAD_DIM)
        num_kv_heads = number("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"{origin}: expected 'num_attention_heads' to be a multiple of 'num_key_value_heads', "
                f"got {num_heads} and {num_kv_heads}"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"{origin}: expected 'hidden_act' silu, got {raw['hidden_act']!r}")
        eps = raw.get("rms_norm_eps", 1e-6)
        if type(eps) not in (int, float) or not 0 <= eps <= 1:
            raise ValueError(f"{origin}: expected a number 'rms_norm_eps' from 0 to 1, got {eps!r}")
        max_position = number("max_position_embeddings")
        theta, scaling = _rope(raw, head_dim, max_position, origin)
        bias = bool(raw.get("attention_bias", False)) and family in ("llama", "qwen3")
        options = {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bool(raw.get("mlp_bias", False))}
        return cls(
            family=family,
            vocab_size=number("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=number("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position=max_position,
            rms_norm_eps=float(eps),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            sliding_windows=_sliding_windows(raw, family, num_layers, origin),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
            **{**options, **_FAMILIES[family]},
        )


def _rope(raw: Mapping[str, Any], head_dim: int, max_position: int, origin: str) -> tuple[float, dict[str, Any] | None]:
    """Theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{origin}: expected an object 'rope_scaling', got {given!r}")
    rope = dict(given)
    theta = rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    if type(theta) not in (int, float) or not 0 < theta <= sys.float_info.max:
        raise ValueError(f"{origin}: expected a positive number 'rope_theta', got {theta!r}")
    if kind not in _ROPE_TYPES:
        raise ValueError(f"{origin}: unknown rope scaling {kind!r}; supported are {', '.join(_ROPE_TYPES)}")
    if (share := rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1) != 1:
        raise ValueError(f"{origin}: expected 'partial_rotary_factor' 1, got {share!r}")
    if kind in ("llama3", "yarn") and not rope.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = raw.get("original_max_position_embeddings") or max_position
    if kind == "yarn" and not rope.get("factor"):
        rope["factor"] = max_position / rope["original_max_position_embeddings"]
    scaling = None if kind == "default" else {"rope_type": kind, **rope}
    theta = float(theta)
    try:
        frequencies, _ = inverse_frequencies(head_dim, theta, scaling)
    except (ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{origin}: rotary embedding: {error}") from None
    if not frequencies.isfinite().all():
        raise ValueError(f"{origin}: rotary embedding: no finite frequencies come of theta {theta} and {scaling}")
    return theta, scaling


def _sliding_windows(raw: Mapping[str, Any], family: str, num_layers: int, origin: str) -> tuple[int | None, ...]:
    # Where a key is left out the family's own default holds, as in transformers.
    window = raw.get("sliding_window", 4096 if family == "mistral" else None)
    # Qwen configurations carry a window that is off unless another key turns it on; Llama has none.
    if family == "llama" or not window or (family != "mistral" and not raw.get("use_sliding_window", False)):
        return (None,) * num_layers
    kinds = None if family == "mistral" else raw.get("layer_types")
    if kinds is None:
        first = 0 if family == "mistral" else raw.get("max_window_layers", 28)
        if type(first) is not int:
            raise ValueError(f"{origin}: expected an integer 'max_window_layers', got {first!r}")
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    if not isinstance(kinds, list) or not all(kind in _LAYER_TYPES for kind in kinds):
        raise ValueError(f"{origin}: expected a list 'layer_types' of {' and '.join(_LAYER_TYPES)}, got {kinds!r:.100}")
    if len(kinds) != num_layers:
        raise ValueError(f"{origin}: expected {num_layers} 'layer_types', one per layer; got {len(kinds)}")
    if type(window) is not int or not 1 <= window <= _MAX_SIZE:
        raise ValueError(f"{origin}: expected a positive integer 'sliding_window' below 2**31, got {window!r}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
