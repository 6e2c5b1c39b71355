"""Decoder layers over the package's operators: those of a model, and those of its recycle head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from teco_kernels.decoder.arena import ArenaPlan, Intermediate
from teco_kernels.decoder.batch import Batch
from teco_kernels.decoder.kv_cache import LayerCache
from teco_kernels.decoder.shard import LayerShape, Shard, channel_section, head_section, times
from teco_kernels.decoder.weights import Linear, WeightLoader
from teco_kernels.ops import (
    fused_add_rms_norm,
    paged_attention,
    reshape_and_cache,
    rms_norm,
    rotary_embedding,
    silu_and_mul,
)
from teco_kernels.parallel.collectives import all_reduce_rms_norm
from teco_kernels.parallel.communicator import Communicator


@dataclass(frozen=True)
class Layer:
    """Weights of one layer; `query_norm` and `key_norm` only where the family has them."""

    input_norm: Tensor
    qkv: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Linear
    post_attention_norm: Tensor
    gate_up: Linear
    down: Linear
    sliding_window: int | None


# The operations of a layer: what their results are for, and how long these live.
_NORM, _QKV, _ATTEND, _OUTPUT, _POST_NORM, _GATE_UP, _ACTIVATE, _DOWN, _NEXT_NORM = range(9)


def arena_plan(shape: LayerShape, dtype: torch.dtype) -> ArenaPlan:
    """Of what a rank computes and keeps to itself."""
    heads = shape.num_heads + 2 * shape.num_kv_heads
    return ArenaPlan.make(
        [
            Intermediate("hidden", shape.hidden_size, _NORM, _NEXT_NORM),
            Intermediate("residual", shape.hidden_size, _NORM, _NEXT_NORM),
            Intermediate("qkv", heads * shape.head_dim, _QKV, _ATTEND),
            Intermediate("attended", shape.num_heads * shape.head_dim, _ATTEND, _OUTPUT),
            Intermediate("gate_up", 2 * shape.intermediate_size, _GATE_UP, _ACTIVATE),
            Intermediate("activated", shape.intermediate_size, _ACTIVATE, _DOWN),
        ],
        dtype,
    )


def shared_plan(shape: LayerShape) -> ArenaPlan:
    """Of partial sums, fp64 or as much of that as they need, which other ranks read where they lie.

    They may do so until this rank has come out of the collective after the one that adds these up. So there are two,
    used in turns.
    """
    return ArenaPlan.make(
        [
            Intermediate("attention_sum", shape.hidden_size, _OUTPUT, _NEXT_NORM),
            Intermediate("mlp_sum", shape.hidden_size, _DOWN, _NEXT_NORM),
        ],
        torch.float64,
    )


class Buffers(NamedTuple):
    """Where a step puts what it computes; every layer writes over what the one before has left.

    Attributes
    ----------
    hidden, residual : Tensor
        ``[T, hidden_size]``: input and output of a branch, and the stream that branches are added to.
    qkv : Tensor
        ``[T, (num_heads + 2 * num_kv_heads) * head_dim]``.
    attended : Tensor
        ``[T, num_heads * head_dim]``.
    gate_up, activated : Tensor
        ``[T, 2 * intermediate_size]`` and ``[T, intermediate_size]``.
    attention_sum, mlp_sum : Tensor
        ``[T, hidden_size]``: what a branch gives on this rank, fp64; `hidden` where there are no others.
    """

    hidden: Tensor
    residual: Tensor
    qkv: Tensor
    attended: Tensor
    gate_up: Tensor
    activated: Tensor
    attention_sum: Tensor
    mlp_sum: Tensor

    @classmethod
    def allocate(cls, shape: LayerShape, num_tokens: int, dtype: torch.dtype, shared: Tensor | None = None) -> Buffers:
        """For steps of up to `num_tokens` tokens. The system gives memory to a row when it is first written.

        `shared` is uint8 memory that other ranks can read, as `shared_plan` asks for.
        """
        plan = arena_plan(shape, dtype)
        own = plan.place(torch.empty(num_tokens * plan.bytes_per_token, dtype=torch.uint8), num_tokens, dtype)
        sums = {"attention_sum": own["hidden"], "mlp_sum": own["hidden"]}
        if shared is not None:
            sums = shared_plan(shape).place(shared, num_tokens, torch.float64)
        return cls(**own, **sums)

    def rows(self, num_tokens: int) -> Buffers:
        """The first rows, for a smaller step."""
        return Buffers(*(buffer[:num_tokens] for buffer in self))


class LayerStack:
    """Layers one after the other, and the norm after the last.

    Every operation works row by row in one fixed order, so a token's bits do not depend on what else is in the batch.

    Parameters
    ----------
    layers : sequence of Layer
    norm : Tensor
        ``[hidden_size]``.
    shape : LayerShape
    cos_sin : Tensor
        The rotary table, as `rotary_embedding` takes it.
    comm : Communicator, optional
        Of the ranks that each have a part of every layer: what `output` and `down` give is a part of a sum.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        norm: Tensor,
        shape: LayerShape,
        cos_sin: Tensor,
        comm: Communicator | None = None,
    ) -> None:
        self.layers = layers
        self._comm = comm
        self._shape = shape
        self._cos_sin = cos_sin
        self._eps = shape.rms_norm_eps
        self._next_norms = [layer.input_norm for layer in layers[1:]] + [norm]

    def forward(self, batch: Batch, caches: Sequence[LayerCache], buffers: Buffers) -> None:
        """Run a step, from `buffers.residual`: writes the tokens' keys and values into `caches`.

        Leaves the sum of all branches in `buffers.residual` and its norm in `buffers.hidden`; both have as many rows
        as the batch has tokens.
        """
        hidden, residual, eps = buffers.hidden, buffers.residual, self._eps
        rms_norm(residual, self.layers[0].input_norm, eps, out=hidden)
        for layer, cache, next_norm in zip(self.layers, caches, self._next_norms, strict=True):
            layer.qkv(hidden, out=buffers.qkv)
            self._attend(layer, batch, cache, buffers)
            branch = layer.output(buffers.attended, out=_sums(buffers.attention_sum, layer.output, hidden))
            self._add_and_norm(branch, buffers, layer.post_attention_norm)
            layer.gate_up(hidden, out=buffers.gate_up)
            silu_and_mul(buffers.gate_up, out=buffers.activated)
            branch = layer.down(buffers.activated, out=_sums(buffers.mlp_sum, layer.down, hidden))
            self._add_and_norm(branch, buffers, next_norm)

    def _add_and_norm(self, branch: Tensor, buffers: Buffers, norm: Tensor) -> None:
        residual, out = buffers.residual, (buffers.hidden, buffers.residual)
        if self._comm is None:
            fused_add_rms_norm(branch, residual, norm, self._eps, out=out)
        else:
            all_reduce_rms_norm(branch, residual, norm, self._eps, self._comm, out=out)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, norms aside."""
        linears = (linear for layer in self.layers for linear in (layer.qkv, layer.output, layer.gate_up, layer.down))
        return sum(linear.nbytes for linear in linears)

    def _attend(self, layer: Layer, batch: Batch, cache: LayerCache, buffers: Buffers) -> None:
        shape = self._shape
        heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        query, key, value = buffers.qkv.unflatten(-1, (-1, shape.head_dim)).split(heads, dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            rms_norm(query, layer.query_norm, self._eps, out=query)
            rms_norm(key, layer.key_norm, self._eps, out=key)
        rotary_embedding(batch.positions, query, key, self._cos_sin)
        reshape_and_cache(
            key,
            value,
            cache.key,
            cache.value,
            batch.slot_mapping,
            key_scale=cache.key_scale,
            value_scale=cache.value_scale,
        )
        paged_attention(
            query,
            cache.key,
            cache.value,
            batch.block_table,
            batch.seq_lens,
            batch.query_start_loc,
            sliding_window=layer.sliding_window,
            key_scale=cache.key_scale,
            value_scale=cache.value_scale,
            out=buffers.attended.view_as(query),
        )


def _sums(place: Tensor, linear: Linear, hidden: Tensor) -> Tensor:
    """Where a layer writes what it gives: to be added to what other ranks have, exactly where it can be."""
    if place.dtype == hidden.dtype or linear.section_size is not None:
        return place
    return place.view(-1).view(hidden.dtype)[: hidden.numel()].view_as(hidden)


def load_layer(
    load: WeightLoader,
    shape: LayerShape,
    prefix: str,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    sliding_window: int | None = None,
    shard: Shard | None = None,
) -> Layer:
    """Read the layer whose tensors have names that begin with `prefix`; the options are those of `ModelConfig`.

    `shape` is that of the whole layer. With a `shard`, its heads and its channels of the MLP are read, nothing else.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    channels = range(inner) if shard is None else shard.intermediate
    queries = range(query_size) if shard is None else times(shard.heads, shape.head_dim)
    keys = range(kv_size) if shard is None else times(shard.kv_heads, shape.head_dim)

    def columns(names: list[str], sizes: list[int], outputs: list[range], bias: bool) -> Linear:
        return load.linear([prefix + name for name in names], hidden, sizes, bias=bias, outputs=outputs)

    def rows(name: str, in_features: int, inputs: range, section_size: int | None, bias: bool) -> Linear:
        names = [prefix + name]
        return load.linear(names, in_features, [hidden], bias=bias, inputs=inputs, section_size=section_size)

    def head_norm(name: str) -> Tensor | None:
        return load.vector(f"{prefix}self_attn.{name}.weight", shape.head_dim) if qk_norm else None

    qkv_names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    return Layer(
        input_norm=load.vector(f"{prefix}input_layernorm.weight", hidden),
        qkv=columns(qkv_names, [query_size, kv_size, kv_size], [queries, keys, keys], qkv_bias),
        query_norm=head_norm("q_norm"),
        key_norm=head_norm("k_norm"),
        output=rows("self_attn.o_proj", query_size, queries, head_section(shape), output_bias),
        post_attention_norm=load.vector(f"{prefix}post_attention_layernorm.weight", hidden),
        gate_up=columns(["mlp.gate_proj", "mlp.up_proj"], [inner] * 2, [channels] * 2, mlp_bias),
        down=rows("mlp.down_proj", inner, channels, channel_section(shape), mlp_bias),
        sliding_window=sliding_window,
    )
