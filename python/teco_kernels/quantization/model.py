"""Quantises a whole model: layer after layer, each calibrated on what the quantised layers before it give."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from teco_kernels.decoder.loader import Source, load_source
from teco_kernels.ops.rope import cos_sin_cache
from teco_kernels.quantization.calibration import Hessian, token_windows
from teco_kernels.quantization.gptq import GPTQTensors, HessianFactor, gptq_quantize
from teco_kernels.quantization.save import save_model
from teco_kernels.quantization.torch_layer import STAGES, Activations, TorchLayer

_SEQUENCES_AT_ONCE = 8


@dataclass(frozen=True)
class QuantizationSettings:
    """How `quantize_model` quantises; the fields of `gptq_quantize`, the head's own, and the size of the calibration.

    Attributes
    ----------
    layer_bits : mapping of str to int
        Other bits for the layers whose names a regular expression matches from their beginning on (`re.match`); the
        first that matches counts. Saved as `dynamic` rules.
    head_bits : int or None
        Bits of the language-model head; None leaves it as it is.
    head_group_size : int
    num_sequences, sequence_length : int
        Windows of the calibration text, and their tokens.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_order: bool = False
    dampening: float = 0.01
    clip_search: bool = False
    refine_sweeps: int = 0
    layer_bits: Mapping[str, int] = field(default_factory=dict)
    head_bits: int | None = 8
    head_group_size: int = 64
    num_sequences: int = 64
    sequence_length: int = 512


@dataclass(frozen=True)
class LayerReport:
    """Errors of one linear layer, as in `GPTQTensors`."""

    name: str
    error: float
    rounding_error: float
    dampening: float


def quantize_model(
    source_path: str | Path,
    out_path: str | Path,
    settings: QuantizationSettings | None = None,
    *,
    calibration: str | Sequence[int] | None = None,
    use_tqdm: bool = True,
) -> list[LayerReport]:
    """Quantise a model with GPTQ and save it as a directory that this package and others load.

    Holds one layer's weights and activations at a time, beside the quantised tensors and the residual stream.

    Parameters
    ----------
    source_path : str or Path
        An unquantised Hugging Face directory, or a GGUF file (dequantised first).
    out_path : str or Path
        Directory to make. It appears when it is complete; whatever interrupts the run, nothing of that name is left.
    settings : QuantizationSettings, optional
    calibration : str or sequence of int, optional
        Text like that which the model will see, or its tokens. None: Wikipedia articles (`assets.calibration_text`).
    use_tqdm : bool
        Show progress and time left.

    Returns
    -------
    list of LayerReport
        In the order of the model.

    Raises
    ------
    ValueError
        When `out_path` exists, the source is quantised already, damaged or unknown, the text is too short, or the
        settings do not fit the model's sizes.
    """
    out_path = Path(out_path)
    if out_path.exists():
        raise ValueError(f"{out_path}: exists already")
    settings = settings or QuantizationSettings()
    source = load_source(source_path)
    if source.quantization_config is not None:
        raise ValueError(f"{source.path}: expected an unquantised model, this one is quantised already")
    windows = _calibration_windows(source, settings, calibration)
    reports: list[LayerReport] = []
    tensors: dict[str, Tensor] = {}
    with torch.inference_mode():
        for name, quantised in tqdm(
            _quantised_layers(source, windows, settings),
            desc="quantising",
            total=source.config.num_layers * sum(map(len, STAGES)) + (settings.head_bits is not None),
            unit="matrix",
            disable=not use_tqdm,
        ):
            tensors |= {f"{name}.{key}": tensor for key, tensor in quantised.tensors().items()}
            reports.append(LayerReport(name, quantised.error, quantised.rounding_error, quantised.dampening))
        save_model(out_path, source, tensors, asdict(settings))
    return reports


def _calibration_windows(
    source: Source, settings: QuantizationSettings, calibration: str | Sequence[int] | None
) -> Tensor:
    if calibration is None:
        from teco_kernels.assets import calibration_text

        calibration = calibration_text()
    if isinstance(calibration, str):
        calibration = source.tokenizer.encode(calibration)
    length = min(settings.sequence_length, source.config.max_position)
    return token_windows(list(calibration), settings.num_sequences, length)


def _quantised_layers(
    source: Source, windows: Tensor, settings: QuantizationSettings
) -> Iterator[tuple[str, GPTQTensors]]:
    """Names and tensors of all linear layers, in the order of the model."""
    config = source.config
    cos_sin = cos_sin_cache(config.head_dim, windows.shape[1], config.rope_theta, config.rope_scaling)

    def read_tensor(name: str) -> Tensor:
        return source.tensor(name).float()

    def read_linear(name: str) -> tuple[Tensor, Tensor | None]:
        bias = f"{name}.bias"
        return read_tensor(f"{name}.weight"), read_tensor(bias) if source.has(bias) else None

    embedding = source.tensor("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    batches = [Activations(F.embedding(ids, embedding).float()) for ids in windows.split(_SEQUENCES_AT_ONCE)]
    del embedding
    for index in range(config.num_layers):
        layer = TorchLayer(config, index, read_linear, read_tensor, cos_sin)
        for stage, names in enumerate(STAGES):
            hessian = Hessian(layer.weights[names[0]].shape[1])
            for batch in batches:
                hessian.add(layer.stage_input(stage, batch))
            factor = HessianFactor.from_hessian(
                hessian.matrix(), act_order=settings.act_order, dampening=settings.dampening
            )
            for name in names:
                quantised = _quantise(layer.prefix + name, layer.weights[name], factor, settings)
                layer.weights[name] = quantised.dequantize()
                yield layer.prefix + name, quantised
            for place, batch in enumerate(batches):
                batches[place] = layer.advance(stage, batch)
    if settings.head_bits is not None:
        yield "lm_head", _quantise_head(source, batches, settings, settings.head_bits)


def _quantise_head(
    source: Source, batches: list[Activations], settings: QuantizationSettings, bits: int
) -> GPTQTensors:
    config = source.config
    norm = source.tensor("model.norm.weight", (config.hidden_size,)).float()
    hessian = Hessian(config.hidden_size)
    for batch in batches:
        hessian.add(F.rms_norm(batch.hidden, (config.hidden_size,), norm, config.rms_norm_eps))
    head = "lm_head" if source.has("lm_head.weight") else "model.embed_tokens"
    weight = source.tensor(f"{head}.weight", (config.vocab_size, config.hidden_size))
    head_settings = QuantizationSettings(bits=bits, group_size=settings.head_group_size, dampening=settings.dampening)
    return _quantise("lm_head", weight, HessianFactor.from_hessian(hessian.matrix()), head_settings)


def _quantise(name: str, weight: Tensor, factor: HessianFactor, settings: QuantizationSettings) -> GPTQTensors:
    bits = next((bits for rule, bits in settings.layer_bits.items() if re.match(rule, name)), settings.bits)
    try:
        return gptq_quantize(
            weight,
            factor,
            bits=bits,
            group_size=settings.group_size,
            symmetric=settings.symmetric,
            clip_search=settings.clip_search,
            refine_sweeps=settings.refine_sweeps,
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
