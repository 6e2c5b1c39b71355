"""torch: `linear` by the dequantised weight, in fp32 (MKL, oneDNN) or bf16 (oneDNN): what not quantising costs."""

from __future__ import annotations

import sys

import torch
from problems import Array, Matmul
from protocol import Bind, Bound, serve


def bits_per_weight(problem: Matmul) -> float:
    return 8 * dtype.itemsize


def load(problem: Matmul, copies: int) -> Bind:
    # Codes less 8 times a scale have no more than 8 + 4 significant bits: bf16 rounds them.
    weight = torch.from_numpy(problem.dequantized()).t().to(dtype).contiguous()
    weights = [weight.clone() for _ in range(copies)]

    def bind(activations: Array) -> Bound:
        x = torch.from_numpy(activations).to(dtype)
        outputs: list[torch.Tensor] = []

        def run() -> None:
            outputs[:] = [torch.nn.functional.linear(x, weight) for weight in weights]

        return Bound(run, lambda: outputs[0].float().numpy(), weight.t().float().numpy())

    return bind


if __name__ == "__main__":
    dtype = getattr(torch, sys.argv[2])
    torch.set_num_threads(int(sys.argv[1]))
    torch.set_grad_enabled(False)
    serve(torch.__version__, load, bits_per_weight)
