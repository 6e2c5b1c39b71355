"""One call that puts a transformers model on these operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teco_kernels.integrations.gradients import without_gradient
from teco_kernels.integrations.transformers.attention import ATTENTION
from teco_kernels.integrations.transformers.gptq import GPTQLinear
from teco_kernels.integrations.transformers.self_attention import Angles, SelfAttention
from teco_kernels.ops import GPTQWeight, gptq_matmul, rms_norm, silu_and_mul


class RMSNorm(torch.nn.Module):
    """In place of a model's own, over `rms_norm`."""

    def __init__(self, weight: torch.nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        return without_gradient("RMSNorm", rms_norm(x, self.weight, self.variance_epsilon), x, self.weight)


class GatedMLP(torch.nn.Module):
    """In place of an MLP with SiLU whose projections are quantised: gate and up in one matmul, over `silu_and_mul`."""

    def __init__(self, gate_up: GPTQWeight, down: GPTQLinear) -> None:
        super().__init__()
        self.gate_up, self.down_proj = gate_up, down

    def forward(self, x: Tensor) -> Tensor:
        gate_up = gptq_matmul(x, self.gate_up, activation=self.down_proj.activation)
        out: Tensor = self.down_proj(silu_and_mul(gate_up))
        return without_gradient("GatedMLP", out, x)


def accelerate(model: Any) -> Any:
    """Put a model on these operators, in place: attention, norms, and what lies around them in GPTQ checkpoints.

    Parameters
    ----------
    model : PreTrainedModel
        For inference, on the CPU: a backward pass raises. Changed: "teco_paged" becomes its attention; ``RMSNorm``
        modules of the plain kind are replaced, and attention modules and gated MLPs whose layers are `GPTQLinear`.
        What is not recognised stays as it is.

    Returns
    -------
    PreTrainedModel
        `model`.

    Raises
    ------
    ValueError
        When the model does not let its attention be chosen, or is to give its attention weights.
    """
    if getattr(model.config, "output_attentions", False):
        raise ValueError("model: expected output_attentions to be False in its config, got True")
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:
        raise ValueError(f"model: expected one whose attention can be chosen, {type(model).__name__} does not let it")
    angles = Angles()
    for name, module in list(model.named_modules()):
        replacement = _replacement(module, angles)
        if replacement is not None:
            model.set_submodule(name, replacement.train(module.training))
    return model


#: Whose norm is ``weight * x / sqrt(mean(x^2) + eps)``; Gemma's, of the same attributes, adds one to the weight.
_PLAIN_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
_ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
_GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")


def _replacement(module: torch.nn.Module, angles: Angles) -> torch.nn.Module | None:
    kind = type(module).__name__
    if not type(module).__module__.startswith("transformers.models."):  # a checkpoint's own code may use any name
        return None
    if kind in _PLAIN_NORMS:
        return RMSNorm(module.weight, module.variance_epsilon)  # type: ignore[arg-type]
    if kind in _ATTENTIONS:
        projections = module.q_proj, module.k_proj, module.v_proj, module.o_proj
        quantised = all(isinstance(layer, GPTQLinear) for layer in projections)
        return SelfAttention(module, angles) if quantised else None
    if kind not in _GATED_MLPS or type(module.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return None
    layers = module.gate_proj, module.up_proj, module.down_proj
    if not all(isinstance(layer, GPTQLinear) for layer in layers):
        return None
    gate, up, down = layers
    try:
        return GatedMLP(GPTQWeight.concatenate([gate.weight_packed, up.weight_packed]), down)  # type: ignore
    except ValueError:  # of different bits, groups or orders
        return None
