"""Calls whose kernels are looked at one by one: for bugs planted in their PTX, and conflicts of banks."""

from __future__ import annotations

from collections.abc import Callable

import torch

import teco_kernels as tk
from teco_kernels.testing.cases.matmul import random_checkpoint


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def _dense_matmul() -> torch.Tensor:
    """Three steps of the pipeline, rows and columns that do not fill their tiles."""
    return tk.dense_matmul(_random(40, 192), tk.DenseWeight.from_tensor(_random(72, 192, seed=1)))


def _gptq_matmul(rows: int, activation: str = "exact") -> torch.Tensor:
    checkpoint = random_checkpoint(256, 72, 32, 4, torch.Generator().manual_seed(0))
    weight = tk.GPTQWeight.from_checkpoint(**checkpoint)
    return tk.gptq_matmul(_random(rows, 256), weight, activation=activation)  # type: ignore[arg-type]


def _decode() -> torch.Tensor:
    """Two sequences, one with its keys in two splits."""
    keys, values = (_random(24, 16, 2, 64, seed=seed) for seed in (1, 2))
    lengths = torch.tensor([300, 37], dtype=torch.int32)
    table = torch.stack([torch.arange(19), torch.arange(19) + 5]).int()
    return tk.paged_attention(_random(2, 4, 64), keys, values, table, lengths)


def _prefill() -> torch.Tensor:
    """Two sequences of whole tiles and of less than one."""
    keys, values = (_random(8, 16, 2, 64, seed=seed) for seed in (1, 2))
    starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, 40, 47], [64, 30]))
    table = torch.stack([torch.arange(4), torch.arange(4) + 4]).int()
    return tk.paged_attention(_random(47, 4, 64), keys, values, table, lengths, starts)


#: In fp16, by what they are called in tables.
CALLS: dict[str, Callable[[], torch.Tensor]] = {
    "dense_matmul, 40 rows": _dense_matmul,
    "gptq_matmul, 1 row": lambda: _gptq_matmul(1),
    "gptq_matmul, 8 rows": lambda: _gptq_matmul(8),
    "gptq_matmul, 8 rows, int8": lambda: _gptq_matmul(8, "int8"),
    "gptq_matmul, 40 rows": lambda: _gptq_matmul(40),
    "paged_attention, decode": _decode,
    "paged_attention, prefill": _prefill,
    "rms_norm": lambda: tk.rms_norm(_random(3, 512), _random(512, seed=1), 1e-6),
}
