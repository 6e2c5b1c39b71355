"""torch: `scaled_dot_product_attention` over keys and values in one piece, heads outermost, as it likes them best."""

from __future__ import annotations

import sys

import torch
from problems import Array, Attention
from protocol import Bind, Bound, serve


def load(problem: Attention, copies: int) -> Bind:
    dtype = getattr(torch, problem.dtype)
    shape = problem.batch, problem.kv_heads, problem.context, problem.head_dim
    caches = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(copies)]
    of_sequence = problem.keys_values()
    for sequence in range(problem.batch):
        for index, part in enumerate(of_sequence(sequence)):
            for cache in caches:
                cache[index][sequence] = torch.from_numpy(part).transpose(0, 1)

    def bind(queries: Array) -> Bound:
        query = torch.from_numpy(queries).to(dtype).transpose(1, 2).contiguous()
        outputs: list[torch.Tensor] = []

        def run() -> None:
            outputs[:] = [
                torch.nn.functional.scaled_dot_product_attention(
                    query, keys, values, is_causal=queries.shape[1] > 1, enable_gqa=True
                )
                for keys, values in caches
            ]

        return Bound(run, lambda: outputs[0].transpose(1, 2).float().numpy())

    return bind


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    torch.set_grad_enabled(False)
    serve(torch.__version__, load)
