"""Time of `dense_matmul` over that of `sparse24_matmul`, the two in turns, with weights that no cache holds.

python bench/sparse24.py --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from teco_kernels.ops import DenseWeight, Sparse24Weight, dense_matmul, sparse24_matmul
from teco_kernels.testing.cases.matmul import random_sparse24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="in_features and out_features")
    parser.add_argument("--copies", type=int, default=6, help="of each weight, taking turns")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| values | rows | dense, ms | 2:4, ms | ratio |\n|---|---|---|---|---|")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = random_sparse24(options.size, options.size, torch.Generator().manual_seed(0), dtype)
        dense = [DenseWeight.from_tensor(weight) for _ in range(options.copies)]
        sparse = [Sparse24Weight.from_dense(weight) for _ in range(options.copies)]
        for rows in (1, 4, 16, 512):
            x, out = torch.randn(rows, options.size), torch.empty(rows, options.size)
            samples: tuple[list[float], list[float]] = ([], [])
            for turn in range(options.runs):
                copy = turn % options.copies
                samples[0].append(_seconds(dense_matmul, x, dense[copy], out))
                samples[1].append(_seconds(sparse24_matmul, x, sparse[copy], out))
            before, after = (1e3 * statistics.median(times) for times in samples)
            name = str(dtype).removeprefix("torch.")
            print(f"| {name} | {rows} | {before:.2f} | {after:.2f} | {before / after:.2f} |", flush=True)


def _seconds(matmul: Callable[..., Tensor], x: Tensor, weight: DenseWeight | Sparse24Weight, out: Tensor) -> float:
    start = time.perf_counter()
    matmul(x, weight, out=out)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
