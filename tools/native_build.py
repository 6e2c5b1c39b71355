"""Writes the ninja file of the native modules and runs it."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from find_torch import OLDEST, find_torch

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}"

# -ffp-contract=off: a compiler free to fuse a*b+c at will would let two paths to the same element differ in bits.
COMMON_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-restrict",
]
# Kernels are free-standing: no exceptions, no run-time type information, no guarded statics. But an exception of the
# thread pool (no memory for scratch) must find its way through their frames.
KERNEL_FLAGS = [
    "-fno-exceptions",
    "-fasynchronous-unwind-tables",
    "-fno-rtti",
    "-fno-threadsafe-statics",
    "-Wno-psabi",
    "-fno-math-errno",
]
# Each includes those before it. The compiler keeps to 256-bit vectors, but where a kernel asks for more (cpu/wide.h):
# there are twice as many registers, masks and VNNI to gain, and no drop in frequency to fear.
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mpopcnt"]
AVX512_FLAGS = ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=256"]
INSTRUCTION_SETS = {
    "x86_64": {"baseline": [], "avx2": AVX2_FLAGS, "avx512": AVX2_FLAGS + AVX512_FLAGS},
    "aarch64": {"baseline": []},
}
# These files of csrc/cpu are compiled once, for the lowest instruction set: they run before one is chosen.
BASELINE_ONLY = {"dispatch.cpp", "thread_pool.cpp"}
# This one of the operator layer differs in a build with CUDA kernels.
KNOWS_OF_CUDA = "backend.cpp"
# By this name _host finds the operators' library, which the package has loaded by then. No path leads to it.
OPERATORS_SONAME = "libteco_kernels_operators.so"
# The kernels, and the C interface to them: `_C` finds them where it lies itself.
KERNELS_NAME = "libteco_kernels"
# Workers of its pool never end, so it stays; and it calls its own functions, whatever else a process has loaded.
KERNELS_LINK_FLAGS = ["-Wl,--no-undefined", "-Wl,-z,nodelete", "-Wl,-Bsymbolic"]


def compiler() -> str:
    """The compiler as a command line; $CXX may hold more than a name ("ccache g++")."""
    for command in (shlex.split(os.environ.get("CXX", "")), ["c++"], ["g++"], ["clang++"]):
        if command and (path := shutil.which(command[0])):
            return shlex.join([path, *command[1:]])
    raise SystemExit(
        "teco_kernels: no C++20 compiler found (tried $CXX, c++, g++, clang++); on Debian: apt-get install g++"
    )


def _ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        if path := shutil.which("ninja"):
            return path
    raise SystemExit("teco_kernels: ninja not found; pip install ninja")


def _torch() -> Path:
    if (torch := find_torch()) is None:
        oldest = ".".join(map(str, OLDEST))
        raise SystemExit(f"teco_kernels: no torch {oldest} or newer found in this environment; pip install torch")
    return torch


def _escape(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _words(arguments: list[str]) -> str:
    """Arguments of a command, in which paths may hold spaces."""
    return shlex.join(arguments).replace("$", "$$")


class NinjaFile:
    """A ninja file in the making, over the sources of `CSRC`."""

    def __init__(self, compiler: str) -> None:
        self.lines = [
            "ninja_required_version = 1.5",
            f"cxx = {compiler.replace('$', '$$')}",
            "rule compile",
            "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            "rule link",
            "  command = $cxx -shared -o $out $in $libs",
            "  description = link $out",
        ]

    def compile(self, source: Path, flags: list[str], variant: str = "", rule: str = "compile") -> str:
        """Add an object; `variant` tells it from others of the same source."""
        stem = source.relative_to(CSRC).with_suffix("") if source.is_relative_to(CSRC) else source.stem
        target = f"{stem}{'.' + variant if variant else ''}.o"
        self.lines += [f"build {_escape(target)}: {rule} {_escape(source)}", f"  flags = {_words(flags)}"]
        return target

    def link(self, target: Path, objects: list[str], libs: list[str]) -> None:
        """Add a shared library."""
        self.lines += [f"build {_escape(target)}: link {' '.join(map(_escape, objects))}", f"  libs = {_words(libs)}"]


def _operator_objects(ninja: NinjaFile, torch: Path, with_cuda: bool) -> list[str]:
    include = [f"-I{CSRC}"]
    torch_flags = ["-isystem", str(torch / "include"), "-DTORCH_TARGET_VERSION=0x020d000000000000"]
    sources = [CSRC / "ops.cpp", *sorted((CSRC / "ops").glob("*.cpp"))]
    objects = []
    for source in sources:
        knows_of_cuda = ["-DTECO_WITH_CUDA"] if with_cuda and source.name == KNOWS_OF_CUDA else []
        objects.append(ninja.compile(source, COMMON_FLAGS + include + torch_flags + knows_of_cuda))
    objects += [ninja.compile(source, COMMON_FLAGS + include) for source in sorted((CSRC / "comm").glob("*.cpp"))]
    return objects


def _kernel_objects(ninja: NinjaFile) -> list[str]:
    include = [f"-I{CSRC}"]
    c_flags = [*COMMON_FLAGS, *include, f"-I{BUILD / 'include'}"]
    objects = [ninja.compile(source, c_flags) for source in sorted((CSRC / "capi").glob("*.cpp"))]
    variants = INSTRUCTION_SETS.get(platform.machine(), {"baseline": []})
    available = [f"-DTECO_HAVE_{name.upper()}" for name in variants]
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        if source.name in BASELINE_ONLY:
            objects.append(ninja.compile(source, [*COMMON_FLAGS, *include, *available]))
            continue
        included: list[str] = []
        for name, flags in variants.items():
            included.append(f"-DTECO_ISA_{name.upper()}")
            isa = [f"-DTECO_ISA={name}", *included]
            objects.append(ninja.compile(source, COMMON_FLAGS + include + KERNEL_FLAGS + flags + isa, name))
    return objects


def _host_objects(ninja: NinjaFile) -> list[str]:
    import pybind11

    flags = [
        *COMMON_FLAGS,
        f"-I{CSRC}",
        *("-isystem", pybind11.get_include()),
        *("-isystem", sysconfig.get_paths()["include"]),
    ]
    return [ninja.compile(source, flags) for source in sorted((CSRC / "host").glob("*.cpp"))]


def run_ninja(ninja: NinjaFile, folder: Path, verbose: bool = False) -> None:
    """Build all that the file describes, in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(ninja.lines) + "\n")
    jobs = os.environ.get("MAX_JOBS")
    command = [_ninja(), "-C", str(folder), *(["-j", jobs] if jobs else []), *(["-v"] if verbose else [])]
    if subprocess.run(command).returncode != 0:
        raise SystemExit("teco_kernels: the native build failed; the compiler's message stands above")


def build(outputs: dict[str, Path], verbose: bool = False) -> None:
    """Compile and link the libraries named in `outputs` (KERNELS_NAME, "_C", "_host") to the given paths.

    Beside the first of them comes `include/teco_kernels.h`.
    """
    import cuda_build  # these two build on this module
    from c_header import write_header

    torch = _torch()
    nvcc = cuda_build.wanted_nvcc(torch)
    ninja = NinjaFile(compiler())
    modules = {name: BUILD / f"{name}.so" for name in (KERNELS_NAME, "_C", "_host")}
    write_header(BUILD / "include" / "teco_kernels.h")
    torch_libs = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl", "-pthread"]
    objects, cuda_libs = cuda_build.add_kernels(ninja, nvcc) if nvcc else ([], [])
    objects += _operator_objects(ninja, torch, with_cuda=nvcc is not None)
    kernels = modules[KERNELS_NAME]
    ninja.link(kernels, _kernel_objects(ninja), ["-pthread", f"-Wl,-soname,{kernels.name}", *KERNELS_LINK_FLAGS])
    names = [f"-Wl,-soname,{OPERATORS_SONAME}", "-Wl,-rpath,$ORIGIN"]
    ninja.link(modules["_C"], [*objects, str(kernels)], [*torch_libs, *cuda_libs, *names])
    ninja.link(modules["_host"], [*_host_objects(ninja), str(modules["_C"])], [])
    run_ninja(ninja, BUILD, verbose)
    for name, output in outputs.items():
        output.parent.mkdir(parents=True, exist_ok=True)
        # A library that a running process has mapped must be replaced, never written into.
        staging = output.with_suffix(".new")
        shutil.copy2(modules[name], staging)
        staging.replace(output)
    write_header(outputs[KERNELS_NAME].parent / "include" / "teco_kernels.h")
