"""Perplexity of a model on a text through the forward pass of calibration: plain torch operations, no engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from teco_kernels.decoder.loader import load_source
from teco_kernels.decoder.weights import WeightLoader
from teco_kernels.ops.rope import cos_sin_cache
from teco_kernels.quantization.torch_layer import TorchLayer, linear_shapes

_SEQUENCES_AT_ONCE, _ROWS_AT_ONCE = 8, 512


@torch.inference_mode()
def perplexity(path: str | Path, text: str | Sequence[int], *, window: int = 1024) -> float:
    """Perplexity of a text, cut into windows that do not overlap; what is left at its end is dropped.

    Arithmetic is fp32 on dequantised weights: the quality of the weights alone, without that of the kernels.

    Parameters
    ----------
    path : str or Path
        A Hugging Face directory, quantised or not, or a GGUF file.
    text : str or sequence of int
        Text, or its tokens.
    window : int
        Tokens in a window. The first of each is context only.

    Raises
    ------
    ValueError
        When the text is shorter than a window.
    """
    source = load_source(path)
    config = source.config
    token_ids = source.tokenizer.encode(text) if isinstance(text, str) else list(text)
    if window < 2 or len(token_ids) < window:
        raise ValueError(f"text: expected at least a window of {window} tokens (2 or more), got {len(token_ids)}")
    ids = torch.tensor(token_ids[: len(token_ids) // window * window]).view(-1, window)
    loader, shapes = WeightLoader(source, torch.float32, "exact"), linear_shapes(config)

    def read_tensor(name: str) -> Tensor:
        return source.tensor(name).float()

    def read_linear(name: str) -> tuple[Tensor, Tensor | None]:
        stored = f"{name}.weight" if source.has(f"{name}.weight") else f"{name}.qweight"
        scales = f"{name}.scales"
        if stored.endswith(".weight"):
            weight = read_tensor(stored)
        else:
            out_features = source.tensor(scales).shape[1]
            # Head and embedding are no layer's.
            _, in_features = shapes.get(name.split(".", 3)[-1], (None, config.hidden_size))
            (packed,) = loader.linear([name], in_features, [out_features], bias=False).weights
            weight = packed.dequantize().t().contiguous()
        return weight, read_tensor(f"{name}.bias") if source.has(f"{name}.bias") else None

    embedding, _ = read_linear("model.embed_tokens")
    batches = [F.embedding(part, embedding) for part in ids.split(_SEQUENCES_AT_ONCE)]
    cos_sin = cos_sin_cache(config.head_dim, window, config.rope_theta, config.rope_scaling)
    for index in range(config.num_layers):
        layer = TorchLayer(config, index, read_linear, read_tensor, cos_sin)
        batches = [layer(batch) for batch in batches]
    norm = read_tensor("model.norm.weight")
    tied = config.tie_word_embeddings and not source.has("lm_head.qweight")
    head = embedding if tied else read_linear("lm_head")[0]
    total, count = 0.0, 0
    for batch, part in zip(batches, ids.split(_SEQUENCES_AT_ONCE), strict=True):
        hidden = F.rms_norm(batch[:, :-1], norm.shape, norm, config.rms_norm_eps).flatten(0, 1)
        targets = part[:, 1:].flatten()
        for rows, expected in zip(hidden.split(_ROWS_AT_ONCE), targets.split(_ROWS_AT_ONCE), strict=True):
            total += F.cross_entropy(rows @ head.t(), expected, reduction="sum").item()
            count += len(expected)
    return math.exp(total / count)
