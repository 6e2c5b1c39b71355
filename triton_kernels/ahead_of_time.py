"""Compiles kernels without a GPU: every instance that `calls` need, for every target.

An instance is a kernel with the dtypes of its tensors and the values of its constants. It is compiled in two variants:
"aligned", for tensors that begin at multiples of 16 bytes, integers of 32 bits, and those integers multiples of 16 that
are so in the call and are not `COUNTS`; and "general", for all others, with strides of 64 bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

from teco_kernels.triton_kernels._language import COUNTS
from teco_kernels.triton_kernels._launch import Launch
from teco_kernels.triton_kernels.calls import calls, launches_of
from teco_kernels.triton_kernels.embedded import Compiled, argument_type, is_multiple_of_16, key_of, source_hash

#: Architectures, by the names that docs and tables use.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
VARIANTS = ("aligned", "general")


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
        for name, value in zip(self.launch.kernel.arg_names, self.launch.args, strict=False):
            kind = argument_type(value)
            if kind == "int" and (variant != "ones" or name in COUNTS):
                # Sizes are of 32 bits, as they are just in time; strides count the elements of whole tensors.
                is_wide = not aligned and name.endswith("stride")
                is_multiple = aligned and name not in COUNTS and is_multiple_of_16(value)
                parameters.append(("i64" if is_wide else "i32", is_multiple))
            elif kind not in ("int", "none"):
                parameters.append(("fp32" if kind == "float" else kind, aligned and kind.startswith("*")))
        return parameters

    def takes(self, variant: str) -> tuple[str, tuple[int, ...]]:
        """The parameters as the launcher names them, and the places of those that are multiples of 16."""
        parameters = self.parameters(variant)
        letters = {"i32": "i", "i64": "l", "fp32": "f"}
        places = tuple(place for place, (_, is_multiple) in enumerate(parameters) if is_multiple)
        return "".join(letters.get(kind, "p") for kind, _ in parameters), places

    def compile(self, target: str, variant: str) -> Any:
        """Compile for a target; what Triton returns, with ``asm`` and ``metadata``.

        The variant "ones" has a constant 1 for every integer but `COUNTS`, as the just-in-time compiler makes of a 1.
        """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.launch.kernel.arg_names
        signature: dict[str, str] = {}
        attributes: dict[tuple[int], list[list[Any]]] = {}
        constants: dict[str, Any] = dict(self.launch.constants)
        parameters = iter(self.parameters(variant))
        for index, name in enumerate(names):
            if name not in constants:
                value = self.launch.args[index]
                if value is None:
                    constants[name] = None
                elif variant == "ones" and name not in COUNTS and argument_type(value) == "int":
                    constants[name] = 1
            if name in constants:
                signature[name] = "constexpr"
                continue
            signature[name], multiple = next(parameters)
            if multiple:
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.launch.kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=self.launch.options)


def instances() -> list[Instance]:
    """What `calls` need, in their order."""
    found: dict[str, Instance] = {}
    for launch in launches_of(calls()):
        found.setdefault(key_of(launch), Instance(launch))
    return list(found.values())


@dataclass(frozen=True)
class Kernel:
    """A compiled instance: its key, what the index says of it, and the binary."""

    key: str
    target: str
    compiled: Compiled
    image: bytes


def build(instance: Instance, target: str, variant: str) -> Kernel:
    """Compile an instance, and describe what its launch needs."""
    compiled = instance.compile(target, variant)
    metadata = compiled.metadata
    scratch = (metadata.global_scratch_size, metadata.profile_scratch_size)
    if any(scratch):
        raise ValueError(f"{instance.key}: expected a kernel without scratch memory, got {scratch} bytes")
    image: bytes = compiled.asm["cubin" if target.startswith("sm_") else "hsaco"]
    parameters, multiples = instance.takes(variant)
    described = Compiled(
        file=hashlib.sha256(image).hexdigest()[:32],
        name=metadata.name,
        parameters=parameters,
        block_threads=metadata.num_warps * TARGETS[target][2],
        shared_bytes=metadata.shared,
        multiples_of_16=multiples,
    )
    return Kernel(instance.key, target, described, image)


def write(kernels: Iterable[Kernel], path: Path) -> None:
    """Write the binaries and their index, in the order in which a launch is to look for one that fits."""
    index, written = [], set()
    with ZipFile(path, "w", ZIP_DEFLATED) as archive:
        for kernel in kernels:
            index.append({"key": kernel.key, "target": kernel.target, "compiled": kernel.compiled._asdict()})
            if kernel.compiled.file not in written:
                written.add(kernel.compiled.file)
                archive.writestr(kernel.compiled.file, kernel.image)
        archive.writestr("index.json", json.dumps({"source": source_hash(), "kernels": index}))
