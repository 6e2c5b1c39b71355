"""What every rank of a model does: load its part, and run the steps that the first rank tells it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from teco_kernels.decoder.kv_cache import CACHE_DTYPES, KVCache
from teco_kernels.decoder.layers import shared_plan
from teco_kernels.decoder.loader import Source
from teco_kernels.decoder.model import Ends, Transformer
from teco_kernels.decoder.recycle_head import RecycleHeadConfig
from teco_kernels.decoder.runner import Runner
from teco_kernels.decoder.shard import Shard
from teco_kernels.decoder.step_messages import BlockCopy, StepMessages
from teco_kernels.decoder.weights import Quantization, WeightLoader
from teco_kernels.ops.gptq import Activation
from teco_kernels.parallel.communicator import Communicator

DTYPES = {
    # "auto": there is no processor here whose half-precision arithmetic is faster than its single-precision one.
    "auto": torch.float32,
    "float32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class RankOptions:
    """The options of `LLM` that all ranks must have alike, checked; dtypes by name."""

    dtype: str
    kv_cache_dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_decode_tokens: int
    block_size: int
    kv_cache_memory: int
    gptq_activation: Activation
    quantization: Quantization

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RankOptions:
        """From what `to_dict` gave."""
        return cls(**values)


def registered_bytes(source: Source, options: RankOptions) -> int:
    """Memory of a rank that the others read in a step."""
    num_tokens = max(options.max_num_batched_tokens, options.max_num_seqs)
    return num_tokens * shared_plan(source.config).bytes_per_token


def make_cache(
    source: Source, options: RankOptions, shard: Shard, recycle_head: RecycleHeadConfig | None = None
) -> KVCache:
    """The cache of a rank's own heads."""
    return KVCache(
        source.config,
        block_size=options.block_size,
        memory=options.kv_cache_memory,
        max_blocks=options.max_num_seqs * -(-options.max_model_len // options.block_size),
        dtype=CACHE_DTYPES[options.kv_cache_dtype],
        recycle_head=recycle_head,
        shape=shard.of_layer(source.config),
    )


def make_model(source: Source, options: RankOptions, shard: Shard, comm: Communicator | None) -> Transformer:
    """A rank's part of the model."""
    return Transformer(
        source,
        dtype=DTYPES[options.dtype],
        max_model_len=options.max_model_len,
        activation=options.gptq_activation,
        quantization=options.quantization,
        shard=shard,
        comm=comm,
    )


def read_ends(source: Source, options: RankOptions) -> Ends:
    """The embedding and the LM head of the whole model."""
    load = WeightLoader(source, DTYPES[options.dtype], options.gptq_activation, options.quantization)
    return Ends.read(source, load)


@torch.inference_mode()
def serve(
    source: Source,
    options: RankOptions,
    comm: Communicator,
    messages: StepMessages,
    loaded: Callable[[], object],
) -> None:
    """Load a part, call `loaded`, and run the steps of rank 0 until it says that no more will come.

    Raises
    ------
    CommunicatorError
        Another rank has failed, or rank 0 has closed its communicator.
    """
    shard = Shard.of(source.config, comm.rank, comm.world_size)
    cache = make_cache(source, options, shard)
    runner = Runner(
        make_model(source, options, shard, comm),
        cache,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_tokens=options.max_num_batched_tokens,
        max_decode_tokens=options.max_decode_tokens,
    )
    loaded()
    while (message := messages.receive()) is not None:
        if isinstance(message, BlockCopy):
            cache.copy_block(message.source, message.target)
        else:
            arrays = message.arrays
            batch = runner.fill_from(arrays) if message.is_static else arrays.to_batch()
            runner.compute(batch, is_static=message.is_static, best=message.best)
