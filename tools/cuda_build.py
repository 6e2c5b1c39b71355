"""The CUDA kernels: how nvcc compiles them for a GPU, and the host's compiler as an emulation (csrc/simt)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from find_torch import cuda_of
from native_build import COMMON_FLAGS, CSRC, NinjaFile, compiler, run_ninja

#: Compute capabilities to compile for; "a" stands for all features of just that one, "+PTX" for PTX beside the code.
DEFAULT_ARCHITECTURES = "8.0;9.0a;10.0;12.0+PTX"

# As on the CPU: a fused multiply-add stands where fmaf is written, and nowhere else.
NVCC_FLAGS = ["-std=c++20", "-O3", "--fmad=false", f"-I{CSRC}", "-Xcompiler=-fPIC,-fvisibility=hidden"]

EMULATION_FLAGS = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
# The instrumentation calls functions of csrc/simt, so no sanitizer is linked. Few optimisations: an access that is
# optimised away is not seen.
KERNEL_FLAGS = [
    *("-x", "c++"),
    "-O1",
    "-fno-exceptions",
    "-Wno-unknown-pragmas",
    "-fsanitize=thread,bounds,shift,signed-integer-overflow",
]


def find_nvcc() -> Path | None:
    """nvcc of $CUDA_HOME, of $PATH, of its usual place, or of the `nvidia-cuda-nvcc` package."""
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    candidates = [
        *(Path(home) / "bin" / "nvcc" for home in (os.environ.get("CUDA_HOME"),) if home),
        *(Path(found) for found in (shutil.which("nvcc"),) if found),
        Path("/usr/local/cuda/bin/nvcc"),
        *sorted(packages.glob("*/bin/nvcc")),
    ]
    return next((path for path in candidates if path.is_file()), None)


def version(nvcc: Path) -> str:
    """Such as "13.0.88"."""
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
    match = re.search(r"V([\d.]+)", text)
    return match[1] if match else "unknown"


def wanted_nvcc(torch: Path) -> Path | None:
    """The nvcc to compile the kernels with, or None to leave them out.

    TECO_CUDA=1 asks for them and fails without nvcc, TECO_CUDA=0 leaves them out; otherwise they are built when there
    is an nvcc and `torch` is a build for the same major version of CUDA: a driver that runs the one may be too old for
    the other.
    """
    choice = os.environ.get("TECO_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"teco_kernels: TECO_CUDA: expected 0 or 1, got {choice!r}")
    nvcc = find_nvcc() if choice != "0" else None
    if choice == "1" and nvcc is None:
        raise SystemExit("teco_kernels: TECO_CUDA=1, but no nvcc found ($CUDA_HOME, $PATH, /usr/local/cuda)")
    cuda = cuda_of(torch)
    if choice == "1" or nvcc is None or cuda is None:
        return nvcc if choice == "1" else None
    found = version(nvcc)
    if found.split(".")[0] == cuda.split(".")[0]:
        return nvcc
    print(
        f"teco_kernels: no CUDA kernels: torch is built for CUDA {cuda}, {nvcc} is of {found}; TECO_CUDA=1 builds them",
        file=sys.stderr,
    )
    return None


def architecture_flags(architectures: str) -> list[str]:
    """nvcc's flags for a list such as "8.0;9.0a+PTX"."""
    flags = []
    for entry in re.split(r"[;, ]+", architectures.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", entry)
        if not match:
            raise SystemExit(f"teco_kernels: TECO_CUDA_ARCH_LIST: expected entries such as 8.0 or 9.0a, got {entry!r}")
        number = match[1] + match[2] + match[3]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def add_kernels(ninja: NinjaFile, nvcc: Path) -> tuple[list[str], list[str]]:
    """Objects of all CUDA kernels, and what must be linked beside them."""
    ninja.lines += [
        "rule cuda",
        f"  command = {nvcc} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $out",
    ]
    flags = [*NVCC_FLAGS, *architecture_flags(os.environ.get("TECO_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES)]
    objects = [ninja.compile(source, flags, "nvcc", rule="cuda") for source in sorted((CSRC / "cuda").glob("*.cu"))]
    objects.append(ninja.compile(CSRC / "cuda" / "table.cpp", [*COMMON_FLAGS, f"-I{CSRC}"]))
    # nvcc may be a link or a script: it tells itself where it belongs.
    says = subprocess.run([str(nvcc), "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", says, re.MULTILINE)
    root = Path(top[1]) if top else nvcc.resolve().parent.parent
    libraries = next((path for path in (root / "lib64", root / "lib") if (path / "libcudart_static.a").exists()), None)
    if libraries is None:
        raise SystemExit(f"teco_kernels: no libcudart_static.a beside {nvcc}")
    return objects, [f"-L{libraries}", "-lcudart_static", "-ldl", "-lrt"]


def build_emulation(folder: Path, csrc: Path = CSRC) -> Path:
    """Compile csrc/cuda/*.cu with the host's compiler, and csrc/simt; the library that `_emulate_cuda` takes."""
    ninja = NinjaFile(compiler())
    library = folder / "libteco_cuda_emulated.so"
    objects = _simt_objects(ninja, [])
    objects.append(ninja.compile(csrc / "cuda" / "table.cpp", [*EMULATION_FLAGS, "-O2", f"-I{csrc}"]))
    for source in sorted((csrc / "cuda").glob("*.cu")):
        objects.append(ninja.compile(source, [*EMULATION_FLAGS, f"-I{csrc}", *KERNEL_FLAGS]))
    ninja.link(library, objects, ["-Wl,--no-undefined", "-ldl"])
    run_ninja(ninja, folder)
    return library


def build_changed_emulation(folder: Path, emulation: Path, changed: Path, units: list[str]) -> Path:
    """The emulation that lies in a folder, with some `units` of csrc/cuda ("rms_norm.cu") compiled anew.

    Sources in `changed`/cuda stand in place of those in csrc/cuda. A template that several units instantiate is that of
    the changed ones.
    """
    ninja = NinjaFile(compiler())
    library = folder / "libteco_cuda_changed.so"
    flags = [*EMULATION_FLAGS, f"-I{changed}", f"-I{CSRC}", *KERNEL_FLAGS]
    objects, unchanged = [], [*(CSRC / "simt").glob("*.cpp"), CSRC / "cuda" / "table.cpp"]
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        if source.name in units:
            other = changed / "cuda" / source.name
            objects.append(ninja.compile(other if other.exists() else source, flags))
        else:
            unchanged.append(source)
    objects += [str(emulation / source.relative_to(CSRC).with_suffix(".o")) for source in unchanged]
    ninja.link(library, objects, ["-Wl,--no-undefined", "-ldl"])
    run_ninja(ninja, folder)
    return library


def build_with_simt(folder: Path, source: Path, flags: list[str]) -> Path:
    """Compile a kernel source of one's own together with csrc/simt; all with further flags."""
    ninja = NinjaFile(compiler())
    library = folder / f"{source.stem}.so"
    objects = [ninja.compile(source, [*EMULATION_FLAGS, *flags, f"-I{CSRC}", *KERNEL_FLAGS])]
    ninja.link(library, [*objects, *_simt_objects(ninja, flags)], ["-Wl,--no-undefined", "-ldl"])
    run_ninja(ninja, folder)
    return library


def _simt_objects(ninja: NinjaFile, flags: list[str]) -> list[str]:
    flags = [*EMULATION_FLAGS, *flags, "-O2", f"-I{CSRC}"]
    return [ninja.compile(source, flags) for source in sorted((CSRC / "simt").glob("*.cpp"))]


def compile_for(nvcc: Path, source: Path, architecture: str, output: Path) -> str:
    """Compile one file to machine code of one architecture ("90a"); what ptxas has to say about it.

    The PTX on the way to it stays beside the output, named after the source.
    """
    command = [
        str(nvcc),
        *NVCC_FLAGS,
        f"-arch=sm_{architecture}",
        "-cubin",
        "-Xptxas=-v",
        "--keep",
        f"--keep-dir={output.parent}",
        "-o",
        str(output),
        str(source),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{source.name} for sm_{architecture}: {run.stderr}")
    return run.stderr


def compile_to_ptx(nvcc: Path, source: Path, architecture: str, folder: Path) -> str:
    """PTX of one file for one architecture; compiled again only when something has changed."""
    ninja = NinjaFile(compiler())
    ninja.lines += [
        "rule ptx",
        f"  command = {nvcc} $flags -MD -MF $out.d -ptx $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    output = ninja.compile(source, [*NVCC_FLAGS, f"-arch=sm_{architecture}"], "ptx", rule="ptx")
    run_ninja(ninja, folder / source.stem)
    return (folder / source.stem / output).read_text()
