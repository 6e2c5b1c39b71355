"""Compiles kernels without a GPU: every instance that `calls` need, for every target.

An instance is a kernel with the dtypes of its tensors and the values of its constants. It is compiled in two variants:
"aligned", for tensors that begin at multiples of 16 bytes, integers of 32 bits, and those integers multiples of 16 that
are so in the call; and "general", for all others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teco_kernels.triton_kernels import launchers
from teco_kernels.triton_kernels._launch import Launch, launch_with
from teco_kernels.triton_kernels.calls import calls

#: Architectures, by the names that docs and tables use.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
VARIANTS = ("aligned", "general")
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def argument_type(value: Any) -> str:
    """As the key of an instance has it: what a kernel is compiled for, whatever the value of an integer is."""
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    return "none" if value is None else "float" if isinstance(value, float) else "int"


def key_of(launch: Launch) -> str:
    """Names the instance that a launch needs."""
    types = ",".join(map(argument_type, launch.args))
    constants = ",".join(f"{name}={value}" for name, value in launch.constants.items())
    return f"{launch.kernel.__name__}({types}; {constants}; {launch.num_warps} warps)"


def is_multiple_of_16(value: Any) -> bool:
    """Whether code for multiples of 16 fits an argument."""
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


@dataclass(frozen=True)
class Instance:
    """A kernel to be compiled; `launch` is one that needs it."""

    launch: Launch

    @property
    def key(self) -> str:
        """Names it."""
        return key_of(self.launch)

    def parameters(self, variant: str) -> list[tuple[str, bool]]:
        """Of every argument that is passed at run time: its type, and whether it is a multiple of 16."""
        aligned, parameters = variant == "aligned", []
        for value in self.launch.args:
            kind = argument_type(value)
            if kind == "int":
                parameters.append(("i32" if aligned else "i64", aligned and is_multiple_of_16(value)))
            elif kind != "none":
                parameters.append(("fp32" if kind == "float" else kind, aligned and kind.startswith("*")))
        return parameters

    def compile(self, target: str, variant: str) -> Any:
        """Compile for a target; what Triton returns, with ``asm`` and ``metadata``."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.launch.kernel.arg_names
        signature: dict[str, str] = {}
        attributes: dict[tuple[int], list[list[Any]]] = {}
        constants: dict[str, Any] = dict(self.launch.constants)
        parameters = iter(self.parameters(variant))
        for index, name in enumerate(names):
            if name in constants or self.launch.args[index] is None:
                signature[name] = "constexpr"
                constants.setdefault(name, None)
                continue
            signature[name], multiple = next(parameters)
            if multiple:
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.launch.kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=self.launch.options)


def instances() -> list[Instance]:
    """What `calls` need, in their order."""
    found: dict[str, Instance] = {}

    def record(launch: Launch) -> None:
        found.setdefault(key_of(launch), Instance(launch))

    functions = launchers()
    launch_with(record)
    try:
        for name, arguments in calls():
            functions[name](*arguments)
    finally:
        launch_with(None)
    return list(found.values())


def kernels(instance: Instance, targets: list[str]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Both variants for these targets: an entry of the index, and the binary."""
    for target in targets:
        for variant in VARIANTS:
            compiled = instance.compile(target, variant)
            metadata = compiled.metadata
            entry = {
                "key": instance.key,
                "target": target,
                "variant": variant,
                "name": metadata.name,
                "parameters": instance.parameters(variant),
                "num_warps": metadata.num_warps,
                "warp_size": TARGETS[target][2],
                "shared": metadata.shared,
                "scratch": [metadata.global_scratch_size, metadata.profile_scratch_size],
            }
            yield json.loads(json.dumps(entry)), compiled.asm["cubin" if target.startswith("sm_") else "hsaco"]
