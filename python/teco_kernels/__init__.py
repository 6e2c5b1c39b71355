"""teco_kernels: native kernels for large-language-model inference, and a slim decoder loop over them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from teco_kernels.ops import (
    DenseWeight,
    GPTQWeight,
    Support,
    copy_blocks,
    dense_matmul,
    embedding,
    fused_add_rms_norm,
    gptq_matmul,
    merge_attention_states,
    paged_attention,
    reshape_and_cache,
    rms_norm,
    rotary_embedding,
    sample,
    silu_and_mul,
    supports,
    swap_blocks,
)

if TYPE_CHECKING:
    from teco_kernels.decoder import LLM, CompletionOutput, RequestOutput, SamplingParams
    from teco_kernels.quantization import gptq_quantize

__version__ = "0.1.0"

# The decoder loop pulls in tokenizers and safetensors: an engine that only wants the operators never loads them.
_LAZY = {
    "LLM": "teco_kernels.decoder",
    "SamplingParams": "teco_kernels.decoder",
    "RequestOutput": "teco_kernels.decoder",
    "CompletionOutput": "teco_kernels.decoder",
    "gptq_quantize": "teco_kernels.quantization",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "DenseWeight",
    "GPTQWeight",
    "RequestOutput",
    "SamplingParams",
    "Support",
    "copy_blocks",
    "dense_matmul",
    "embedding",
    "fused_add_rms_norm",
    "gptq_matmul",
    "gptq_quantize",
    "merge_attention_states",
    "paged_attention",
    "reshape_and_cache",
    "rms_norm",
    "rotary_embedding",
    "sample",
    "silu_and_mul",
    "supports",
    "swap_blocks",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
