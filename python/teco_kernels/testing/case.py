"""One case of an operator, and how it is held against the float64 reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

import torch

from teco_kernels.ops._reference import relative_error

#: Largest relative error that the numerics contract allows for an output of this dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call of an operator: its inputs, its reference, and what it costs.

    Attributes
    ----------
    operator : str
        Public name of the operator.
    params : Mapping
        Sizes and options that make up the case; they name it, and `supports` is asked with them.
    dtype : torch.dtype
        Dtype of the activations.
    make_inputs : callable
        ``make_inputs(generator) -> dict`` of keyword arguments, on the CPU.
    function, reference : callable
        Called with the inputs; return a tensor, a tuple of tensors, or None.
    mutates : tuple of str
        Inputs that the call writes; they are compared like outputs.
    max_error : float
        Largest allowed relative error of any floating output; other outputs must be equal.
    bytes_moved, flops : int
        What the call must read and write at the least, and the arithmetic it does.
    benchmark : bool
        Whether the case is large enough to be worth timing.
    arithmetic : {"fp32", "int8"}
        The kind of multiply-add that most of `flops` are, whose peak limits the call.
    """

    operator: str
    params: Mapping[str, Any]
    dtype: torch.dtype
    make_inputs: Callable[[torch.Generator], Inputs]
    function: Callable[..., Any]
    reference: Callable[..., Any]
    max_error: float
    bytes_moved: int
    flops: int
    mutates: tuple[str, ...] = ()
    benchmark: bool = False
    arithmetic: Literal["fp32", "int8"] = "fp32"

    @property
    def name(self) -> str:
        """Identifier of the case: operator, dtype and parameters."""
        params = "-".join(f"{key}={value}" for key, value in self.params.items())
        return f"{self.operator}-{str(self.dtype).removeprefix('torch.')}-{params}"

    @property
    def summary(self) -> str:
        """Dtype and parameters in a line for people."""
        return ", ".join((short_dtype(self.dtype), *_short_params(self.params)))

    def inputs(self, seed: int = 0) -> Inputs:
        """The keyword arguments of the call; the same for the same seed."""
        return self.make_inputs(torch.Generator().manual_seed(seed))

    def outputs(self, function: Callable[..., Any], inputs: Inputs, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Call `function` on a copy of the inputs, on this device, and collect all it returned and wrote."""
        inputs = map_tensors(copy.deepcopy(inputs), lambda tensor: tensor.to(device))
        result = function(**inputs)
        returned = () if result is None else result if isinstance(result, tuple) else (result,)
        named = {f"output {index}": tensor for index, tensor in enumerate(returned)}
        named |= {name: inputs[name] for name in self.mutates}
        return {name: tensor.cpu() for name, tensor in named.items()}


def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same with every tensor replaced, in weights, tuples and dicts too."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(map_tensors(item, function) for item in value)
    if isinstance(value, dict):
        return {name: map_tensors(item, function) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: map_tensors(getattr(value, field.name), function) for field in fields(value)}
        return replace(value, **parts)
    return value


def short_dtype(dtype: object) -> str:
    """Such as "fp32" for `torch.float32`."""
    name = str(dtype).removeprefix("torch.")
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float8_e4m3fn": "fp8"}.get(name, name)


_SHORT_NAMES = {"hidden_size": "hidden", "vocab_size": "vocab", "num_blocks": "blocks", "rotary_dim": "rotary"}


def _short_params(params: Mapping[str, Any]) -> Iterator[str]:
    for key, value in params.items():
        if key == "in_features":
            yield f"{value} to {params['out_features']}"
        elif key == "bits":
            yield f"{value}-bit"
        elif key == "cache_dtype":
            yield f"{short_dtype(value)} cache"
        elif key == "heads":
            yield f"{'/'.join(map(str, value))} heads"
        elif key in ("activation", "filters", "layout", "setup"):
            yield str(value)
        elif value is True:
            yield key
        elif key != "out_features" and value not in (False, None, "none"):
            yield f"{_SHORT_NAMES.get(key, key.removesuffix('_size'))} {value}"


@dataclass
class CaseResult:
    """Relative error of each output of a case, or what the call raised, or why there is no kernel for it."""

    case: Case
    errors: dict[str, float] = field(default_factory=dict)
    exception: str | None = None
    unsupported: str | None = None

    @property
    def ok(self) -> bool:
        """Whether every output is within the case's tolerance."""
        return self.exception is None and self.worst <= self.case.max_error

    @property
    def worst(self) -> float:
        """Largest error of any output."""
        return max(self.errors.values(), default=0.0)


def run_case(case: Case, seed: int = 0, device: str = "cpu") -> CaseResult:
    """Run the operator, on this device, and its reference, on the CPU, on the same inputs and compare all outputs."""
    inputs = case.inputs(seed)
    actual, expected = case.outputs(case.function, inputs, device), case.outputs(case.reference, inputs)
    result = CaseResult(case)
    for name, reference in expected.items():
        out = actual[name]
        if out.is_floating_point():
            result.errors[name] = relative_error(out, reference)
        else:
            result.errors[name] = 0.0 if torch.equal(out, reference.to(out.dtype)) else float("inf")
    return result
