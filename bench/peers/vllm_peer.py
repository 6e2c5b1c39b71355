"""vLLM on a CPU: its paged attention operators, called as its own backend calls them."""

from __future__ import annotations

import sys

import torch
import vllm
from problems import Array, Attention
from protocol import Bind, Bound, serve
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

BLOCK_SIZE = 128  # its default on a CPU


def load(problem: Attention, copies: int) -> Bind:
    dtype = getattr(torch, problem.dtype)
    blocks = -(-problem.context // BLOCK_SIZE)
    isa = _get_attn_isa(dtype, BLOCK_SIZE, problem.head_dim)
    table = torch.randperm(problem.batch * blocks, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    table = table.view(problem.batch, blocks)
    shape = problem.batch * blocks, problem.kv_heads, 2 * BLOCK_SIZE, problem.head_dim
    caches = [torch.zeros(shape, dtype=dtype).chunk(2, dim=2) for _ in range(copies)]
    of_sequence = problem.keys_values()
    positions = torch.arange(problem.context)
    for sequence in range(problem.batch):
        keys, values = (torch.from_numpy(part).to(dtype) for part in of_sequence(sequence))
        slots = table[sequence, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        for cache in caches:
            ops.cpu_attn_reshape_and_cache(keys, values, *cache, slots, isa)
    lengths = torch.full((problem.batch,), problem.context, dtype=torch.int32)

    def bind(queries: Array) -> Bound:
        rows = queries.shape[1]
        query = torch.from_numpy(queries).to(dtype).flatten(0, 1)
        starts = torch.arange(problem.batch + 1, dtype=torch.int32) * rows
        out = torch.empty_like(query)
        scale = problem.head_dim**-0.5
        sizes = problem.batch, problem.heads, problem.kv_heads, problem.head_dim
        # Made once per step, and used by all layers.
        plan = ops.cpu_attn_get_scheduler_metadata(
            *sizes, lengths, dtype, starts, True, -1, isa, envs.VLLM_CPU_ATTN_SPLIT_KV
        )

        def run() -> None:
            for keys, values in reversed(caches):
                ops.cpu_attention_with_kv_cache(
                    query, keys, values, out, starts, lengths, scale, True, None, -1, table, 0.0, plan, None
                )

        return Bound(run, lambda: out.float().numpy().reshape(queries.shape))

    return bind


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    serve(vllm.__version__, load)
