"""vLLM's RMS norms, rotary embeddings and SwiGLU over our operators, on CPUs, beside our attention or linear layers.

vLLM's own rotary embedding on a CPU is a parallel region of OpenMP, whose threads spin for a while when it ends, on the
cores that the threads of `gptq_matmul` and `paged_attention` need.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.dynamic_ntk_scaling_rope import DynamicNTKScalingRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.linear_scaling_rope import LinearScalingRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.ntk_scaling_rope import NTKScalingRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.yarn_scaling_rope import YaRNScalingRotaryEmbedding

from teco_kernels.integrations.vllm import is_our_attention
from teco_kernels.integrations.vllm.gptq import NAME
from teco_kernels.ops import fused_add_rms_norm, rms_norm, rotary_embedding, silu_and_mul

# They differ in their table of angles alone.
_ROTARY = (
    RotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    NTKScalingRotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)


def register_layers() -> None:
    """Let vLLM make our subclasses of its layers, which do what its own do unless something of ours was chosen.

    A layer that another plug-in has replaced before stays that plug-in's.
    """
    layers: dict[Any, Any] = {RMSNorm: _RMSNorm, SiluAndMul: _SiluAndMul}
    layers |= {rotary: type(f"_Teco{rotary.__name__}", (_Rotary, rotary), {}) for rotary in _ROTARY}
    for vllms, ours in layers.items():
        if vllms.__name__ not in op_registry_oot:
            name = vllms.name
            vllms.register_oot(ours)
            ours.name = name  # which users switch on and off in `custom_ops`


def _is_ours_chosen() -> bool:
    """Whether the model that is being made has our attention or our linear layers."""
    config = get_current_vllm_config_or_none()
    if config is None or config.model_config is None:
        return False
    backends = [config.attention_config.backend, *config.attention_config.backend_per_kind.values()]
    return any(map(is_our_attention, backends)) or config.model_config.quantization == NAME


class _OursIfChosen:
    """Mixed into a layer: dispatches what vLLM would run as `forward_cpu` to `forward_ours`."""

    def dispatch_forward(self: Any, compile_native: bool) -> Any:
        forward = super().dispatch_forward(compile_native)  # type: ignore[misc]
        return self.forward_ours if forward == self.forward_cpu and _is_ours_chosen() else forward


class _RMSNorm(_OursIfChosen, RMSNorm):
    def forward_ours(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """As vLLM's, `x` and `residual` may be written."""
        dtypes = {tensor.dtype for tensor in (x, residual, self.weight) if tensor is not None}
        if self.variance_size_override is not None or len(dtypes) > 1 or x.dim() > 3:
            return self.forward_cpu(x, residual)
        if residual is None:
            return rms_norm(x, self.weight, self.variance_epsilon)
        return fused_add_rms_norm(x, residual, self.weight, self.variance_epsilon, out=(x, residual))


class _SiluAndMul(_OursIfChosen, SiluAndMul):
    def forward_ours(self, x: Tensor) -> Tensor:
        return silu_and_mul(x)


class _Rotary(_OursIfChosen):
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self._forward_method == self.forward_ours:  # angles of the model's dtype, as vLLM's layers have them
            self.register_buffer("angles", self.cos_sin_cache.float(), persistent=False)

    def forward_ours(
        self: Any, positions: Tensor, query: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As vLLM's, in place."""
        if key is None:
            return self.forward_cpu(positions, query)
        heads = (positions.numel(), -1, self.head_size)
        rotary_embedding(
            positions.flatten(), query.view(heads), key.view(heads), self.angles, interleaved=not self.is_neox_style
        )
        return query, key
