"""vLLM's attention backend over `paged_attention` and `reshape_and_cache`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from teco_kernels.ops import paged_attention, reshape_and_cache


class TecoAttentionBackend(AttentionBackend):
    """What vLLM asks of a backend before it makes layers."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        # The name in vLLM's enum: it looks its backends up by it.
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TecoAttentionImpl]:
        return TecoAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TecoAttentionMetadataBuilder]:
        return TecoAttentionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        # They would see the arrangement of keys and values that `_keys_and_values` makes; none was tried.
        return False


@dataclass
class TecoAttentionMetadata:
    """A step's tables, shared by all layers."""

    num_actual_tokens: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    causal: bool


class TecoAttentionMetadataBuilder(AttentionMetadataBuilder[TecoAttentionMetadata]):
    """Takes out of a step what the operators ask for."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TecoAttentionMetadata:
        common = common_attn_metadata
        if isinstance(common.causal, Tensor):
            raise ValueError("attention backend CUSTOM (teco_kernels): expected one causal for all sequences")
        return TecoAttentionMetadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc[: common.num_reqs + 1],
            seq_lens=common.seq_lens[: common.num_reqs],
            block_table=common.block_table_tensor[: common.num_reqs],
            slot_mapping=common.slot_mapping,
            causal=common.causal,
        )


class TecoAttentionImpl(AttentionImpl[TecoAttentionMetadata]):
    """One layer's attention."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        if attn_type != AttentionType.DECODER:
            raise ValueError(
                f"attention backend CUSTOM (teco_kernels): expected a decoder's attention, got {attn_type}"
            )
        if kv_cache_dtype not in TecoAttentionBackend.supported_kv_cache_dtypes:
            raise ValueError(
                f"attention backend CUSTOM (teco_kernels): kv_cache_dtype: expected one of "
                f"{', '.join(TecoAttentionBackend.supported_kv_cache_dtypes)}, got {kv_cache_dtype}"
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self._alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self._sliding_window, self._soft_cap, self._sinks = sliding_window, logits_soft_cap or None, sinks
        self._views: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: TecoAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write keys and values ``[T, num_kv_heads, head_size]`` into `kv_cache`, then the attention into `output`.

        `query` and `output` are ``[T, num_heads, head_size]``. A layer that shares another one's cache writes nothing.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("attention backend CUSTOM (teco_kernels): output_scale is not supported")
        if attn_metadata is None:  # vLLM is measuring its memory
            return output
        T = attn_metadata.num_actual_tokens
        if key is not None and value is not None and self.kv_sharing_target_layer_name is None:
            self.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping[:T])
        paged_attention(
            query[:T],
            *self._keys_and_values_of(kv_cache),
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.query_start_loc,
            scale=self.scale,
            causal=attn_metadata.causal,
            sliding_window=self._sliding_window,
            soft_cap=self._soft_cap,
            alibi_slopes=self._alibi_slopes,
            sinks=None if self._sinks is None else self._sinks.float(),
            out=output[:T],
        )
        return output

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write a step's keys and values, ``[T, num_kv_heads, head_size]``; some models of vLLM call it themselves."""
        T = len(slot_mapping)
        reshape_and_cache(key[:T], value[:T], *self._keys_and_values_of(kv_cache), slot_mapping)

    def _keys_and_values_of(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """The views of `_keys_and_values`, made once for a cache, which stays the same from step to step."""
        if self._views is None or self._views[0] is not kv_cache:
            self._views = kv_cache, *_keys_and_values(kv_cache)
        return self._views[1:]


def _keys_and_values(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views ``[num_blocks, block_size, num_kv_heads, head_size]`` of vLLM's cache.

    vLLM gives a backend ``[num_blocks, num_kv_heads, block_size, 2 * head_size]`` to fill as it likes: a head's keys of
    a block lie side by side here, and its values behind them.
    """
    num_blocks, num_kv_heads, block_size, width = kv_cache.shape
    halves = kv_cache.view(num_blocks, num_kv_heads, 2, block_size, width // 2)
    keys, values = halves.unbind(2)
    return keys.transpose(1, 2), values.transpose(1, 2)
