"""The KV cache: per layer, fixed-size blocks of keys and of values, handed out by a block pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from teco_kernels._host import BlockPool
from teco_kernels.decoder.config import ModelConfig
from teco_kernels.decoder.recycle_head import RecycleHeadConfig
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

    A recycle head's layers have caches of their own in the same blocks. Where the head was not run they hold zeros or
    what it wrote for an earlier owner of the block: what it says then is a worse guess, or nothing.

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
    recycle_head : RecycleHeadConfig, optional
        Of the head beside the model.
    shape : ModelConfig, optional
        What this rank has of every layer of `config`, where ranks share the model. They have the same blocks, of which
        each holds its own heads' keys and values; `memory` and `nbytes` are those of all ranks together.

    Raises
    ------
    ValueError
        When not even one block fits.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        block_size: int,
        memory: int,
        max_blocks: int,
        dtype: torch.dtype,
        recycle_head: RecycleHeadConfig | None = None,
        shape: ModelConfig | None = None,
    ) -> None:
        scaled = dtype in (torch.int8, torch.float8_e4m3fn)

        def slot_bytes(shape: ModelConfig | RecycleHeadConfig) -> int:
            row_bytes = shape.head_dim * dtype.itemsize + (4 if scaled else 0)
            return 2 * shape.num_layers * shape.num_kv_heads * row_bytes

        block_bytes = block_size * (slot_bytes(config) + (slot_bytes(recycle_head) if recycle_head else 0))
        num_blocks = min(memory // block_bytes, max_blocks)
        if num_blocks < 1:
            raise ValueError(f"kv_cache_memory: expected at least {block_bytes} bytes, one block; got {memory}")

        # The system gives memory to a block only when it is first written, to one of zeros too.
        def layers(of: ModelConfig | RecycleHeadConfig, make: Callable[..., Tensor]) -> list[LayerCache]:
            shape = (num_blocks, block_size, of.num_kv_heads, of.head_dim)

            def scale() -> Tensor | None:
                return make(shape[:-1]) if scaled else None

            return [
                LayerCache(make(shape, dtype=dtype), make(shape, dtype=dtype), scale(), scale())
                for _ in range(of.num_layers)
            ]

        self.layers = layers(shape or config, torch.empty)
        self.head_layers = layers(recycle_head, torch.zeros) if recycle_head else []
        self.dtype = dtype
        self.block_size = block_size
        self.nbytes = num_blocks * block_bytes
        self.pool = BlockPool(num_blocks, block_size)
        #: Called with the blocks before `copy_block` copies one: other ranks must do so too.
        self.copy_observer: Callable[[int, int], None] | None = None

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block in every layer, for a sequence that is about to write into one it shares."""
        if self.copy_observer is not None:
            self.copy_observer(source, target)
        mapping = torch.tensor([[source, target]])
        for layer in (*self.layers, *self.head_layers):
            copy_blocks(layer.key, layer.value, mapping)
            if layer.key_scale is not None and layer.value_scale is not None:
                copy_blocks(layer.key_scale, layer.value_scale, mapping)
