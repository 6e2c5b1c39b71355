"""This package: `gptq_matmul` with exact or int8 activations, `paged_attention`.

The calls of a pass are recorded and replayed, as the decoder loop does it; others run theirs as one graph.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import torch
from problems import Array, Attention, Matmul
from protocol import Bind, Bound, serve

from teco_kernels import GPTQWeight, __version__, gptq_matmul, paged_attention
from teco_kernels.ops._library import cpu_isa
from teco_kernels.ops.plan import Plan

BLOCK_SIZE = 16


def bits_per_weight(problem: Matmul) -> float:
    return 4 + 32 / problem.group_size


def load_matmul(problem: Matmul, copies: int) -> Bind:
    codes, scales = torch.from_numpy(problem.codes), torch.from_numpy(problem.scales)
    zeros = torch.full(scales.shape, 8, dtype=torch.int32)
    weight = GPTQWeight.from_codes(codes, scales, bits=4, zeros=zeros)
    weights = [replace(weight, packed=weight.packed.clone()) for _ in range(copies)]

    def bind(activations: Array) -> Bound:
        x = torch.from_numpy(activations)
        out = torch.empty(len(x), problem.out_features)

        def run() -> None:
            for weight in reversed(weights):
                gptq_matmul(x, weight, activation=variant, out=out)

        return Bound(Plan(run, (x, weights, out)).replay, out.numpy)

    return bind


def load_attention(problem: Attention, copies: int) -> Bind:
    dtype = getattr(torch, problem.dtype)
    blocks = -(-problem.context // BLOCK_SIZE)
    # Blocks of a sequence lie anywhere, as they do once requests have come and gone.
    table = torch.randperm(problem.batch * blocks, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    table = table.view(problem.batch, blocks)
    shape = problem.batch * blocks, BLOCK_SIZE, problem.kv_heads, problem.head_dim
    caches = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(copies)]
    of_sequence = problem.keys_values()
    for sequence in range(problem.batch):
        for index, part in enumerate(of_sequence(sequence)):
            filled = torch.from_numpy(part).to(dtype).view(blocks, *shape[1:])
            for cache in caches:
                cache[index][table[sequence].long()] = filled
    lengths = torch.full((problem.batch,), problem.context, dtype=torch.int32)

    def bind(queries: Array) -> Bound:
        rows = queries.shape[1]
        query = torch.from_numpy(queries).to(dtype).flatten(0, 1)
        starts = torch.arange(problem.batch + 1, dtype=torch.int32) * rows
        out = torch.empty_like(query)

        def run() -> None:
            for keys, values in reversed(caches):
                paged_attention(query, keys, values, table, lengths, starts, out=out)

        plan = Plan(run, (query, caches, table, lengths, starts, out))
        return Bound(plan.replay, lambda: np.asarray(out.float()).reshape(queries.shape))

    return bind


if __name__ == "__main__":
    threads, variant = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(threads)
    load = load_attention if variant == "attention" else load_matmul
    serve(f"{__version__} ({cpu_isa()})", load, bits_per_weight)
