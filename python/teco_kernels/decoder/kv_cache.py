"""The KV cache: per layer, fixed-size blocks of keys and of values, handed out by a block pool."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from teco_kernels._host import BlockPool
from teco_kernels.decoder.config import ModelConfig
from teco_kernels.ops import copy_blocks

#: By short names and by vLLM's.
CACHE_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, ``[num_blocks, block_size, num_kv_heads, head_dim]``.

    `key_scale` and `value_scale` are fp32 ``[num_blocks, block_size, num_kv_heads]`` for int8 and fp8, else None.
    """

    key: Tensor
    value: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None


class KVCache:
    """All layers' caches and the pool of their blocks; a block id means the same slots in every layer.

    Parameters
    ----------
    config : ModelConfig
    block_size : int
        Tokens per block.
    memory : int
        Bytes it may take; as many blocks as fit, at most `max_blocks`.
    max_blocks : int
        More are never needed.
    dtype : torch.dtype
        fp32, fp16, bf16, int8 or float8_e4m3fn.

    Raises
    ------
    ValueError
        When not even one block fits.
    """

    def __init__(
        self, config: ModelConfig, *, block_size: int, memory: int, max_blocks: int, dtype: torch.dtype
    ) -> None:
        scaled = dtype in (torch.int8, torch.float8_e4m3fn)
        slot_bytes = 2 * config.num_kv_heads * (config.head_dim * dtype.itemsize + (4 if scaled else 0))
        block_bytes = config.num_layers * block_size * slot_bytes
        num_blocks = min(memory // block_bytes, max_blocks)
        if num_blocks < 1:
            raise ValueError(f"kv_cache_memory: expected at least {block_bytes} bytes, one block; got {memory}")
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)

        def scale() -> Tensor | None:
            return torch.empty(shape[:-1]) if scaled else None

        # Not zeroed: the system gives memory to a block only when it is first written.
        self.layers = [
            LayerCache(torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype), scale(), scale())
            for _ in range(config.num_layers)
        ]
        self.dtype = dtype
        self.block_size = block_size
        self.nbytes = num_blocks * block_bytes
        self.pool = BlockPool(num_blocks, block_size)

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block in every layer, for a sequence that is about to write into one it shares."""
        mapping = torch.tensor([[source, target]])
        for layer in self.layers:
            copy_blocks(layer.key, layer.value, mapping)
            if layer.key_scale is not None and layer.value_scale is not None:
                copy_blocks(layer.key_scale, layer.value_scale, mapping)
