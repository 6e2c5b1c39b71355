"""GPTQ: the quantizer, the checkpoint layout, and the pass over a whole model."""

from __future__ import annotations

from teco_kernels.quantization.default import default_quantized_model
from teco_kernels.quantization.gptq import GPTQTensors, HessianFactor, gptq_quantize, round_to_nearest
from teco_kernels.quantization.model import LayerReport, QuantizationSettings, quantize_model

__all__ = [
    "GPTQTensors",
    "HessianFactor",
    "LayerReport",
    "QuantizationSettings",
    "default_quantized_model",
    "gptq_quantize",
    "quantize_model",
    "round_to_nearest",
]
