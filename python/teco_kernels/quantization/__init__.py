"""GPTQ: the quantizer, the checkpoint layout, and the pass over a whole model."""

from __future__ import annotations

from teco_kernels.quantization.default import default_quantized_model
from teco_kernels.quantization.gptq import GPTQTensors, HessianFactor, gptq_quantize, round_to_nearest
from teco_kernels.quantization.model import quantize_model
from teco_kernels.quantization.report import LayerReport
from teco_kernels.quantization.settings import QuantizationSettings

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
