"""Quantises a whole model: layer after layer, each calibrated on what the quantised layers before it give."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from teco_kernels.decoder.loader import Source
from teco_kernels.quantization.calibration import Drift, Hessian
from teco_kernels.quantization.gptq import GPTQTensors, HessianFactor, gptq_quantize, round_to_nearest
from teco_kernels.quantization.report import REPORT_NAME, LayerReport, to_json
from teco_kernels.quantization.save import save_model
from teco_kernels.quantization.settings import QuantizationSettings
from teco_kernels.quantization.stages import (
    calibration_windows,
    embed,
    factorise,
    open_source,
    stages,
    torch_layers,
)
from teco_kernels.quantization.torch_layer import STAGES, Activations, TorchLayer
from teco_kernels.quantization.unfinished import FinishedParts, Part, fingerprint, unfinished

_EMBEDDING = "model.embed_tokens"


def quantize_model(
    source_path: str | Path,
    out_path: str | Path,
    settings: QuantizationSettings | None = None,
    *,
    calibration: str | Sequence[int] | None = None,
    use_tqdm: bool = True,
) -> list[LayerReport]:
    """Quantise a model with GPTQ and save it as a directory that this package and others load.

    Holds one layer's weights and activations at a time, beside the residual stream and the quantised matrices. Finished
    layers are kept in a hidden folder beside `out_path`; after an interruption the same call goes on with the layer
    that it was at, and with the same number of threads gives the bits that it would have given in one go. Another
    model, text or setting begins anew.

    Parameters
    ----------
    source_path : str or Path
        An unquantised Hugging Face directory, or a GGUF file (dequantised first).
    out_path : str or Path
        Directory to make. It appears when it is complete, with a report (`REPORT_NAME`) among its files.
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
        When `out_path` exists or another process is making it, the source is quantised already, damaged or unknown, the
        text is too short, or the settings do not fit the model's sizes.
    """
    out_path = Path(out_path)
    settings = settings or QuantizationSettings()
    source = open_source(source_path, out_path)
    settings.check(source.config)
    windows = calibration_windows(source, settings.num_sequences, settings.sequence_length, calibration)
    reports: list[LayerReport] = []
    tensors: dict[str, Tensor] = {}
    with (
        torch.inference_mode(),
        unfinished(out_path, fingerprint(source, windows, asdict(settings))) as finished,
        _progress(source, settings, use_tqdm) as bar,
    ):
        for part in _parts(source, windows, settings, finished, bar):
            reports += part.reports
            tensors |= part.tensors
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        texts = {REPORT_NAME: to_json(reports, asdict(settings), peak)}
        save_model(out_path, source, tensors, asdict(settings), texts=texts)
    return reports


def _progress(source: Source, settings: QuantizationSettings, use_tqdm: bool) -> tqdm:
    total = source.config.num_layers * sum(map(len, STAGES)) + _quantises_head(source, settings)
    total += settings.embedding_bits is not None
    # Layers cost the same, the matrices of one do not: the time left is told from the mean.
    return tqdm(desc="quantising", total=total, unit="matrix", smoothing=0, disable=not use_tqdm)


def _parts(
    source: Source, windows: Tensor, settings: QuantizationSettings, finished: FinishedParts, bar: tqdm
) -> Iterator[Part]:
    """What is to be quantised, in the order of the model from embedding to head: made now, or found finished."""
    batches = embed(source, windows)
    originals = list(batches) if settings.asymmetric else []  # what the unquantised model makes of the same tokens
    if settings.embedding_bits is not None:
        part = finished.read("embedding")
        if part is None:
            part = _record(_round_embedding(source, settings, settings.embedding_bits), bar)
            finished.write("embedding", part)
        else:
            _skip(part, bar)
        batches = embed(source, windows, part.quantised(_EMBEDDING).dequantize())
        yield part
    for index, layer in enumerate(torch_layers(source, windows.shape[1])):
        original = layer.copy()
        part = finished.read(f"layer-{index}")
        if part is None:
            part = _record(_quantise_layer(layer, batches, original, originals, settings), bar)
            finished.write(f"layer-{index}", part)
        else:
            # The residual stream is computed by the same operations as before, and gets the bits that it had.
            for name in layer.weights:
                layer.weights[name] = part.quantised(layer.prefix + name).dequantize()
            for place, batch in enumerate(batches):
                batches[place] = Activations(layer(batch.hidden))
            for place, batch in enumerate(originals):
                originals[place] = Activations(original(batch.hidden))
            _skip(part, bar)
        yield part
    if _quantises_head(source, settings):
        assert settings.head_bits is not None
        part = finished.read("lm_head")
        if part is None:
            part = _record(_quantise_head(source, batches, settings, settings.head_bits), bar)
            finished.write("lm_head", part)
        else:
            _skip(part, bar)
        yield part


def _record(quantised: Iterable[tuple[str, GPTQTensors]], bar: tqdm) -> Part:
    reports: list[LayerReport] = []
    tensors: dict[str, Tensor] = {}
    start = time.monotonic()
    for name, result in quantised:
        now = time.monotonic()
        reports.append(
            LayerReport(name, result.error, result.rounding_error, result.dampening, result.bits, now - start)
        )
        tensors |= {f"{name}.{key}": tensor for key, tensor in result.tensors().items()}
        bar.update()
        start = now
    return Part(reports, tensors)


def _skip(part: Part, bar: tqdm) -> None:
    """Count a finished part without taking it for a sign of how fast the work goes."""
    bar.n += len(part.reports)
    bar.initial = bar.last_print_n = bar.n
    bar.unpause()
    bar.refresh()


def _quantise_layer(
    layer: TorchLayer,
    batches: list[Activations],
    original: TorchLayer,
    originals: list[Activations],
    settings: QuantizationSettings,
) -> Iterator[tuple[str, GPTQTensors]]:
    """Names and tensors of a layer's matrices. Its weights are overwritten, its inputs turned into its outputs.

    `original` and `originals` are the same before any quantisation, for asymmetric calibration; the latter empty when
    there is none.
    """
    for index, stage in enumerate(stages([layer], batches)):
        factor = factorise(
            stage.names,
            stage.hessian,
            act_order=settings.act_order,
            dampening=settings.dampening,
            group_size=settings.group_size,
        )
        if originals:
            drift = Drift(len(factor.order))
            for batch, before in zip(batches, originals, strict=True):
                drift.add(original.stage_input(index, before), layer.stage_input(index, batch))
            correction = factor.correction(drift.matrix()).mul_(settings.asymmetric).float()
            for name in stage.names:
                stage.replace(name, stage.weight(name) + stage.weight(name) @ correction)
            for place, batch in enumerate(originals):
                originals[place] = original.advance(index, batch)
        for name in stage.names:
            quantised = _quantise(name, stage.weight(name), factor, settings)
            stage.replace(name, quantised.dequantize())
            yield name, quantised


def _quantises_head(source: Source, settings: QuantizationSettings) -> bool:
    """Whether the head is a matrix to be quantised, and not the embedding once more."""
    return settings.head_bits is not None and not settings.shares_head(source.config)


def _round_embedding(source: Source, settings: QuantizationSettings, bits: int) -> Iterator[tuple[str, GPTQTensors]]:
    """To nearest, which on one-hot inputs is GPTQ; the errors are those over all rows."""
    config = source.config
    weight = source.tensor(f"{_EMBEDDING}.weight", (config.vocab_size, config.hidden_size))
    try:
        rounded = round_to_nearest(weight, bits=bits, group_size=settings.head_group_size)
    except ValueError as error:
        raise ValueError(f"{_EMBEDDING}: {error}") from None
    exact = weight.float()
    share = ((rounded.dequantize() - exact).norm() / exact.norm()).item() if exact.any() else 0.0
    yield _EMBEDDING, replace(rounded, error=share, rounding_error=share)


def _quantise_head(
    source: Source, batches: list[Activations], settings: QuantizationSettings, bits: int
) -> Iterator[tuple[str, GPTQTensors]]:
    config = source.config
    norm = source.tensor("model.norm.weight", (config.hidden_size,)).float()
    hessian = Hessian(config.hidden_size)
    for batch in batches:
        hessian.add(F.rms_norm(batch.hidden, (config.hidden_size,), norm, config.rms_norm_eps))
    head = "lm_head" if source.has("lm_head.weight") else _EMBEDDING
    weight = source.tensor(f"{head}.weight", (config.vocab_size, config.hidden_size))
    head_settings = QuantizationSettings(bits=bits, group_size=settings.head_group_size)
    yield "lm_head", _quantise("lm_head", weight, factorise(["lm_head"], hessian.matrix()), head_settings)


def _quantise(name: str, weight: Tensor, factor: HessianFactor, settings: QuantizationSettings) -> GPTQTensors:
    try:
        return gptq_quantize(
            weight,
            factor,
            bits=settings.bits_of(name),
            group_size=settings.group_size,
            symmetric=settings.symmetric,
            clip_search=settings.clip_search,
            refine_sweeps=settings.refine_sweeps,
            sparsity=settings.sparsity,
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
