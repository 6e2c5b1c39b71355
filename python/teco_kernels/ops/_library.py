"""Loads the compiled operators and calls them; the only module that touches `torch.ops`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_LIBRARY = Path(__file__).resolve().parent.parent / "_C.so"
# By the word that the text of an error from C++ begins with: makes the exception of the operator's name and the rest.
_EXCEPTIONS: dict[str, Callable[[str, str], BaseException]] = {
    "ValueError": lambda name, message: ValueError(f"{name}: {message}"),
    "TypeError": lambda name, message: TypeError(f"{name}: {message}"),
    "MemoryError": lambda name, message: MemoryError(f"{name}: {message}"),
}

if not _LIBRARY.exists():
    raise ImportError(
        f"teco_kernels: {_LIBRARY.name} is not compiled; run `pip install .` (or `-e .`) in the source tree"
    )
torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]


def register_exception(word: str, make: Callable[[str, str], BaseException]) -> None:
    """Let errors from C++ whose text begins with ``word:`` be raised as what `make` makes of operator and message."""
    _EXCEPTIONS[word] = make


def _translate(error: RuntimeError, name: str) -> BaseException:
    """The exception that a failed check in C++ stands for (see csrc/ops/checks.h)."""
    if isinstance(error, NotImplementedError):
        return ValueError(
            f"{name}: the arguments are on devices for which there is no kernel, or not all on one device"
        )
    kind, _, message = str(error).partition(": ")
    make = _EXCEPTIONS.get(kind)
    return make(name, message.splitlines()[0]) if make else error


def operator(name: str, overload: str = "default") -> Callable[..., Any]:
    """The compiled operator `name`, with check failures raised as the exceptions they stand for."""
    packet = getattr(getattr(torch.ops.teco_kernels, name), overload)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return packet(*args)
        if _recorder is not None:
            _recorder(packet, args)
        try:
            return packet(*args)
        except RuntimeError as error:
            translated = _translate(error, name)
            raise translated from (None if translated is not error else error.__cause__)

    call.__name__ = name
    return call


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a shape-only kernel of `name`, which first checks that all tensors are on one device."""

    def decorate(fake: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any) -> Any:
            devices = {arg.device for arg in args if isinstance(arg, torch.Tensor)}
            if len(devices) > 1:
                raise RuntimeError(f"ValueError: expected all tensors on one device, got {sorted(map(str, devices))}")
            return fake(*args)

        torch.library.register_fake(f"teco_kernels::{name}", checked)
        return fake

    return decorate


def register_fake_writing_only(*names: str) -> None:
    """Register the fake kernel of operators that only write into their arguments."""
    for name in names:
        register_fake(name)(lambda *args: None)


# Sees (operator, arguments) of every eager call; the tests use it to run opcheck on what the public functions pass.
_recorder: Callable[[Any, tuple[Any, ...]], None] | None = None


def record_calls(recorder: Callable[[Any, tuple[Any, ...]], None] | None) -> None:
    """Send every eager operator call to `recorder` before it runs; None stops it."""
    global _recorder
    _recorder = recorder


def has_kernel(name: str, backend: str) -> bool:
    """Whether there is a kernel of `name` for this backend ("cpu", "cuda"), compiled into the library or emulated."""
    if backend == "cuda":
        return name in str(_cuda_operators()).split()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"teco_kernels::{name}", backend.upper())


_kernel_calls = operator("kernel_calls")


def kernel_calls(name: str) -> int:
    """How often the kernel of operator `name` has run in this process, compiled graphs and replayed plans included.

    What shows that an engine uses these kernels and not its own. Counted are dense_matmul, gptq_matmul,
    paged_attention, reshape_and_cache and rotary_embedding; ValueError for others.
    """
    return int(_kernel_calls(name))


_cpu_isa = operator("cpu_isa")
_cpu_isa_choices = operator("cpu_isa_choices")
_cpu_isa_compiled = operator("cpu_isa_compiled")
_compiler = operator("compiler")
_cuda_operators = operator("cuda_operators")
_emulate_cuda = operator("_emulate_cuda")
_emulation: Path | None = None


def cpu_isa() -> str:
    """Name of the CPU instruction set in use; ValueError when TECO_CPU_ISA names one that is not available."""
    return str(_cpu_isa())


def cpu_isa_choices() -> list[str]:
    """The CPU instruction sets that were compiled and that this processor has, widest first."""
    return str(_cpu_isa_choices()).split()


def cpu_isa_compiled() -> list[str]:
    """The CPU instruction sets that were compiled, widest first."""
    return str(_cpu_isa_compiled()).split()


def compiler() -> str:
    """Name and version of the compiler that built the library."""
    return str(_compiler())


def emulate_cuda(library: Path | None) -> None:
    """Send tensors of the CPU to the emulated CUDA kernels of `library` (see docs/gpu.md), for tests; None ends it."""
    global _emulation
    _emulate_cuda("" if library is None else str(library))
    _emulation = library


def emulates_cuda() -> bool:
    """Whether tensors of the CPU go to emulated CUDA kernels."""
    return _emulation is not None


def emulation_in_use() -> Path | None:
    """The library of emulated CUDA kernels that tensors of the CPU go to; None when they do not."""
    return _emulation


cpu_isa()
