"""torch: `_weight_int4pack_mm_for_cpu`, on which torchao's and GPTQModel's 4-bit layers sit on a CPU."""

from __future__ import annotations

import sys

import torch
from problems import Array, Matmul
from protocol import Bind, Bound, serve


def bits_per_weight(problem: Matmul) -> float:
    return 4 + 2 * 8 * dtype.itemsize / problem.group_size


def load(problem: Matmul, copies: int) -> Bind:
    codes = torch.from_numpy(problem.codes).t().contiguous().int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.from_numpy(problem.scales)
    # A weight is scale * (code - 8) + zero.
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), dim=-1).to(dtype)
    weights = [(packed.clone(), scales_and_zeros.clone()) for _ in range(copies)]

    def bind(activations: Array) -> Bound:
        x = torch.from_numpy(activations).to(dtype)
        outputs: list[torch.Tensor] = []

        def run() -> None:
            outputs[:] = [torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, problem.group_size, s) for w, s in weights]

        return Bound(run, lambda: outputs[0].float().numpy())

    return bind


if __name__ == "__main__":
    dtype = getattr(torch, sys.argv[2])
    torch.set_num_threads(int(sys.argv[1]))
    serve(torch.__version__, load, bits_per_weight)
