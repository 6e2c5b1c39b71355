"""Cases of `recycle_project` and `lm_head_argmax`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from teco_kernels.ops import recycle
from teco_kernels.ops.dense import DenseWeight
from teco_kernels.ops.gptq import GPTQWeight
from teco_kernels.testing.case import TOLERANCE, Case, Inputs
from teco_kernels.testing.cases.matmul import INT8_TOLERANCE, random_checkpoint

# (tokens, vocabulary, hidden size): one token, ragged sizes, more rows than a tile, none.
SHAPES = [(1, 300, 192), (3, 57, 37), (33, 40, 72), (0, 20, 32)]
QUANTISED_SHAPES = [(1, 320, 192), (2, 320, 192), (9, 288, 96)]

# What a weight can be: quantised with so many bits, or its dtype and whether it is packed.
_Kind = dict[str, Any]
FLOATING: list[_Kind] = [
    {"weight": "packed", "weight_dtype": torch.float32},
    {"weight": "packed", "weight_dtype": torch.bfloat16},
    {"weight": "plain", "weight_dtype": torch.float32},
    {"weight": "plain", "weight_dtype": torch.float16},
]
QUANTISED: list[_Kind] = [
    {"weight": "gptq", "bits": bits, "group_size": 32, "activation": activation, "act_order": bits == 3}
    for bits in (2, 3, 4, 8)
    for activation in ("exact", "int8")
]


def _weight(
    kind: _Kind, in_features: int, out_features: int, generator: torch.Generator
) -> tuple[recycle.Weight, torch.Tensor]:
    """A weight of the kind, and its values ``[out_features, in_features]``."""
    if kind["weight"] == "gptq":
        checkpoint = random_checkpoint(
            in_features, out_features, kind["group_size"], kind["bits"], generator, act_order=kind["act_order"]
        )
        packed = GPTQWeight.from_checkpoint(**checkpoint, bias=torch.randn(out_features, generator=generator))
        return packed, packed.dequantize().t()
    values = torch.randn(out_features, in_features, generator=generator).to(kind["weight_dtype"])
    return (DenseWeight.from_tensor(values) if kind["weight"] == "packed" else values), values.float()


def _weight_bytes(kind: _Kind, in_features: int, out_features: int) -> int:
    if kind["weight"] != "gptq":
        return in_features * out_features * int(kind["weight_dtype"].itemsize)
    return (
        in_features * out_features * int(kind["bits"]) // 8 + -(-in_features // kind["group_size"]) * out_features * 4
    )


def _embedding(kind: _Kind, vocab_size: int, hidden_size: int, generator: torch.Generator) -> torch.Tensor | GPTQWeight:
    """Quantised to 8 bits where the projection is quantised, else in the dtype of that."""
    if kind["weight"] == "gptq":
        return GPTQWeight.from_checkpoint(**random_checkpoint(hidden_size, vocab_size, 32, 8, generator))
    return torch.randn(vocab_size, hidden_size, generator=generator).to(kind["weight_dtype"])


def _project_inputs(
    tokens: int, vocab_size: int, hidden_size: int, dtype: torch.dtype, kind: _Kind, generator: torch.Generator
) -> Inputs:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "hidden": 5 * normal(tokens, hidden_size),
        "token_ids": torch.randint(vocab_size, (tokens,), generator=generator),
        "embedding": _embedding(kind, vocab_size, hidden_size, generator),
        "hidden_norm": normal(hidden_size),
        "embedding_norm": normal(hidden_size),
        "projection": _weight(kind, 2 * hidden_size, hidden_size, generator)[0],
        "eps": 1e-5,
        "activation": kind.get("activation", "exact"),
    }


def _project_case(
    tokens: int, vocab_size: int, hidden_size: int, dtype: torch.dtype, kind: _Kind, benchmark: bool = False
) -> Case:
    int8 = kind.get("activation") == "int8"
    embedding_bytes = kind["weight_dtype"].itemsize if kind["weight"] != "gptq" else 1.125
    rows = int(tokens * hidden_size * (2 * dtype.itemsize + embedding_bytes))
    return Case(
        operator="recycle_project",
        params={"tokens": tokens, "vocab_size": vocab_size, "hidden_size": hidden_size, **kind},
        dtype=dtype,
        make_inputs=partial(_project_inputs, tokens, vocab_size, hidden_size, dtype, kind),
        function=recycle.recycle_project,
        reference=recycle.recycle_project_reference,
        max_error=INT8_TOLERANCE if int8 else TOLERANCE[dtype],
        bytes_moved=rows + _weight_bytes(kind, 2 * hidden_size, hidden_size),
        flops=4 * tokens * hidden_size * hidden_size,
        benchmark=benchmark,
        arithmetic="int8" if int8 else "fp32",
    )


def _argmax_inputs(
    tokens: int,
    vocab_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    kind: _Kind,
    logsumexp: bool,
    generator: torch.Generator,
) -> Inputs:
    """Hidden states that lean towards a token each, so far that rounding makes no other the largest.

    With `logsumexp` they are short enough for the other tokens to count too.
    """
    weight, values = _weight(kind, hidden_size, vocab_size, generator)
    towards = values[torch.randint(vocab_size, (tokens,), generator=generator)]
    hidden = torch.randn(tokens, hidden_size, generator=generator) + 4 * towards
    if logsumexp:
        hidden *= 8 / (values @ hidden.t()).amax(dim=0).unsqueeze(-1)
    inputs = {"hidden": hidden.to(dtype), "weight": weight, "activation": kind.get("activation", "exact")}
    return inputs | ({"logsumexp": torch.empty(tokens)} if logsumexp else {})


def _argmax_case(
    tokens: int,
    vocab_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    kind: _Kind,
    benchmark: bool = False,
    *,
    logsumexp: bool = False,
) -> Case:
    int8 = kind.get("activation") == "int8"
    options = {"logsumexp": True} if logsumexp else {}
    return Case(
        operator="lm_head_argmax",
        params={"tokens": tokens, "in_features": hidden_size, "out_features": vocab_size, **kind, **options},
        dtype=dtype,
        make_inputs=partial(_argmax_inputs, tokens, vocab_size, hidden_size, dtype, kind, logsumexp),
        function=recycle.lm_head_argmax,
        reference=recycle.lm_head_argmax_reference,
        max_error=INT8_TOLERANCE if int8 else TOLERANCE[torch.float32],  # the logit is fp32
        bytes_moved=tokens * (hidden_size * dtype.itemsize + 12) + _weight_bytes(kind, hidden_size, vocab_size),
        flops=2 * tokens * hidden_size * vocab_size,
        mutates=tuple(options),
        benchmark=benchmark,
        arithmetic="int8" if int8 else "fp32",
    )


def cases() -> Iterator[Case]:
    """Both operators over kinds of weights, shapes and dtypes; then the sizes of a model with 576 hidden features."""
    for make in (_project_case, _argmax_case):
        for dtype in TOLERANCE:
            for shape in SHAPES:
                for kind in FLOATING if dtype == torch.float32 else FLOATING[:1]:
                    yield make(*shape, dtype, kind)
            for kind in QUANTISED if dtype == torch.float32 else QUANTISED[-2:]:
                for shape in QUANTISED_SHAPES:
                    yield make(*shape, dtype, kind)
        for tokens in (1, 4):
            for kind in (FLOATING[0], FLOATING[2], QUANTISED[-1]):
                yield make(tokens, 49152, 576, torch.float32, kind, True)
    for dtype in TOLERANCE:
        for kind in (FLOATING[0], *QUANTISED[-2:]):
            for shape in QUANTISED_SHAPES if kind["weight"] == "gptq" else SHAPES:
                yield _argmax_case(*shape, dtype, kind, logsumexp=True)
    yield _argmax_case(1, 8192, 576, torch.float32, QUANTISED[-1], True, logsumexp=True)
