"""Compiles every CUDA kernel for every architecture and tells what each instance takes of a multiprocessor.

Run as a script, it writes the table that tests compare with (tests/data/cuda_resources.json).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cuda_build import compile_for, find_nvcc, version
from native_build import CSRC, ROOT

TABLE = ROOT / "tests" / "data" / "cuda_resources.json"
ARCHITECTURES = ("80", "90a", "100", "120")

#: Bytes of dynamic shared memory of `paged_attention`, per size of head: queries, a tile of keys or values, scales.
#: Only launches tell of it, so a test looks at these.
ATTENTION_SHARED = {dim: 4 * (16 * dim + 32 * (dim + 4) + 64) for dim in (64, 128, 256, 512)}

# Per multiprocessor: threads, bytes of shared memory. All have 65536 registers, at most 32 blocks (24 on 12.0), dealt
# out to warps by 256, and keep 1 KB of shared memory per block for themselves.
LIMITS = {"80": (2048, 164 * 1024), "90a": (2048, 228 * 1024), "100": (2048, 228 * 1024), "120": (1536, 100 * 1024)}


@dataclass(frozen=True)
class Resources:
    """What the instances of a kernel take: the largest number of each, and the fewest blocks that fit.

    Attributes
    ----------
    instances : int
        How many there are, of all dtypes and formats.
    registers, spilled_bytes, shared_bytes : int
        Registers of a thread, bytes of them that are kept in memory, bytes of shared memory of a block.
    warps : int
        Warps of blocks that fit into a multiprocessor at a time, by registers, threads and shared memory.
    """

    instances: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int


def _demangle(name: str) -> str:
    return subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()


def kernel_of(name: str) -> str:
    """What the kernel of an entry is called in tables: its name in C++, without "_kernel"."""
    kernel = re.search(r"(\w+)_kernel\b", _demangle(name))
    if kernel is None:
        raise RuntimeError(f"no kernel in {name}")
    return kernel[1]


def kernels_of(source: Path) -> set[str]:
    """Those that a file defines, as in tables."""
    return set(re.findall(r"__global__[^;{]*?\b(\w+)_kernel\(", source.read_text()))


def _threads(ptx: str) -> dict[str, int]:
    """Threads of a block, by entry: what `__launch_bounds__` says."""
    pattern = re.compile(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)")
    return {match[1]: int(match[2]) for match in pattern.finditer(ptx)}


def _instances(report: str) -> Iterator[tuple[str, str, int, int, int]]:
    """(entry, kernel, registers, spilled bytes, shared bytes) of every entry that ptxas tells of."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers[^\n]*",
        re.DOTALL,
    )
    for match in pattern.finditer(report):
        name, kernel = _demangle(match[1]), kernel_of(match[1])
        shared = re.search(r"(\d+) bytes smem", match[0])
        shared_bytes = int(shared[1]) if shared else 0
        if kernel == "paged_attention":
            dim = re.search(r"paged_attention_kernel<(\d+)", name)
            shared_bytes += ATTENTION_SHARED[int(dim[1])] if dim else 0
        yield match[1], kernel, int(match[4]), int(match[2]) + int(match[3]), shared_bytes


def resident_warps(architecture: str, threads: int, registers: int, shared_bytes: int) -> int:
    """Warps that a multiprocessor holds of blocks like this."""
    max_threads, max_shared = LIMITS[architecture]
    warps = threads // 32
    registers_of_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        24 if architecture == "120" else 32,
        max_threads // threads,
        65536 // registers_of_warp // warps,
        max_shared // (shared_bytes + 1024),
    )
    return blocks * warps


def measure(nvcc: Path, architecture: str, source: Path) -> dict[str, Resources]:
    """Resources of each kernel of a file."""
    with tempfile.TemporaryDirectory() as folder:
        report = compile_for(nvcc, source, architecture, Path(folder) / "kernel.cubin")
        threads = _threads((Path(folder) / f"{source.stem}.ptx").read_text())
    found: dict[str, list[tuple[int, int, int, int]]] = {}
    for entry, kernel, *numbers in _instances(report):
        found.setdefault(kernel, []).append((numbers[0], numbers[1], numbers[2], threads[entry]))
    return {
        kernel: Resources(
            instances=len(instances),
            registers=max(i[0] for i in instances),
            spilled_bytes=max(i[1] for i in instances),
            shared_bytes=max(i[2] for i in instances),
            warps=min(resident_warps(architecture, i[3], i[0], i[2]) for i in instances),
        )
        for kernel, instances in found.items()
    }


def sources() -> list[Path]:
    """The kernel files."""
    return sorted((CSRC / "cuda").glob("*.cu"))


def main() -> None:
    nvcc = find_nvcc()
    if nvcc is None or shutil.which("c++filt") is None:
        sys.exit("cuda_check: needs nvcc and c++filt")
    table: dict[str, dict[str, dict[str, int]]] = {}
    for source in sources():
        for architecture in ARCHITECTURES:
            for kernel, resources in measure(nvcc, architecture, source).items():
                table.setdefault(kernel, {})[architecture] = asdict(resources)
    TABLE.write_text(json.dumps({"nvcc": version(nvcc), "kernels": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
