"""The CUDA kernels as nvcc compiles them: their PTX, interpreted on the CPU (tools/ptx), behind the operators.

The emulation's library serves as the host side of the kernels: what it would launch is handed over, by the name of the
kernel and the bytes of its arguments, and run from nvcc's PTX on the same memory.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from emulated_cuda import ROOT, emulation, library

sys.path.insert(0, str(ROOT / "tools"))
import cuda_build
from ptx import BankCounter, GlobalMemory, Kernel, load

ARCHITECTURE = "80"


class _Launch(ctypes.Structure):
    """`simt::Launch`."""

    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("blocks", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint * 3),
        ("dynamic_shared_bytes", ctypes.c_size_t),
    ]


class _Argument(ctypes.Structure):
    """`simt::Argument`."""

    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]


_Interceptor = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.POINTER(_Launch), ctypes.c_void_p, ctypes.POINTER(_Argument), ctypes.c_size_t
)


def demangle(names: list[str]) -> list[str]:
    """C++ names as they are written, without what comes of the file they are in."""
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return run.stdout.split("\n")[: len(names)]


@functools.cache
def symbols() -> dict[str, int]:
    """Offset of every function in the emulation's library."""
    run = subprocess.run(["nm", "--defined-only", str(library())], capture_output=True, text=True, check=True)
    found = (line.split() for line in run.stdout.splitlines())
    return {name: int(place, 16) for place, _, name in found}


@functools.cache
def kernel_names() -> dict[int, str]:
    """Name of the kernel at each offset there."""
    found = {name: place for name, place in symbols().items() if "_kernel" in name}
    return dict(zip(found.values(), demangle(list(found)), strict=True))


@functools.cache
def ptx_of(source: Path) -> str:
    """What nvcc makes of a file; compiled again when that has changed."""
    nvcc = cuda_build.find_nvcc()
    assert nvcc is not None
    return cuda_build.compile_to_ptx(nvcc, source, ARCHITECTURE, ROOT / "build" / "ptx")


@functools.cache
def entries(source: Path) -> dict[str, str]:
    """Entries of a file, by what the kernels are called in C++."""
    names = re.findall(r"\.entry (\w+)", ptx_of(source))
    return dict(zip(demangle(names), names, strict=True))


def without_others(text: str, entry: str) -> str:
    """The PTX with this entry alone; lines keep their numbers."""

    def blank(match: re.Match[str]) -> str:
        return match[0] if match[1] == entry else "\n" * match[0].count("\n")

    return re.sub(r"^(?:\.visible )?\.entry (\w+)\(.*?^}$", blank, text, flags=re.MULTILINE | re.DOTALL)


@functools.cache
def with_headers(source: Path) -> str:
    """The text of a file, and of those of csrc/cuda that it includes."""
    text = source.read_text()
    headers = re.findall(r'^#include "(cuda/\w+\.h)"', text, re.MULTILINE)
    return "\n".join([text, *(with_headers(cuda_build.CSRC / header) for header in headers)])


@functools.cache
def text_of(name: str) -> tuple[str, str]:
    """PTX and entry of the kernel that has this name in C++: its signature, template arguments included."""
    plain = re.search(r"(\w+_kernel)\b", name)
    assert plain is not None, name
    for source in sorted((cuda_build.CSRC / "cuda").glob("*.cu")):
        if plain[1] in with_headers(source) and (entry := entries(source).get(name)):
            return without_others(ptx_of(source), entry), entry
    raise LookupError(f"csrc/cuda has no kernel {name}")


@functools.cache
def kernel(name: str) -> Kernel:
    """The kernel, ready to run."""
    return load(*text_of(name))


@contextmanager
def interpretation(
    find: Callable[[str], Kernel] = kernel, banks: dict[str, BankCounter] | None = None
) -> Iterator[list[str]]:
    """Within it, operators on CPU tensors run nvcc's PTX; the names of the kernels that ran.

    A kernel may touch what `emulation` allows it. `banks` receives the counts of each kernel.
    """
    launched: list[str] = []
    raised: list[BaseException] = []
    texts: list[ctypes.Array] = []  # what is returned must live on

    with emulation() as simt:
        simt.simt_allowed.restype = ctypes.c_bool
        base = ctypes.cast(simt.simt_intercept, ctypes.c_void_p).value
        assert base is not None
        base -= symbols()["simt_intercept"]

        def memory() -> GlobalMemory:
            found = GlobalMemory()
            begin, size = ctypes.c_void_p(), ctypes.c_size_t()
            writable, name = ctypes.c_bool(), ctypes.c_char_p()
            number = 0
            while simt.simt_allowed(ctypes.c_size_t(number), *map(ctypes.byref, (begin, size, writable, name))):
                found.add(begin.value or 0, size.value, writable.value, (name.value or b"").decode())
                number += 1
            return found

        def run(launch_pointer, address: int, arguments, count: int) -> int | None:  # type: ignore[no-untyped-def]
            try:
                launch = launch_pointer.contents
                name = kernel_names()[address - base]
                launched.append(name)
                data = [ctypes.string_at(arguments[i].data, arguments[i].bytes) for i in range(count)]
                x, y, z = launch.blocks
                find(name).launch(
                    (x, y, z),
                    tuple(launch.threads),
                    data,
                    memory(),
                    launch.dynamic_shared_bytes,
                    banks.setdefault(name, BankCounter()) if banks is not None else None,
                )
                return None
            except BaseException as error:
                raised.append(error)
                texts.append(ctypes.create_string_buffer(str(error).encode()))
                return ctypes.addressof(texts[-1])

        callback = _Interceptor(run)
        simt.simt_intercept(callback)
        try:
            yield launched
        except RuntimeError:
            if raised:
                raise raised[0] from None
            raise
        finally:
            simt.simt_intercept(None)
