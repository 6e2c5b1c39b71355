"""The operators: one module per family, each with its signatures, fake kernels and float64 references."""

from __future__ import annotations

from teco_kernels.ops._library import kernel_calls
from teco_kernels.ops.activation import silu_and_mul
from teco_kernels.ops.attention import merge_attention_states, paged_attention
from teco_kernels.ops.cache import copy_blocks, reshape_and_cache, swap_blocks
from teco_kernels.ops.dense import DenseWeight, dense_matmul
from teco_kernels.ops.embeddings import embedding
from teco_kernels.ops.gptq import GPTQWeight, gptq_matmul
from teco_kernels.ops.norm import fused_add_rms_norm, rms_norm
from teco_kernels.ops.plan import Plan
from teco_kernels.ops.recycle import lm_head_argmax, recycle_project
from teco_kernels.ops.rotary import rotary_embedding
from teco_kernels.ops.sampling import sample
from teco_kernels.ops.sparse24 import Sparse24Weight, sparse24_matmul
from teco_kernels.ops.support import Support, supports
from teco_kernels.ops.verify import verify_recycled, verify_recycled_sampled

__all__ = [
    "DenseWeight",
    "GPTQWeight",
    "Plan",
    "Sparse24Weight",
    "Support",
    "copy_blocks",
    "dense_matmul",
    "embedding",
    "fused_add_rms_norm",
    "gptq_matmul",
    "kernel_calls",
    "lm_head_argmax",
    "merge_attention_states",
    "paged_attention",
    "recycle_project",
    "reshape_and_cache",
    "rms_norm",
    "rotary_embedding",
    "sample",
    "silu_and_mul",
    "sparse24_matmul",
    "supports",
    "swap_blocks",
    "verify_recycled",
    "verify_recycled_sampled",
]
