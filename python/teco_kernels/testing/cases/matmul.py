"""Cases of `dense_matmul`, `sparse24_matmul` and `gptq_matmul`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from teco_kernels.ops import dense, gptq, sparse24
from teco_kernels.ops.packing import BITS, pack_zeros
from teco_kernels.testing.case import TOLERANCE, Case, Inputs

#: Largest relative error with activations quantised to 8 bits.
INT8_TOLERANCE = 1.5e-2

# (rows, in_features, out_features): one row, ragged sizes, more rows than a tile, no rows, no inputs, no outputs.
DENSE_SHAPES = [(1, 576, 192), (5, 37, 19), (33, 300, 72), (0, 64, 32), (3, 0, 32), (3, 64, 0)]
# Groups that fill no block, and the same.
SPARSE24_SHAPES = [(1, 576, 192), (5, 44, 19), (33, 300, 72), (0, 64, 32), (3, 0, 32), (3, 64, 0)]
BENCH_ROWS = (1, 4, 16, 512)


def random_checkpoint(
    in_features: int,
    out_features: int,
    group_size: int,
    bits: int,
    generator: torch.Generator,
    *,
    symmetric: bool = False,
    act_order: bool = False,
) -> dict[str, Any]:
    """Tensors of a GPTQ checkpoint (v1) with random codes, as `GPTQWeight.from_checkpoint` takes them.

    Zero points lie around the middle, as a quantizer's do: far off, sums would be small differences of large terms.
    """

    def words(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, (rows, columns), generator=generator, dtype=torch.int64).to(torch.int32)

    num_groups = -(-in_features // group_size)
    zeros = torch.full((num_groups, out_features), 2 ** (bits - 1))
    if not symmetric:
        zeros += torch.randint(-1, 2, zeros.shape, generator=generator)
    groups = torch.arange(in_features, dtype=torch.int32) // group_size
    return {
        "qweight": words(in_features * bits // 32, out_features),
        "qzeros": pack_zeros(zeros, bits),
        "scales": (0.5 + torch.rand(num_groups, out_features, generator=generator)).div(2**bits).half(),
        "g_idx": groups[torch.randperm(in_features, generator=generator)] if act_order else groups,
        "bits": bits,
    }


def _dense_inputs(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype, bias: bool, generator: torch.Generator
) -> Inputs:
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    offset = torch.randn(out_features, generator=generator) if bias else None
    x = torch.randn(rows, in_features, generator=generator).to(dtype)
    return {"x": x, "weight": dense.DenseWeight.from_tensor(weight, offset)}


def random_sparse24(
    out_features: int, in_features: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A dense weight, two of every four inputs of an output being other than 0, at random places."""
    weight = torch.randn(out_features, in_features // 4, 4, generator=generator)
    lowest = torch.rand(weight.shape, generator=generator).argsort(dim=-1)[..., :2]
    return weight.scatter_(-1, lowest, 0.0).flatten(1).to(dtype)


def _sparse24_inputs(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype, bias: bool, generator: torch.Generator
) -> Inputs:
    weight = random_sparse24(out_features, in_features, generator, dtype)
    offset = torch.randn(out_features, generator=generator) if bias else None
    x = torch.randn(rows, in_features, generator=generator).to(dtype)
    return {"x": x, "weight": sparse24.Sparse24Weight.from_dense(weight, offset)}


def random_minima(
    in_features: int, out_features: int, group_size: int, bits: int, generator: torch.Generator
) -> dict[str, Any]:
    """Random codes with a minimum per group that is no multiple of its scale, as `GPTQWeight.from_codes` takes them."""
    num_groups = -(-in_features // group_size)
    scales = (0.5 + torch.rand(num_groups, out_features, generator=generator)).div(2**bits).half()
    middle = 2 ** (bits - 1) - 0.5 + torch.rand(scales.shape, generator=generator)
    return {
        "codes": torch.randint(2**bits, (in_features, out_features), generator=generator, dtype=torch.uint8),
        "scales": scales,
        "minimum": (-middle * scales).half(),
        "g_idx": torch.arange(in_features, dtype=torch.int32) // group_size,
        "bits": bits,
    }


def _gptq_inputs(
    rows: int, dtype: torch.dtype, activation: str, minimum: bool, options: dict[str, Any], g: torch.Generator
) -> Inputs:
    tensors = (random_minima if minimum else random_checkpoint)(**options, generator=g)
    make = gptq.GPTQWeight.from_codes if minimum else gptq.GPTQWeight.from_checkpoint
    bias = torch.randn(options["out_features"], generator=g)
    x = torch.randn(rows, options["in_features"], generator=g).to(dtype)
    return {"x": x, "weight": make(**tensors, bias=bias), "activation": activation}


def _dense_case(rows: int, in_features: int, out_features: int, dtype: torch.dtype, benchmark: bool = False) -> Case:
    return Case(
        operator="dense_matmul",
        params={"rows": rows, "in_features": in_features, "out_features": out_features},
        dtype=dtype,
        make_inputs=partial(_dense_inputs, rows, in_features, out_features, dtype, rows % 2 == 1),
        function=dense.dense_matmul,
        reference=dense.dense_matmul_reference,
        max_error=TOLERANCE[dtype],
        bytes_moved=(in_features * out_features + rows * (in_features + out_features)) * dtype.itemsize,
        flops=2 * rows * in_features * out_features,
        benchmark=benchmark,
    )


def _sparse24_case(rows: int, in_features: int, out_features: int, dtype: torch.dtype, benchmark: bool = False) -> Case:
    weight_bytes = in_features * out_features // 2 * dtype.itemsize + in_features * out_features // 8
    return Case(
        operator="sparse24_matmul",
        params={"rows": rows, "in_features": in_features, "out_features": out_features},
        dtype=dtype,
        make_inputs=partial(_sparse24_inputs, rows, in_features, out_features, dtype, rows % 2 == 1),
        function=sparse24.sparse24_matmul,
        reference=dense.dense_matmul_reference,
        max_error=TOLERANCE[dtype],
        bytes_moved=weight_bytes + rows * (in_features + out_features) * dtype.itemsize,
        flops=rows * in_features * out_features,
        benchmark=benchmark,
    )


def _gptq_case(
    rows: int, dtype: torch.dtype, activation: str, benchmark: bool = False, minimum: bool = False, **options: Any
) -> Case:
    in_features, out_features, bits = options["in_features"], options["out_features"], options["bits"]
    num_groups = -(-in_features // options["group_size"])
    weight_bytes = in_features * out_features * bits // 8 + num_groups * out_features * 4
    return Case(
        operator="gptq_matmul",
        params={"rows": rows, "activation": activation, **({"minimum": True} if minimum else {}), **options},
        dtype=dtype,
        make_inputs=partial(_gptq_inputs, rows, dtype, activation, minimum, options),
        function=gptq.gptq_matmul,
        reference=gptq.gptq_matmul_reference,
        max_error=INT8_TOLERANCE if activation == "int8" else TOLERANCE[dtype],
        bytes_moved=weight_bytes + rows * (in_features + out_features) * dtype.itemsize,
        flops=2 * rows * in_features * out_features,
        benchmark=benchmark,
        arithmetic="int8" if activation == "int8" else "fp32",
    )


def cases() -> Iterator[Case]:
    """Shapes, bit widths, group sizes, orders and dtypes; then the shapes worth timing."""
    for dtype in TOLERANCE:
        for shape in DENSE_SHAPES:
            yield _dense_case(*shape, dtype)
        for shape in SPARSE24_SHAPES:
            yield _sparse24_case(*shape, dtype)
    for activation in ("exact", "int8"):
        for bits in BITS:
            options: dict[str, Any] = {"in_features": 576, "out_features": 200 if bits >= 4 else 224, "bits": bits}
            for rows in (1, 2, 5, 8, 9, 33):
                yield _gptq_case(rows, torch.float32, activation, **options, group_size=64)
            for group_size in (32, 128, 576, 24):
                yield _gptq_case(3, torch.float32, activation, **options, group_size=group_size)
            yield _gptq_case(3, torch.float32, activation, **options, group_size=64, symmetric=True)
            yield _gptq_case(3, torch.float32, activation, **options, group_size=64, act_order=True)
            for rows in (1, 8, 33):
                yield _gptq_case(rows, torch.float32, activation, minimum=True, **options, group_size=32)
            yield _gptq_case(0, torch.float32, activation, **options, group_size=64)
            for dtype in (torch.float16, torch.bfloat16):
                yield _gptq_case(3, dtype, activation, **options, group_size=64)
                if activation == "exact":
                    yield _gptq_case(70, dtype, activation, minimum=bits == 8, **options, group_size=32)
    # For many rows of 16 bits a backend may have other kernels.
    options = {"in_features": 160, "out_features": 72, "bits": 4}
    for dtype in (torch.float16, torch.bfloat16):
        yield _dense_case(33, 160, 72, dtype)
        yield _gptq_case(33, dtype, "exact", **options, group_size=32)
        yield _gptq_case(33, dtype, "exact", **options, group_size=24)
        yield _gptq_case(33, dtype, "exact", **options, group_size=32, act_order=True)
    for rows in BENCH_ROWS:
        yield _dense_case(rows, 4096, 4096, torch.float32, benchmark=True)
        yield _sparse24_case(rows, 4096, 4096, torch.float32, benchmark=True)
        for activation in ("exact", "int8"):
            yield _gptq_case(
                rows, torch.float32, activation, True, in_features=4096, out_features=4096, bits=4, group_size=128
            )
    yield _gptq_case(
        1, torch.float32, "int8", True, minimum=True, in_features=4096, out_features=4096, bits=4, group_size=32
    )
    for bits in (2, 3):
        yield _gptq_case(1, torch.float32, "int8", True, in_features=4096, out_features=4096, bits=bits, group_size=128)
    for rows in (1, 16):
        yield _gptq_case(rows, torch.float32, "int8", True, in_features=576, out_features=49152, bits=8, group_size=64)
