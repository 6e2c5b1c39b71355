"""GPTQ and pruning: on a weight and its Hessian, and on whole models."""

from __future__ import annotations

from teco_kernels.quantization.default import default_quantized_model
from teco_kernels.quantization.gptq import GPTQTensors, HessianFactor, gptq_quantize, round_to_nearest
from teco_kernels.quantization.model import quantize_model
from teco_kernels.quantization.pruned_model import PruningReport, PruningSettings, prune_model
from teco_kernels.quantization.report import LayerReport
from teco_kernels.quantization.settings import QuantizationSettings
from teco_kernels.quantization.sparsegpt import sparsegpt_prune
from teco_kernels.quantization.sparsity import magnitude_mask, wanda_mask

__all__ = [
    "GPTQTensors",
    "HessianFactor",
    "LayerReport",
    "PruningReport",
    "PruningSettings",
    "QuantizationSettings",
    "default_quantized_model",
    "gptq_quantize",
    "magnitude_mask",
    "prune_model",
    "quantize_model",
    "round_to_nearest",
    "sparsegpt_prune",
    "wanda_mask",
]
