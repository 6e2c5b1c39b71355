"""Cases of `embedding`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from teco_kernels.ops import embeddings
from teco_kernels.ops.gptq import GPTQWeight
from teco_kernels.ops.packing import BITS
from teco_kernels.testing.case import TOLERANCE, Case, Inputs
from teco_kernels.testing.cases.matmul import random_checkpoint, random_minima

# (tokens, vocabulary, hidden size): a decode step, a ragged tail, an empty batch, a prefill.
SHAPES = [(1, 300, 576), (3, 7, 37), (0, 5, 64), (2048, 32000, 1024)]


def _inputs(
    tokens: int,
    vocab_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    generator: torch.Generator,
) -> Inputs:
    return {
        "token_ids": torch.randint(vocab_size, (tokens,), generator=generator),
        "weight": torch.randn(vocab_size, hidden_size, generator=generator).to(weight_dtype),
        "dtype": dtype,
    }


def _part_of(make_inputs: Callable[[torch.Generator], Inputs], vocab_size: int, generator: torch.Generator) -> Inputs:
    """The weight as the middle third of a vocabulary: most tokens are of the others."""
    inputs = make_inputs(generator)
    token_ids = torch.randint(3 * vocab_size, inputs["token_ids"].shape, generator=generator)
    return inputs | {"token_ids": token_ids, "first_token": vocab_size}


def _part_case(case: Case) -> Case:
    params = {**case.params, "part": True}
    return replace(case, params=params, make_inputs=partial(_part_of, case.make_inputs, case.params["vocab_size"]))


def _packed_inputs(
    tokens: int,
    vocab_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    minimum: bool,
    options: dict[str, Any],
    generator: torch.Generator,
) -> Inputs:
    make = GPTQWeight.from_codes if minimum else GPTQWeight.from_checkpoint
    tensors = (random_minima if minimum else random_checkpoint)(hidden_size, vocab_size, **options, generator=generator)
    return {
        "token_ids": torch.randint(vocab_size, (tokens,), generator=generator),
        "weight": make(**tensors),
        "dtype": dtype,
    }


def _packed_case(
    tokens: int,
    vocab_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    benchmark: bool = False,
    minimum: bool = False,
    **options: Any,
) -> Case:
    groups = -(-hidden_size // options["group_size"])
    row_bytes = hidden_size * options["bits"] // 8 + groups * 4
    return Case(
        operator="embedding",
        params={
            "tokens": tokens,
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            **({"minimum": True} if minimum else {}),
            **options,
        },
        dtype=dtype,
        make_inputs=partial(_packed_inputs, tokens, vocab_size, hidden_size, dtype, minimum, options),
        function=embeddings.embedding,
        reference=embeddings.embedding_reference,
        max_error=TOLERANCE[dtype],
        bytes_moved=tokens * (hidden_size * dtype.itemsize + row_bytes),
        flops=0,
        benchmark=benchmark,
    )


def _dense_case(tokens: int, vocab_size: int, hidden_size: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> Case:
    return Case(
        operator="embedding",
        params={
            "tokens": tokens,
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "weight_dtype": weight_dtype,
        },
        dtype=dtype,
        make_inputs=partial(_inputs, tokens, vocab_size, hidden_size, dtype, weight_dtype),
        function=embeddings.embedding,
        reference=embeddings.embedding_reference,
        max_error=TOLERANCE[dtype],
        bytes_moved=tokens * hidden_size * (dtype.itemsize + weight_dtype.itemsize),
        flops=0,
        benchmark=tokens >= 512 and dtype == torch.float32 and weight_dtype == torch.float16,
    )


def cases() -> Iterator[Case]:
    """All shapes, each dtype from each dtype of weight; then packed weights; parts of a vocabulary."""
    for dtype in TOLERANCE:
        for weight_dtype in TOLERANCE:
            for sizes in SHAPES:
                yield _dense_case(*sizes, dtype, weight_dtype)
        yield _part_case(_dense_case(20, 7, 37, dtype, torch.float16))
    for bits in BITS:
        vocab_size = 200 if bits >= 4 else 224  # the last panel is filled up
        for dtype in TOLERANCE:
            yield _packed_case(5, vocab_size, 576, dtype, bits=bits, group_size=64)
        # One group, and groups that fill no block; inputs of a group from all over.
        for group_size in (576, 24):
            yield _packed_case(5, vocab_size, 576, torch.float32, bits=bits, group_size=group_size)
        yield _packed_case(5, vocab_size, 576, torch.float16, bits=bits, group_size=64, act_order=True)
        yield _packed_case(5, vocab_size, 576, torch.float32, minimum=True, bits=bits, group_size=32)
    yield _packed_case(0, 200, 576, torch.float32, bits=8, group_size=64)
    for bits in BITS:
        yield _part_case(_packed_case(20, 224, 576, torch.float16, bits=bits, group_size=64, act_order=True))
    yield _packed_case(2048, 32000, 1024, torch.float32, True, bits=8, group_size=64)
