"""Which part of a model each rank has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

from teco_kernels.decoder.config import ModelConfig

#: Borders lie between the blocks of inputs that quantised matmuls give a scale, and between the panels of outputs.
BLOCK, PANEL = 32, 16
# Of the channels of the MLP: powers of two from the block of inputs that quantised matmuls give a scale up to where the
# additions of sections cost nearly nothing.
_CHANNEL_SECTIONS = (256, 128, 64, 32)


class LayerShape(Protocol):
    """Sizes of a decoder layer, as the configurations of models and heads have them."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...


@dataclass(frozen=True)
class Shard:
    """The part of one rank, each as the range of what it has of the whole.

    Attributes
    ----------
    rank, world_size : int
    kv_heads, heads : range
        Of keys and values, and the query heads that attend to them.
    intermediate : range
        Channels between the MLP's matrices.
    vocabulary : range
        Tokens whose embeddings and logits it has.
    vocabulary_stride : int
        Tokens of every rank but the last, which may have less: `vocabulary` begins at ``rank * vocabulary_stride``.
    """

    rank: int
    world_size: int
    kv_heads: range
    heads: range
    intermediate: range
    vocabulary: range
    vocabulary_stride: int

    @classmethod
    def of(cls, config: ModelConfig, rank: int = 0, world_size: int = 1) -> Shard:
        """Cut a model for so many ranks, as evenly as heads and blocks can be shared out; the first get the rest.

        Raises
        ------
        ValueError
            There are more ranks than KV heads.
        """
        if not 1 <= world_size <= config.num_kv_heads:
            raise ValueError(
                f"tensor_parallel_size: expected 1 to {config.num_kv_heads}, the model's KV heads, got {world_size}"
            )
        kv_heads = split(config.num_kv_heads, world_size)[rank]
        group = config.num_heads // config.num_kv_heads
        stride = _stride(config.vocab_size, world_size)
        return cls(
            rank=rank,
            world_size=world_size,
            kv_heads=kv_heads,
            heads=times(kv_heads, group),
            intermediate=split(config.intermediate_size, world_size, channel_section(config) or BLOCK)[rank],
            vocabulary=range(rank * stride, min((rank + 1) * stride, config.vocab_size)),
            vocabulary_stride=stride,
        )

    def of_layer(self, config: ModelConfig) -> ModelConfig:
        """The configuration of a model whose layers are this rank's parts."""
        return replace(
            config,
            num_heads=len(self.heads),
            num_kv_heads=len(self.kv_heads),
            intermediate_size=len(self.intermediate),
        )


def channel_section(shape: LayerShape) -> int | None:
    """Channels of the MLP that are summed apart (see `gptq_matmul`), and that no number of ranks divides.

    None where there are too few for that.
    """
    for size in _CHANNEL_SECTIONS:
        if size * shape.num_kv_heads <= shape.intermediate_size:
            return size
    return None


def head_section(shape: LayerShape) -> int:
    """Outputs of the heads that share a KV head: as above."""
    return shape.num_heads // shape.num_kv_heads * shape.head_dim


def split(count: int, world_size: int, unit: int = 1) -> list[range]:
    """A range per rank of `count` things, borders being multiples of `unit`, or of less where there are too few."""
    while unit > 1 and count < unit * world_size:
        unit //= 2
    units = -(-count // unit)
    borders = [-(-units * rank // world_size) * unit for rank in range(world_size + 1)]
    return [range(begin, min(end, count)) for begin, end in pairwise(borders)]


def _stride(count: int, world_size: int) -> int:
    """So many for every rank but the last, which gets the rest: whole panels, or less where there are too few."""
    unit = PANEL
    while True:
        stride = -(-count // (world_size * unit)) * unit
        if unit == 1 or stride * (world_size - 1) < count:
            return stride
        unit //= 2


def times(part: range, factor: int) -> range:
    """The range of the elements of which each member of `part` has `factor`."""
    return range(part.start * factor, part.stop * factor)
