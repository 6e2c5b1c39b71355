"""Which operator runs where, on what; asked before the call, so that an engine can choose without catching errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from teco_kernels import triton_kernels
from teco_kernels.ops import _library
from teco_kernels.ops.cache import ELEMENT_MAX
from teco_kernels.ops.packing import BITS, codes_per_period
from teco_kernels.ops.sparse24 import GROUP
from teco_kernels.ops.triton_backend import triton_device

#: Every backend of the package's design, compiled into this build or not.
BACKENDS = ("cpu", "cuda", "triton")

#: Largest head_dim that `paged_attention` takes.
MAX_HEAD_DIM = 512

_COLLECTIVES = ("all_reduce", "all_reduce_rms_norm", "all_gather", "reduce_scatter", "broadcast")
_FLOATING = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Support:
    """Whether a call would work, and why not; true in a condition when it would.

    Attributes
    ----------
    ok : bool
    reason : str
        Names what stands in the way and what is expected instead; empty when `ok`.
    """

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


def supports(op: str, *, backend: str, device: str | torch.device, dtype: torch.dtype, **case: Any) -> Support:
    """Tell whether an operator has a kernel for this case.

    Parameters
    ----------
    op : str
        Name of the operator, as it is exported.
    backend : {"cpu", "cuda", "triton"}
        Whose kernel is meant.
    device : str or torch.device
        Where the tensors are.
    dtype : torch.dtype
        Of the activations.
    **case
        Sizes and options by the names of the case table (``bits=4``, ``rotary_dim=64``, ...). Those that are not given
        are taken to be fine, those that do not matter to the operator are ignored. Where Triton is not installed, the
        kernel of the case must have been compiled ahead of time; what is not given is then as in most models, and torch
        is asked what the device is, which initialises CUDA in this process.

    Returns
    -------
    Support

    Examples
    --------
    >>> supports("gptq_matmul", backend="cpu", device="cpu", dtype=torch.float32, bits=4)
    Support(ok=True, reason='')
    >>> supports("gptq_matmul", backend="cpu", device="cpu", dtype=torch.float64).reason
    'dtype: expected float32, float16, bfloat16, got float64'
    """
    reason = (
        _operator_problem(op)
        or _backend_problem(op, backend)
        or _device_problem(backend, torch.device(device))
        or _OPERATORS[op](dtype, case)
        or (_triton_case_problem(op, torch.device(device), dtype, case) if backend == "triton" else "")
    )
    return Support(not reason, reason)


def operators() -> tuple[str, ...]:
    """Names of the operators of this version."""
    return tuple(_OPERATORS)


def _operator_problem(op: str) -> str:
    return "" if op in _OPERATORS else f"op: this version has no operator {op!r}; it has {', '.join(_OPERATORS)}"


def _backend_problem(op: str, backend: str) -> str:
    if backend not in BACKENDS:
        return f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}"
    if backend == "triton":
        return _triton_problem(op)
    if _library.has_kernel(op, backend):
        return ""
    return f"backend: no {backend} kernel of {op} is compiled into this build"


def _triton_problem(op: str) -> str:
    if op in _COLLECTIVES:
        return f"backend: there is no Triton kernel of {op}: ranks would have to map each other's GPU memory"
    if op not in triton_kernels.OPERATORS:
        return f"backend: there is no Triton kernel of {op}"
    if find_spec("triton") is None and not triton_kernels.is_embedded():
        return "backend: expected the package triton, or a build with Triton kernels compiled ahead of time"
    return ""


def _triton_case_problem(op: str, device: torch.device, dtype: torch.dtype, case: Mapping[str, Any]) -> str:
    if case.get("section_size"):
        return f"section_size: the Triton kernels sum no sections apart, got {case['section_size']}"
    if find_spec("triton") is not None:
        return ""
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton_kernels.not_embedded(op, dtype, case, index)


def _device_problem(backend: str, device: torch.device) -> str:
    on_cpu = (
        backend == "cpu"
        or (backend == "cuda" and _library.emulates_cuda())
        or (backend == "triton" and triton_device() == "cpu")
    )
    expected = "cpu" if on_cpu else "cuda"
    if device.type != expected:
        return f"device: backend {backend} works on {expected} tensors, got {device}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "device: torch finds no CUDA device"
    return ""


# One function per operator: "" when there is a kernel for the dtype and the case, else why not.
_Problem = Callable[[torch.dtype, Mapping[str, Any]], str]


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_problem(dtype: torch.dtype, case: Mapping[str, Any]) -> str:
    if dtype in _FLOATING:
        return ""
    return f"dtype: expected {', '.join(map(_name, _FLOATING))}, got {_name(dtype)}"


def _choice_problem(case: Mapping[str, Any], name: str, choices: tuple[Any, ...]) -> str:
    if name not in case or case[name] in choices:
        return ""
    return f"{name}: expected one of {', '.join(map(_name, choices))}, got {_name(case[name])}"


def _gptq_matmul(dtype: torch.dtype, case: Mapping[str, Any]) -> str:
    if reason := (
        _dtype_problem(dtype, case)
        or _choice_problem(case, "bits", BITS)
        or _choice_problem(case, "activation", ("exact", "int8"))
    ):
        return reason
    return _packing_problem(case, "in_features", "out_features")


def _packing_problem(case: Mapping[str, Any], *sizes: str) -> str:
    """Of a packed weight with so many inputs and outputs, whose `bits` are good."""
    bits = case.get("bits", 8)
    multiple = codes_per_period(bits)
    for size in sizes:  # codes along the inputs, zero points along the outputs
        if case.get(size, 0) % multiple:
            return f"{size}: expected a multiple of {multiple}, as {bits}-bit checkpoints pack them, got {case[size]}"
    if case.get("group_size", 1) < 1:
        return f"group_size: expected a positive number, got {case['group_size']}"
    return ""


def _dense_matmul(dtype: torch.dtype, case: Mapping[str, Any]) -> str:
    return _dtype_problem(dtype, case) or _choice_problem(case, "weight_dtype", _FLOATING)


def _embedding(dtype: torch.dtype, case: Mapping[str, Any]) -> str:
    """Of a packed weight when there are `bits`, else of a floating one."""
    reason = _dense_matmul(dtype, case) or _choice_problem(case, "bits", BITS)
    if reason or "bits" not in case:
        return reason
    return _packing_problem(case, "hidden_size", "vocab_size")


def _sparse24_matmul(dtype: torch.dtype, case: Mapping[str, Any]) -> str:
    if reason := _dense_matmul(dtype, case):
        return reason
    if case.get("in_features", 0) % GROUP:
        return f"in_features: expected a multiple of {GROUP}, got {case['in_features']}"
    return ""


def _rotary_embedding(dtype: torch.dtype, case: Mapping[str, Any]) -> str:
    if reason := _dtype_problem(dtype, case):
        return reason
    rotary_dim = case.get("rotary_dim", 0)
    if rotary_dim % 2 or rotary_dim > case.get("D", rotary_dim):
        return f"rotary_dim: expected an even number of at most D = {case.get('D', 'head_dim')}, got {rotary_dim}"
    return ""


def _sample(dtype: torch.dtype, case: Mapping[str, Any]) -> str:
    if reason := _dtype_problem(dtype, case):
        return reason
    vocab_size = case.get("vocab_size", 1)
    if not 1 <= vocab_size <= 1 << 22:
        return f"vocab_size: expected 1 to {1 << 22}, got {vocab_size}"
    return ""


def _paged_attention(dtype: torch.dtype, case: Mapping[str, Any]) -> str:
    if reason := _cache_problem(dtype, {"cache_dtype": case.get("cache_dtype", dtype)}):
        return reason
    if not 1 <= case.get("head_dim", 1) <= MAX_HEAD_DIM:
        return f"head_dim: expected 1 to {MAX_HEAD_DIM}, got {case['head_dim']}"
    num_heads, num_kv_heads = case.get("heads", (1, 1))
    if num_kv_heads < 1:
        return f"heads: expected at least one KV head, got {num_kv_heads}"
    if num_heads % num_kv_heads:
        return f"heads: expected query heads to be a multiple of the {num_kv_heads} KV heads, got {num_heads}"
    return ""


def _cache_problem(dtype: torch.dtype, case: Mapping[str, Any]) -> str:
    """Of operators that take a paged cache; `scale` is "none", "one" or "per_slot"."""
    if reason := _dtype_problem(dtype, case):
        return reason
    scaled = tuple(map(_name, ELEMENT_MAX))
    cache_dtype = _name(case.get("cache_dtype", dtype))
    if cache_dtype not in (*map(_name, _FLOATING), *scaled):
        return f"cache_dtype: expected {', '.join((*map(_name, _FLOATING), *scaled))}, got {cache_dtype}"
    if "scale" in case and (case["scale"] != "none") != (cache_dtype in scaled):
        return f"scale: a cache of {cache_dtype} {'needs one' if cache_dtype in scaled else 'has none'}"
    return ""


def _recycle_project(dtype: torch.dtype, case: Mapping[str, Any]) -> str:
    hidden_size = case.get("hidden_size", 0)
    return _any_weight(dtype, {**case, "in_features": 2 * hidden_size, "out_features": hidden_size})


def _any_weight(dtype: torch.dtype, case: Mapping[str, Any]) -> str:
    """Of operators that multiply by a weight of any kind: a quantised one when there are `bits`."""
    if reason := _choice_problem(case, "weight", ("plain", "packed", "gptq")):
        return reason
    return (_gptq_matmul if "bits" in case else _dense_matmul)(dtype, case)


def _any_dtype(dtype: torch.dtype, case: Mapping[str, Any]) -> str:
    return ""


_OPERATORS: dict[str, _Problem] = {
    "embedding": _embedding,
    "rms_norm": _dtype_problem,
    "fused_add_rms_norm": _dtype_problem,
    "silu_and_mul": _dtype_problem,
    "dense_matmul": _dense_matmul,
    "sparse24_matmul": _sparse24_matmul,
    "gptq_matmul": _gptq_matmul,
    "rotary_embedding": _rotary_embedding,
    "sample": _sample,
    "paged_attention": _paged_attention,
    "merge_attention_states": _dtype_problem,
    "reshape_and_cache": _cache_problem,
    "recycle_project": _recycle_project,
    "lm_head_argmax": _any_weight,
    "verify_recycled": _any_dtype,
    "verify_recycled_sampled": _sample,
    "copy_blocks": _any_dtype,
    "swap_blocks": _any_dtype,
    "all_reduce": _dtype_problem,
    "all_reduce_rms_norm": _dtype_problem,
    "reduce_scatter": _dtype_problem,
    "all_gather": _any_dtype,
    "broadcast": _any_dtype,
}
