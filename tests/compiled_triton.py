"""Compiles a kernel and prints what its own assembly says of its parameters; run as a process, see test_triton_build.

Arguments: where to write the archive, targets, and what the key of the kernel holds; the first that has it is taken.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from teco_kernels.triton_kernels.ahead_of_time import VARIANTS, build, instances, write

_SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "f32": 4, "b32": 4, "b64": 8}


def cuda_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of the entry."""
    declared = re.search(r"\.entry[^(]*\(([^)]*)\)", ptx)
    assert declared is not None
    return [_SIZES[kind] for kind in re.findall(r"\.param \.(\w+)", declared.group(1))]


def hip_sizes(assembly: str) -> list[int]:
    """Bytes of each explicit argument of the kernel."""
    arguments = assembly[assembly.index("amdhsa.kernels") :].partition(".group_segment_fixed_size")[0]
    return [
        int(size) for size in re.findall(r"\.size:\s+(\d+)\s+\.value_kind:\s+(?:by_value|global_buffer)", arguments)
    ]


def main(path: str, targets: str, only: str) -> None:
    """Write the archive; print for each kernel its entry of the index, and the sizes."""
    kernels, found = [], []
    for instance in instances():
        if only not in instance.key:
            continue
        for target in targets.split(","):
            for variant in VARIANTS:
                compiled = instance.compile(target, variant)  # from Triton's cache the second time
                is_cuda = target.startswith("sm_")
                sizes = cuda_sizes(compiled.asm["ptx"]) if is_cuda else hip_sizes(compiled.asm["amdgcn"])
                kernels.append(build(instance, target, variant))
                found.append({**kernels[-1].compiled._asdict(), "target": target, "variant": variant, "sizes": sizes})
        break
    write(kernels, Path(path))
    print(json.dumps(found))


main(*sys.argv[1:])
