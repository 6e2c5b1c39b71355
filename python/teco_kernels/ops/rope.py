"""The cosine and sine tables of rotary embeddings, and how models stretch them beyond their training context."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def cos_sin_cache(rotary_dim: int, max_position: int, theta: float, scaling: Mapping[str, Any] | None = None) -> Tensor:
    """Tabulate the rotations of every position, as `rotary_embedding` reads them.

    Parameters
    ----------
    rotary_dim : int
        Rotated elements of a head; even.
    max_position : int
        Number of positions.
    theta : float
        Base of the wavelengths: pair ``i`` turns by ``theta ** (-2 * i / rotary_dim)`` radians per position.
    scaling : mapping, optional
        The model's ``rope_scaling`` (``rope_parameters`` in newer configurations); see `inverse_frequencies`.

    Returns
    -------
    Tensor
        fp32 ``[max_position, rotary_dim]``: cosines, then sines. Computed in float64, rounded once.

    Raises
    ------
    ValueError
        For an odd `rotary_dim`, an unknown kind of scaling, or a scaling that lacks one of its keys.
    """
    if max_position < 0:
        raise ValueError(f"max_position: expected a number of positions >= 0, got {max_position}")
    frequencies, attention_factor = inverse_frequencies(rotary_dim, theta, scaling)
    angles = torch.outer(torch.arange(max_position, dtype=torch.float64), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(attention_factor).float()


def inverse_frequencies(
    rotary_dim: int, theta: float, scaling: Mapping[str, Any] | None = None
) -> tuple[Tensor, float]:
    """Radians per position of each pair, and the factor on cosines and sines.

    Parameters
    ----------
    rotary_dim, theta
        As in `cos_sin_cache`.
    scaling : mapping, optional
        ``rope_type`` (or ``type``) is one of "default"; "linear" with ``factor``; "llama3" with ``factor``,
        ``low_freq_factor``, ``high_freq_factor`` and ``original_max_position_embeddings``; "yarn" with ``factor`` and
        ``original_max_position_embeddings`` and, optionally, ``beta_fast``, ``beta_slow``, ``truncate``,
        ``attention_factor``, ``mscale`` and ``mscale_all_dim``. Other keys are not read.

    Returns
    -------
    frequencies : Tensor
        float64 ``[rotary_dim / 2]``.
    attention_factor : float
        1 but for yarn.

    References
    ----------
    Chen et al., "Extending Context Window of Large Language Models via Position Interpolation", arXiv 2306.15595
    (linear). Grattafiori et al., "The Llama 3 Herd of Models", arXiv 2407.21783 (llama3). Peng et al., "YaRN:
    Efficient Context Window Extension of Large Language Models", arXiv 2309.00071 (yarn).
    """
    if rotary_dim < 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim: expected an even number >= 0, got {rotary_dim}")
    if not theta > 0:
        raise ValueError(f"theta: expected a positive number, got {theta}")
    frequencies = theta ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / _number(scaling, "factor"), 1.0
    if kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if kind == "yarn":
        return _yarn(frequencies, theta, scaling), _yarn_attention_factor(scaling)
    raise ValueError(f"scaling: expected rope_type default, linear, llama3 or yarn, got {kind!r}")


def _number(scaling: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = scaling.get(key)
    if value is None:
        value = default
    if not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"scaling: expected a positive number under {key!r}, got {value!r} in {dict(scaling)}")
    return float(value)


def _llama3(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended by turns per context."""
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    turns = frequencies * _number(scaling, "original_max_position_embeddings") / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / _number(scaling, "factor"))


def _yarn(frequencies: Tensor, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    """As llama3, but blended linearly over the index of the pair, between two numbers of turns per context."""
    rotary_dim = 2 * len(frequencies)
    context = _number(scaling, "original_max_position_embeddings")

    def pair_that_turns(times: float) -> float:
        return rotary_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = pair_that_turns(_number(scaling, "beta_fast", 32))
    last = pair_that_turns(_number(scaling, "beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    width = last - first if last != first else 1e-3
    stretched = ((torch.arange(len(frequencies), dtype=torch.float64) - first) / width).clamp(0, 1)
    return frequencies * (1 - stretched + stretched / _number(scaling, "factor"))


def _yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    """Longer contexts flatten the softmax; yarn sharpens it by scaling queries and keys alike."""
    if scaling.get("attention_factor") is not None:
        return _number(scaling, "attention_factor")
    log_factor = math.log(max(_number(scaling, "factor"), 1.0))
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return (1 + 0.1 * _number(scaling, "mscale") * log_factor) / (
            1 + 0.1 * _number(scaling, "mscale_all_dim") * log_factor
        )
    return 1 + 0.1 * log_factor
