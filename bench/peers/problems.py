"""What is computed: the same weights, activations, keys and values in every process, and their float64 results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

Array = np.ndarray[Any, Any]
_CHECKED = 64  # columns of a product, positions of a sequence that are held against float64


def relative_error(result: Array, reference: Array) -> float:
    """||result - reference|| / ||reference||; NaN stays NaN."""
    return float(np.linalg.norm(result.astype(np.float64) - reference) / np.linalg.norm(reference))


def to_bfloat16(x: Array) -> Array:
    """fp32 numbers rounded to those that bf16 has; they stay fp32."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


@dataclass(frozen=True)
class Matmul:
    """A 4-bit weight that activations of any number of rows are multiplied by.

    Codes are random, the zero point is the middle and scales have the 8 significant bits of bf16, so that GPTQ's
    layout, Q4_0, Q4_1, MatMulNBits, u4 with fp16 scales and torch's int4pack all hold the very same weight.
    """

    in_features: int
    out_features: int
    group_size: int
    kind: ClassVar[str] = "matmul"

    @property
    def codes(self) -> Array:
        """uint8 ``[in_features, out_features]``, 0 to 15."""
        return np.random.default_rng(1).integers(0, 16, (self.in_features, self.out_features), dtype=np.uint8)

    @property
    def scales(self) -> Array:
        """fp32 ``[num_groups, out_features]``."""
        shape = self.in_features // self.group_size, self.out_features
        return (np.random.default_rng(2).integers(128, 256, shape) / 2**12).astype(np.float32)

    def dequantized(self) -> Array:
        """fp32 ``[in_features, out_features]``, exact."""
        return (self.codes.astype(np.float32) - 8) * np.repeat(self.scales, self.group_size, axis=0)

    def inputs(self, rows: int) -> Array:
        """fp32 activations ``[rows, in_features]``."""
        return np.random.default_rng(3).standard_normal((rows, self.in_features), dtype=np.float32)

    def error(self, rows: int, result: Array, weight: Array | None = None) -> float:
        """Of ``[rows, out_features]`` against the float64 product by the dequantised weight, on some columns."""
        columns = np.linspace(0, self.out_features - 1, min(_CHECKED, self.out_features)).astype(int)
        weight = self.dequantized() if weight is None else weight
        reference = self.inputs(rows).astype(np.float64) @ weight[:, columns].astype(np.float64)
        return relative_error(result[:, columns], reference)


@dataclass(frozen=True)
class Attention:
    """`batch` sequences of `context` keys: one query token each (decode), or a causal prefill of all positions.

    `rows` of a request is the number of query tokens per sequence: 1 or `context`. Keys, values and queries are rounded
    to bf16 whatever the dtype, so that fp16 and bf16 caches hold the same.
    """

    batch: int
    context: int
    dtype: str
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    kind: ClassVar[str] = "attention"

    @property
    def nbytes(self) -> int:
        """Of all keys and values."""
        itemsize = 4 if self.dtype == "float32" else 2
        return 2 * self.batch * self.context * self.kv_heads * self.head_dim * itemsize

    def keys_values(self) -> Callable[[int], tuple[Array, Array]]:
        """Function of a sequence's index: its keys and values, fp32 ``[context, kv_heads, head_dim]``."""
        shape = self.context, self.kv_heads, self.head_dim
        keys, values = (
            to_bfloat16(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)) for seed in (4, 5)
        )
        return lambda sequence: (np.roll(keys, 7 * sequence, axis=0), np.roll(values, 7 * sequence, axis=0))

    def inputs(self, rows: int) -> Array:
        """fp32 queries ``[batch, rows, heads, head_dim]``."""
        shape = self.batch, rows, self.heads, self.head_dim
        return to_bfloat16(np.random.default_rng(6).standard_normal(shape, dtype=np.float32))

    def error(self, rows: int, result: Array, weight: Array | None = None) -> float:
        """Of ``[batch, rows, heads, head_dim]`` against float64, on some positions of the first and last sequence."""
        queries, of_sequence = self.inputs(rows), self.keys_values()
        positions = np.unique(np.linspace(0, rows - 1, min(_CHECKED, rows)).astype(int))
        sequences = sorted({0, self.batch - 1})
        references = [
            self._reference(queries[s, positions], *of_sequence(s), positions + self.context - rows) for s in sequences
        ]
        return relative_error(result[sequences][:, positions], np.stack(references))

    def _reference(self, queries: Array, keys: Array, values: Array, positions: Array) -> Array:
        grouped = queries.astype(np.float64).reshape(len(positions), self.kv_heads, -1, self.head_dim)
        scores = np.einsum("tkgd,skd->tkgs", grouped, keys.astype(np.float64)) * self.head_dim**-0.5
        scores[np.broadcast_to((np.arange(self.context) > positions[:, None])[:, None, None], scores.shape)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.einsum("tkgs,skd->tkgd", weights, values.astype(np.float64)).reshape(queries.shape)


Problem = Matmul | Attention


def problem_from(fields: dict[str, Any]) -> Problem:
    """The problem that a request describes."""
    kinds: dict[str, type[Problem]] = {"matmul": Matmul, "attention": Attention}
    return kinds[fields["kind"]](**{name: value for name, value in fields.items() if name != "kind"})
