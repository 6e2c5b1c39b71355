"""What quantising and pruning a model share: source, calibration, and a walk on which stages see what others became."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from teco_kernels.decoder.loader import Source, load_source
from teco_kernels.decoder.weights import WeightLoader
from teco_kernels.ops.rope import cos_sin_cache
from teco_kernels.quantization.calibration import Hessian, token_windows
from teco_kernels.quantization.gptq import HessianFactor
from teco_kernels.quantization.torch_layer import STAGES, Activations, TorchLayer, linear_shapes

_SEQUENCES_AT_ONCE = 8


def open_source(source_path: str | Path, out_path: Path) -> Source:
    """The unquantised model at `source_path`; a ValueError when it is quantised, or `out_path` exists."""
    if out_path.exists():
        raise ValueError(f"{out_path}: exists already")
    source = load_source(source_path)
    if source.quantization_config is not None:
        raise ValueError(f"{source.path}: expected an unquantised model, this one is quantised already")
    return source


def calibration_windows(
    source: Source, num_sequences: int, sequence_length: int, calibration: str | Sequence[int] | None
) -> Tensor:
    """Windows of the text that a model is calibrated on, as `quantize_model` takes it, in the model's tokens."""
    if calibration is None:
        from teco_kernels.assets import calibration_text

        calibration = calibration_text()
    if isinstance(calibration, str):
        calibration = source.tokenizer.encode(calibration)
    return token_windows(list(calibration), num_sequences, min(sequence_length, source.config.max_position))


def factorise(names: Sequence[str], hessian: Tensor, **options: Any) -> HessianFactor:
    """`HessianFactor.from_hessian`, whose errors name the layers that the Hessian is of."""
    try:
        return HessianFactor.from_hessian(hessian, **options)
    except ValueError as error:
        raise ValueError(f"{', '.join(names)}: {error}") from None


@dataclass(frozen=True)
class Stage:
    """Linear layers with one input.

    Attributes
    ----------
    names : tuple of str
        Full names, without ``.weight``.
    hessian : Tensor
        float64 ``[in_features, in_features]`` of the calibration text.
    """

    names: tuple[str, ...]
    hessian: Tensor
    _layer: TorchLayer = field(repr=False)

    def weight(self, name: str) -> Tensor:
        """fp32 ``[out_features, in_features]``."""
        return self._layer.weights[name.removeprefix(self._layer.prefix)]

    def replace(self, name: str, weight: Tensor) -> None:
        """Let all stages to come see this weight instead."""
        self._layer.weights[name.removeprefix(self._layer.prefix)] = weight


def embed(source: Source, windows: Tensor, embedding: Tensor | None = None) -> list[Activations]:
    """The residual stream at the first layer, some windows at a time; `embedding` stands in for the source's."""
    config = source.config
    if embedding is None:
        embedding = source.tensor("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    return [Activations(F.embedding(ids, embedding).float()) for ids in windows.split(_SEQUENCES_AT_ONCE)]


def torch_layers(source: Source, length: int) -> Iterator[TorchLayer]:
    """The layers of an unquantised model, each read when its turn comes, for sequences of `length` tokens."""
    config, loader = source.config, WeightLoader(source, torch.float32, "exact")
    shapes = linear_shapes(config)
    cos_sin = cos_sin_cache(config.head_dim, length, config.rope_theta, config.rope_scaling)

    def read_tensor(name: str) -> Tensor:
        return loader.vector(name, config.head_dim if "_norm." in name and "self_attn" in name else config.hidden_size)

    def read_linear(name: str) -> tuple[Tensor, Tensor | None]:
        shape, bias = shapes[name.split(".", 3)[3]], f"{name}.bias"
        weight = loader.matrix(f"{name}.weight", shape).float()
        return weight, loader.vector(bias, shape[0]) if source.has(bias) else None

    for index in range(config.num_layers):
        yield TorchLayer(config, index, read_linear, read_tensor, cos_sin)


def stages(layers: Iterable[TorchLayer], batches: list[Activations]) -> Iterator[Stage]:
    """The stages of all layers in the order of computation, each to be dealt with before the next is asked for.

    Parameters
    ----------
    layers : iterable of TorchLayer
        As `torch_layers` gives them.
    batches : list of Activations
        As `embed` gives them; overwritten with what the last layer computed gives.
    """
    for layer in layers:
        for stage, names in enumerate(STAGES):
            hessian = Hessian(layer.weights[names[0]].shape[1])
            for batch in batches:
                hessian.add(layer.stage_input(stage, batch))
            yield Stage(tuple(layer.prefix + name for name in names), hessian.matrix(), layer)
            for place, batch in enumerate(batches):
                batches[place] = layer.advance(stage, batch)
