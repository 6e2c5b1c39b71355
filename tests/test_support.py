"""supports() says what is so: true where the call works, false where it raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import teco_kernels as tk
from teco_kernels.ops.support import BACKENDS, operators
from teco_kernels.testing import Case, all_cases
from teco_kernels.testing.cases.matmul import random_checkpoint

CASES = [case for case in all_cases() if not case.benchmark]


def test_every_operator_of_the_table_is_known() -> None:
    assert {case.operator for case in all_cases()} == set(operators())
    assert set(operators()) <= set(tk.__all__)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_supported_cases_run(case: Case) -> None:
    assert tk.supports(case.operator, backend="cpu", device="cpu", dtype=case.dtype, **case.params) == tk.Support(True)
    case.function(**case.inputs())


def test_benchmark_cases_are_supported() -> None:
    for case in all_cases():
        assert tk.supports(case.operator, backend="cpu", device="cpu", dtype=case.dtype, **case.params)


@pytest.mark.parametrize(
    "op",
    [
        op
        for op in operators()
        if op not in ("copy_blocks", "swap_blocks", "verify_recycled", "all_gather", "broadcast")
    ],
)
def test_float64_is_refused(op: str) -> None:
    support = tk.supports(op, backend="cpu", device="cpu", dtype=torch.float64)
    assert not support
    assert support.reason == "dtype: expected float32, float16, bfloat16, got float64"
    case = next(case for case in CASES if case.operator == op and case.dtype == torch.float32)
    inputs = {name: _as_float64(value) for name, value in case.inputs().items()}
    with pytest.raises((TypeError, ValueError)):
        case.function(**inputs)


def _as_float64(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _gptq(bits: int, out_features: int = 32) -> tk.GPTQWeight:
    words = {"qweight": (64 * bits // 32, out_features), "qzeros": (2, out_features * bits // 32)}
    tensors = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in words.items()}
    return tk.GPTQWeight.from_checkpoint(**tensors, scales=torch.ones(2, out_features), bits=bits)


def _gptq_activation() -> None:
    checkpoint = random_checkpoint(64, 32, 32, 4, torch.Generator().manual_seed(0))
    tk.gptq_matmul(torch.ones(1, 64), tk.GPTQWeight.from_checkpoint(**checkpoint), activation="int4")  # type: ignore[arg-type]


def _dense(dtype: torch.dtype) -> None:
    tk.dense_matmul(torch.ones(1, 32), tk.DenseWeight.from_tensor(torch.ones(16, 32).to(dtype)))


def _embedding(weight: torch.Tensor | tk.GPTQWeight) -> None:
    tk.embedding(torch.zeros(1, dtype=torch.int64), weight)


def _sparse24(in_features: int) -> None:
    tk.sparse24_matmul(torch.ones(1, in_features), tk.Sparse24Weight.from_dense(torch.zeros(16, in_features)))


def _rotary(D: int, rotary_dim: int) -> None:
    heads = torch.ones(1, 1, D)
    tk.rotary_embedding(torch.zeros(1, dtype=torch.int64), heads, heads.clone(), torch.ones(4, rotary_dim))


def _attention(heads: tuple[int, int] = (2, 1), head_dim: int = 8, cache_dtype: torch.dtype = torch.float32) -> None:
    cache = torch.zeros(2, 4, heads[1], head_dim).to(cache_dtype)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    tk.paged_attention(torch.ones(1, heads[0], head_dim), cache, cache.clone(), table, lengths)


def _cache(dtype: torch.dtype, scale: float | None) -> None:
    cache = torch.zeros(2, 4, 1, 8).to(dtype)
    tk.reshape_and_cache(
        torch.ones(1, 1, 8),
        torch.ones(1, 1, 8),
        cache,
        cache.clone(),
        torch.zeros(1, dtype=torch.int64),
        key_scale=scale,
        value_scale=scale,
    )


# (operator, case, a call of it, word of the reason)
UNSUPPORTED: list[tuple[str, dict[str, Any], Any, str]] = [
    ("gptq_matmul", {"bits": 5}, lambda: _gptq(5), "bits"),
    ("gptq_matmul", {"bits": 4, "out_features": 20}, lambda: _gptq(4, 20), "out_features"),
    ("gptq_matmul", {"bits": 3, "out_features": 48}, lambda: _gptq(3, 48), "out_features"),
    ("gptq_matmul", {"bits": 2, "out_features": 24}, lambda: _gptq(2, 24), "out_features"),
    ("gptq_matmul", {"activation": "int4"}, _gptq_activation, "activation"),
    ("embedding", {"weight_dtype": torch.int8}, lambda: _embedding(torch.zeros(8, 4).to(torch.int8)), "weight_dtype"),
    ("embedding", {"bits": 5}, lambda: _embedding(_gptq(5)), "bits"),
    ("embedding", {"bits": 3, "vocab_size": 48}, lambda: _embedding(_gptq(3, 48)), "vocab_size"),
    ("dense_matmul", {"weight_dtype": torch.int8}, lambda: _dense(torch.int8), "weight_dtype"),
    ("sparse24_matmul", {"in_features": 30}, lambda: _sparse24(30), "in_features"),
    ("rotary_embedding", {"D": 8, "rotary_dim": 3}, lambda: _rotary(8, 3), "rotary_dim"),
    ("rotary_embedding", {"D": 8, "rotary_dim": 16}, lambda: _rotary(8, 16), "rotary_dim"),
    ("sample", {"vocab_size": 0}, lambda: tk.sample(torch.ones(1, 0), seed=0, offset=0), "vocab_size"),
    (
        "sample",
        {"vocab_size": (1 << 22) + 1},
        lambda: tk.sample(torch.ones(1, (1 << 22) + 1), seed=0, offset=0),
        "vocab_size",
    ),
    ("paged_attention", {"cache_dtype": "int16"}, lambda: _attention(cache_dtype=torch.int16), "cache_dtype"),
    ("paged_attention", {"head_dim": 513}, lambda: _attention(head_dim=513), "head_dim"),
    ("paged_attention", {"heads": (3, 2)}, lambda: _attention(heads=(3, 2)), "heads"),
    ("paged_attention", {"heads": (3, 0)}, lambda: _attention(heads=(3, 0)), "heads"),
    ("reshape_and_cache", {"cache_dtype": "float64"}, lambda: _cache(torch.float64, None), "cache_dtype"),
    ("reshape_and_cache", {"cache_dtype": "int8", "scale": "none"}, lambda: _cache(torch.int8, None), "scale"),
    ("reshape_and_cache", {"cache_dtype": "float16", "scale": "one"}, lambda: _cache(torch.float16, 1.0), "scale"),
]


@pytest.mark.parametrize(("op", "case", "call", "word"), UNSUPPORTED, ids=lambda value: str(value)[:40])
def test_unsupported_cases_raise(op: str, case: dict[str, Any], call: Any, word: str) -> None:
    support = tk.supports(op, backend="cpu", device="cpu", dtype=torch.float32, **case)
    assert not support.ok
    assert support.reason.startswith(f"{word}: ")
    with pytest.raises((ValueError, TypeError)):
        call()


def test_backends_and_devices() -> None:
    def ask(op: str = "rms_norm", backend: str = "cpu", device: str = "cpu") -> str:
        return tk.supports(op, backend=backend, device=device, dtype=torch.float32).reason

    assert ask() == ""
    assert "no operator 'rms_morn'; it has embedding, rms_norm" in ask(op="rms_morn")
    assert ask(backend="metal") == f"backend: expected one of {', '.join(BACKENDS)}, got 'metal'"
    assert ask(device="cuda:1") == "device: backend cpu works on cpu tensors, got cuda:1"
    assert ask(backend="cuda", device="cuda") == "backend: no cuda kernel of rms_norm is compiled into this build"
    assert ask(op="all_reduce", backend="triton", device="cuda").startswith(
        "backend: there is no Triton kernel of all_r"
    )
