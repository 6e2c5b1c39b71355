"""Launches kernels that were compiled ahead of time and lie in the package: without Triton, without a compiler."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

import torch
from torch import Tensor

from teco_kernels import _host
from teco_kernels.triton_kernels._launch import Launch

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


class Compiled(NamedTuple):
    """A kernel of an archive: what the index says of it."""

    file: str
    name: str
    parameters: str
    block_threads: int
    shared_bytes: int
    multiples_of_16: tuple[int, ...]  # places among the arguments

    def fits(self, arguments: list[int | float]) -> bool:
        """Whether the arguments, addresses for tensors, are multiples of 16 and of 32 bits where it asks for it."""
        for place in self.multiples_of_16:
            if arguments[place] % 16:
                return False
        for kind, value in zip(self.parameters, arguments, strict=True):
            if kind == "i" and not -(2**31) <= value < 2**31:
                return False
        return True


def target_of(major: int, minor: int) -> str:
    """The target whose code a CUDA device of this compute capability runs.

    Within 8.x, code for 8.0 runs on all but 8.7, a system on a chip. From 9.0 on Triton compiles for one capability
    alone.
    """
    return "sm_80" if major == 8 and minor != 7 else f"sm_{major}{minor}"


def source_hash() -> str:
    """Of this package's Python files: kernels that were compiled from others do not belong to its launchers."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def driver_library() -> str:
    """What to open for the functions of the CUDA or HIP that torch is built for."""
    if torch.version.hip is None:
        return "libcuda.so.1"  # by this name the loader finds the one that torch has loaded
    return hip_library(Path(torch.__file__).parent / "lib")


def hip_library(beside_torch: Path) -> str:
    """HIP's library, of which torch's packages bring their own: a second one beside it would know none of its streams.

    The one that is mapped into this process; else that in a directory; else the loader's.
    """
    name = "libamdhip64.so"
    # An address, rights, an offset, a device and an inode, then the path.
    lines = [line.split(None, 5) for line in Path("/proc/self/maps").read_text().splitlines()]
    places = [Path(fields[5]) for fields in lines if len(fields) == 6]
    places += sorted(beside_torch.glob(f"{name}*"))
    return next((str(place) for place in places if place.name.startswith(name)), name)


class Embedded:
    """The kernels of an archive, for the devices of this process.

    Parameters
    ----------
    path : Path
        As `ahead_of_time.write` writes it.
    library : str
        The driver's; by default `driver_library`.

    Raises
    ------
    RuntimeError
        When the kernels were compiled from other sources than those of this package.
    """

    def __init__(self, path: Path, library: str | None = None) -> None:
        self._archive = ZipFile(path)
        self._is_hip = torch.version.hip is not None
        self._library = library or driver_library()
        self._kernels: dict[tuple[str, str], list[Compiled]] = {}
        index = json.loads(self._archive.read("index.json"))
        if index["source"] != source_hash():
            raise RuntimeError(
                f"{path}: expected kernels that were compiled from the files beside it, these are of others; "
                "build again with TECO_TRITON_AOT=1, or remove it"
            )
        for entry in index["kernels"]:
            self._kernels.setdefault((entry["target"], entry["key"]), []).append(Compiled(**entry["compiled"]))
        self._found: dict[tuple[Any, ...], list[Compiled]] = {}
        self._loaded: dict[tuple[int, str], _host.DriverKernel] = {}

    def has(self, launch: Launch, target: str) -> bool:
        """Whether there is a kernel of this instance."""
        return (target, key_of(launch)) in self._kernels

    def run(self, launch: Launch, target: str, device: int, stream: int) -> bool:
        """Launch on the current device, whose number and target these are; False when there is no such kernel."""
        arguments = [v.data_ptr() if isinstance(v, Tensor) else v for v in launch.args if v is not None]
        for compiled in self._candidates(launch, target):
            if compiled.fits(arguments):
                kernel = self._loaded.get((device, compiled.file)) or self._load(compiled, device)
                x, y, z = (*launch.grid, 1, 1)[:3]
                kernel.launch((x, y, z), stream, arguments)
                return True
        return False

    def _candidates(self, launch: Launch, target: str) -> list[Compiled]:
        """The kernels of the instance. Its key takes as long to make as a launch, and is kept."""
        types = tuple(v.dtype if isinstance(v, Tensor) else type(v) for v in launch.args)
        identity = (target, launch.kernel.__name__, launch.num_warps, types, *launch.constants.values())
        found = self._found.get(identity)
        if found is None:
            found = self._found[identity] = self._kernels.get((target, key_of(launch)), [])
        return found

    def _load(self, compiled: Compiled, device: int) -> _host.DriverKernel:
        kernel = _host.DriverKernel(
            self._library,
            self._is_hip,
            self._archive.read(compiled.file),
            compiled.name,
            compiled.parameters,
            compiled.block_threads,
            compiled.shared_bytes,
            device,
        )
        self._loaded[device, compiled.file] = kernel
        return kernel


@cache
def device_target(device: int) -> str:
    """The target of a device of this process."""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    return target_of(*torch.cuda.get_device_capability(device))


@cache
def open_archive(path: Path) -> Embedded:
    """The kernels of an archive of this package, whose index is read once."""
    return Embedded(path)


def missing(path: Path, operator: str, dtype: torch.dtype, case: Mapping[str, Any], device: int) -> str:
    """Why an archive alone is not enough for a case, of an operator that has kernels; else nothing."""
    from teco_kernels.triton_kernels.calls import calls_of, launches_of

    try:
        kernels = open_archive(path)
        launches = launches_of(calls_of(operator, dtype, **case))
    except (RuntimeError, ValueError) as error:  # another archive; more programs than a grid has
        return str(error)
    target = device_target(device)
    for launch in launches:
        if not kernels.has(launch, target):
            return (
                f"backend: {key_of(launch)} was not compiled for {target} ahead of time; "
                "pip install 'teco_kernels[triton]' to compile it when it is needed"
            )
    return ""


def runner(path: Path, otherwise: Callable[[Launch], None] | None) -> Callable[[Launch], None]:
    """What launches the kernels of an archive, and hands those that are not in it to `otherwise`."""
    kernels = open_archive(path)

    def run(launch: Launch) -> None:
        device = torch.cuda.current_device()
        target = device_target(device)
        if kernels.run(launch, target, device, torch.cuda.current_stream().cuda_stream):
            return
        if otherwise is None:
            raise RuntimeError(
                f"teco_kernels: expected a kernel compiled ahead of time for {key_of(launch)} on {target}, "
                "this build has none; pip install 'teco_kernels[triton]' to compile it when it is needed"
            )
        otherwise(launch)

    return run
