"""Compiles the Triton kernels for every target: for a wheel that embeds them, or for the table of their resources.

    python tools/triton_build.py --output kernels.zip     what `TECO_TRITON_AOT=1` makes a build do
    python tools/triton_build.py --resources table.json   registers, spills and shared memory of the aligned variants
    python tools/triton_build.py --check table.json       the same, compared
    python tools/triton_build.py --markdown table.json    a line per kernel, as docs/triton.md has it

Needs teco_kernels and the package triton; no GPU, no driver. Spills and registers are read from the cubins by the
cuobjdump that comes with triton, and for AMD from the notes that the compiler leaves in its assembly.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

# Before triton is imported.
os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # more than half of a binary, and of use to debuggers alone

Resources = dict[str, int]


@cache
def _instances() -> list[Any]:
    from teco_kernels.triton_kernels.ahead_of_time import instances

    return instances()


def _build(job: tuple[int, str, str]) -> Any:
    from teco_kernels.triton_kernels.ahead_of_time import build

    index, target, variant = job
    return build(_instances()[index], target, variant)


def resources(image: bytes, target: str, assembly: str) -> Resources:
    """Registers of a thread, spilled bytes of it, and shared bytes of a program."""
    if not target.startswith("sm_"):
        fields = {
            "registers": r"\.vgpr_count:\s+(\d+)",
            "spilled_bytes": r"\.private_segment_fixed_size:\s+(\d+)",
            "shared_bytes": r"\.group_segment_fixed_size:\s+(\d+)",
        }
        return {name: int(re.search(pattern, assembly).group(1)) for name, pattern in fields.items()}  # type: ignore[union-attr]
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    return {
        "registers": found["REG"],
        "spilled_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": found["SHARED"],
    }


def _measure(job: tuple[int, str, str]) -> tuple[str, str, Resources]:
    index, target, variant = job
    instance = _instances()[index]
    compiled = instance.compile(target, variant)
    is_cuda = target.startswith("sm_")
    taken = resources(compiled.asm["cubin" if is_cuda else "hsaco"], target, compiled.asm.get("amdgcn", ""))
    return instance.key, target, {**taken, "shared_bytes": compiled.metadata.shared}


def _run(function: Any, jobs: list[Any]) -> list[Any]:
    workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return pool.map(function, jobs, chunksize=4)


def measure(targets: list[str], only: str = "") -> dict[str, dict[str, Resources]]:
    """Resources by the key of an instance, then by target, of the instances whose key holds `only`."""
    jobs = [(i, t, "aligned") for i, instance in enumerate(_instances()) for t in targets if only in instance.key]
    table: dict[str, dict[str, Resources]] = {}
    for key, target, taken in _run(_measure, jobs):
        table.setdefault(key, {})[target] = taken
    return table


def markdown(table: dict[str, dict[str, Resources]], targets: list[str]) -> str:
    """By kernel: how many instances, and the most that one of them takes on each target."""
    by_kernel: dict[str, list[dict[str, Resources]]] = {}
    for key, by_target in table.items():
        by_kernel.setdefault(key.partition("(")[0].removesuffix("_kernel"), []).append(by_target)
    lines = [f"| kernel | instances | registers ({', '.join(targets)}) | shared bytes |", "|---|---|---|---|"]
    for kernel, instances in sorted(by_kernel.items()):

        def most(what: str, rows: list[dict[str, Resources]] = instances) -> str:
            return ", ".join(str(max(row[target][what] for row in rows)) for target in targets)

        lines.append(f"| `{kernel}` | {len(instances)} | {most('registers')} | {most('shared_bytes')} |")
    return "\n".join(lines)


def main() -> None:
    """Do what the arguments say."""
    from teco_kernels.triton_kernels.ahead_of_time import TARGETS, VARIANTS, write

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--resources", type=Path)
    parser.add_argument("--check", type=Path)
    parser.add_argument("--markdown", type=Path)
    every = os.environ.get("TECO_TRITON_TARGETS") or ",".join(TARGETS)
    parser.add_argument("--targets", default=every, help=f"some of {', '.join(TARGETS)} (default: %(default)s)")
    parser.add_argument("--only", default="", help="kernels whose key holds this")
    arguments = parser.parse_args()
    targets = arguments.targets.split(",")
    if unknown := set(targets) - set(TARGETS):
        raise SystemExit(f"--targets: expected some of {', '.join(TARGETS)}, got {', '.join(sorted(unknown))}")
    import triton

    if arguments.output:
        found = [i for i, instance in enumerate(_instances()) if arguments.only in instance.key]
        kernels = _run(_build, [(i, target, variant) for i in found for target in targets for variant in VARIANTS])
        write(kernels, arguments.output)
        print(f"{len(kernels)} kernels, {arguments.output.stat().st_size / 1e6:.1f} MB in {arguments.output}")
    if arguments.resources:
        measured = measure(targets, arguments.only)
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(by_target)}" for key, by_target in measured.items())
        arguments.resources.write_text(f'{{"triton": "{triton.__version__}", "kernels": {{\n{lines}\n}}}}\n')
    if arguments.markdown:
        print(markdown(json.loads(arguments.markdown.read_text())["kernels"], targets))
    if arguments.check:
        table = json.loads(arguments.check.read_text())
        if table["triton"] != triton.__version__:
            raise SystemExit(
                f"triton: expected {table['triton']}, whose registers the table has, got {triton.__version__}"
            )
        wrong = []
        for key, by_target in measure(targets, arguments.only).items():
            for target, taken in by_target.items():
                if (expected := table["kernels"].get(key, {}).get(target)) != taken:
                    wrong.append(f"{key} on {target}: expected {expected}, got {taken}")
        print("\n".join(wrong) or "all as the table says")
        sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
