"""teco_kernels: native kernels for large-language-model inference, and a slim decoder loop over them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from teco_kernels.ops import (
    DenseWeight,
    GPTQWeight,
    Sparse24Weight,
    Support,
    copy_blocks,
    dense_matmul,
    embedding,
    fused_add_rms_norm,
    gptq_matmul,
    lm_head_argmax,
    merge_attention_states,
    paged_attention,
    recycle_project,
    reshape_and_cache,
    rms_norm,
    rotary_embedding,
    sample,
    silu_and_mul,
    sparse24_matmul,
    supports,
    swap_blocks,
    verify_recycled,
    verify_recycled_sampled,
)

if TYPE_CHECKING:
    from teco_kernels.c_api import get_include, get_library
    from teco_kernels.decoder import LLM, AsyncEngine, CompletionOutput, RequestOutput, SamplingParams
    from teco_kernels.parallel import (
        Communicator,
        CommunicatorError,
        all_gather,
        all_reduce,
        all_reduce_rms_norm,
        broadcast,
        reduce_scatter,
    )
    from teco_kernels.quantization import gptq_quantize, sparsegpt_prune, wanda_mask

__version__ = "0.1.0"

# The decoder loop pulls in tokenizers and safetensors, the communicator torch.distributed: an engine that only wants
# the operators never loads them.
_LAZY = {
    "get_include": "teco_kernels.c_api",
    "get_library": "teco_kernels.c_api",
    "LLM": "teco_kernels.decoder",
    "AsyncEngine": "teco_kernels.decoder",
    "SamplingParams": "teco_kernels.decoder",
    "RequestOutput": "teco_kernels.decoder",
    "CompletionOutput": "teco_kernels.decoder",
    "Communicator": "teco_kernels.parallel",
    "CommunicatorError": "teco_kernels.parallel",
    "all_gather": "teco_kernels.parallel",
    "all_reduce": "teco_kernels.parallel",
    "all_reduce_rms_norm": "teco_kernels.parallel",
    "broadcast": "teco_kernels.parallel",
    "reduce_scatter": "teco_kernels.parallel",
    "gptq_quantize": "teco_kernels.quantization",
    "sparsegpt_prune": "teco_kernels.quantization",
    "wanda_mask": "teco_kernels.quantization",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "Communicator",
    "CommunicatorError",
    "CompletionOutput",
    "DenseWeight",
    "GPTQWeight",
    "RequestOutput",
    "SamplingParams",
    "Sparse24Weight",
    "Support",
    "all_gather",
    "all_reduce",
    "all_reduce_rms_norm",
    "broadcast",
    "copy_blocks",
    "dense_matmul",
    "embedding",
    "fused_add_rms_norm",
    "get_include",
    "get_library",
    "gptq_matmul",
    "gptq_quantize",
    "lm_head_argmax",
    "merge_attention_states",
    "paged_attention",
    "recycle_project",
    "reduce_scatter",
    "reshape_and_cache",
    "rms_norm",
    "rotary_embedding",
    "sample",
    "silu_and_mul",
    "sparse24_matmul",
    "sparsegpt_prune",
    "supports",
    "swap_blocks",
    "verify_recycled",
    "verify_recycled_sampled",
    "wanda_mask",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value  # the next access does not come here
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
