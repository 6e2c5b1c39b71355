"""llama.cpp's kernels: products by Q4_0, Q4_1 and Q4_K weights, and flash attention."""

from __future__ import annotations

import sys
from importlib.metadata import version

import ggml
import numpy as np
from problems import Array, Attention, Matmul
from protocol import Bind, Bound, CannotError, serve

BITS = {"Q4_0": 4.5, "Q4_1": 5.0, "Q4_K": 4.5}
BLOCK = 32  # of Q4_0 and Q4_1, whatever the group size of the problem


def bits_per_weight(problem: Matmul) -> float:
    return BITS[variant]


def _packed(problem: Matmul) -> Array:
    """The problem's very weight in blocks of 32, or as near as Q4_K comes to it."""
    if variant == "Q4_K":
        if problem.in_features % 256:
            raise CannotError(f"Q4_K has blocks of 256 inputs, which do not divide {problem.in_features}")
        return ggml.quantize(variant, problem.dequantized().T)
    codes = problem.codes.T.reshape(problem.out_features, -1, BLOCK)
    scales = np.repeat(problem.scales.T, problem.group_size // BLOCK, axis=1).astype(np.float16)[..., None]
    header = [scales] if variant == "Q4_0" else [scales, -8 * scales]
    nibbles = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    return np.concatenate([*(part.view(np.uint8) for part in header), nibbles], axis=-1)


def load_matmul(problem: Matmul, copies: int) -> Bind:
    data, shape = _packed(problem), (problem.out_features, problem.in_features)
    weights = ggml.Context(copies)
    tensors = [weights.tensor(variant, *reversed(shape)) for _ in range(copies)]
    weights.allocate(ggml.buffer_type(repacked=variant != "Q4_1"))  # it has no kernels for repacked Q4_1
    for tensor in tensors:
        ggml.write(tensor, data)
    rounded = ggml.dequantize(variant, data, shape).T if variant == "Q4_K" else None

    def bind(activations: Array) -> Bound:
        graph = ggml.Context(2 * copies)
        x = graph.tensor("float32", *reversed(activations.shape))
        products = [graph.node("ggml_mul_mat", tensor, x) for tensor in tensors]
        forward = graph.graph(products)
        graph.allocate(ggml.buffer_type(repacked=False))
        ggml.write(x, activations)
        keep = weights, graph

        def result() -> Array:
            assert keep
            return ggml.read(products[0], (len(activations), problem.out_features))

        return Bound(lambda: backend.compute(forward), result, rounded)

    return bind


def load_attention(problem: Attention, copies: int) -> Bind:
    dtype = {"float32": np.float32, "float16": np.float16}[problem.dtype]
    context = ggml.Context(2 * copies)
    # As in llama.cpp's cache: all heads of a position side by side.
    sizes = problem.head_dim, problem.kv_heads, problem.context, problem.batch
    caches = [tuple(context.tensor(problem.dtype, *sizes) for _ in range(2)) for _ in range(copies)]
    context.allocate(ggml.buffer_type(repacked=False))
    of_sequence = problem.keys_values()
    for index in range(2):
        data = np.stack([of_sequence(sequence)[index].astype(dtype) for sequence in range(problem.batch)])
        for cache in caches:
            ggml.write(cache[index], data)

    def bind(queries: Array) -> Bound:
        rows = queries.shape[1]
        graph = ggml.Context(8 * copies + 8)
        query = graph.tensor("float32", problem.head_dim, rows, problem.heads, problem.batch)
        mask = graph.tensor("float16", problem.context, rows) if rows > 1 else None
        outputs = []
        for cache in caches:
            keys, values = (graph.node("ggml_permute", tensor, 0, 2, 1, 3) for tensor in cache)
            scale = problem.head_dim**-0.5
            outputs.append(graph.node("ggml_flash_attn_ext", query, keys, values, mask, scale, 0.0, 0.0))
        forward = graph.graph(outputs)
        graph.allocate(ggml.buffer_type(repacked=False))
        ggml.write(query, queries.transpose(0, 2, 1, 3))
        if mask is not None:
            hidden = np.triu(np.ones((rows, problem.context), bool), problem.context - rows + 1)
            ggml.write(mask, np.where(hidden, -np.inf, 0.0).astype(np.float16))
        keep = context, graph

        def result() -> Array:
            assert keep
            return ggml.read(outputs[0], queries.shape)

        return Bound(lambda: backend.compute(forward), result)

    return bind


if __name__ == "__main__":
    threads, variant = int(sys.argv[1]), sys.argv[2]
    backend = ggml.Backend(threads)
    load = load_attention if variant == "attention" else load_matmul
    serve(f"llama-cpp-python {version('llama-cpp-python')}", load, bits_per_weight)
