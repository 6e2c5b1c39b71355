"""Which machine instructions nvcc made of the CUDA kernels: tensor cores, copies and wide accesses where meant.

Run as a script, it writes the table that tests compare with (tests/data/cuda_instructions.json).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from cuda_build import compile_for, find_nvcc, version
from cuda_check import kernel_of, sources
from native_build import ROOT

TABLE = ROOT / "tests" / "data" / "cuda_instructions.json"
ARCHITECTURES = ("80", "90a")

#: What is counted: mma.sync, cp.async of 16 bytes, ldmatrix of four matrices, dp4a, and accesses of 16 bytes to global
#: and to shared memory.
INSTRUCTIONS = {
    "HMMA": r"\bHMMA\.16816\.F32",
    "LDGSTS.128": r"\bLDGSTS\.E\.[\w.]*128",
    "LDSM.4": r"\bLDSM\.16\.M88\.4",
    "IDP.4A": r"\bIDP\.4A",
    "LDG.128": r"\bLDG\.E\.[\w.]*128",
    "STG.128": r"\bSTG\.E\.[\w.]*128",
    "LDS.128": r"\bLDS\.[\w.]*128",
    "STS.128": r"\bSTS\.[\w.]*128",
}

Counts = dict[str, int]


def find_cuobjdump() -> Path | None:
    """Beside nvcc, in $PATH, or in the package triton, which brings one."""
    nvcc, triton = find_nvcc(), find_spec("triton")
    candidates = [nvcc.resolve().parent / "cuobjdump"] if nvcc else []
    if found := shutil.which("cuobjdump"):
        candidates.append(Path(found))
    if triton and triton.origin:
        candidates.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((path for path in candidates if path.is_file()), None)


def instructions(cuobjdump: Path, cubin: Path) -> dict[str, Counts]:
    """By kernel: its instances, and in how many of them each instruction occurs."""
    text = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    found: dict[str, Counts] = {}
    for function in text.split("Function : ")[1:]:
        name, _, code = function.partition("\n")
        counts = found.setdefault(kernel_of(name), {"instances": 0})
        counts["instances"] += 1
        for instruction, pattern in INSTRUCTIONS.items():
            if re.search(pattern, code):
                counts[instruction] = counts.get(instruction, 0) + 1
    return {kernel: dict(sorted(counts.items())) for kernel, counts in found.items()}


def measure(nvcc: Path, cuobjdump: Path, architecture: str, source: Path) -> dict[str, Counts]:
    """The same for the kernels of a file."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        compile_for(nvcc, source, architecture, cubin)
        return instructions(cuobjdump, cubin)


def main() -> None:
    nvcc, cuobjdump = find_nvcc(), find_cuobjdump()
    if nvcc is None or cuobjdump is None or shutil.which("c++filt") is None:
        sys.exit("cuda_sass: needs nvcc, cuobjdump and c++filt")
    table: dict[str, dict[str, Counts]] = {}
    for source in sources():
        for architecture in ARCHITECTURES:
            for kernel, counts in measure(nvcc, cuobjdump, architecture, source).items():
                table.setdefault(kernel, {})[architecture] = counts
    lines = ",\n".join(f" {json.dumps(kernel)}: {json.dumps(counts)}" for kernel, counts in sorted(table.items()))
    TABLE.write_text(f'{{"nvcc": "{version(nvcc)}", "kernels": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
