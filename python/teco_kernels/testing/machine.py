"""What a report says about the machine it was made on."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path
from typing import Any

import torch

from teco_kernels.ops import _library

#: Instruction sets that the package has kernels for on some build, widest first.
INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
#: When the system does not tell.
_DEFAULT_L3 = 32 << 20


def facts() -> dict[str, Any]:
    """Processor, memory and software, as far as the system tells; nothing that names the host or its user."""
    import teco_kernels
    from teco_kernels.parallel.shared_memory import problem_here

    return {
        "teco_kernels": teco_kernels.__version__,
        "compiler": _library.compiler(),
        "instruction_sets_compiled": _library.cpu_isa_compiled(),
        "instruction_set": _library.cpu_isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "l3_bytes": l3_bytes(),
        "memory_bytes": memory_bytes(),
        "collectives": f"process group ({problem})" if (problem := problem_here()) else "shared memory",
        "load": round(os.getloadavg()[0], 2),
    }


def instruction_sets() -> dict[str, str]:
    """Per instruction set: "in use", or why it is not."""
    compiled, present, chosen = _library.cpu_isa_compiled(), _library.cpu_isa_choices(), _library.cpu_isa()
    forced = os.environ.get("TECO_CPU_ISA")

    def state(name: str) -> str:
        if name == chosen:
            return f"in use, as TECO_CPU_ISA={forced} asks" if forced else "in use"
        if name not in compiled:
            return "not compiled into this build"
        if name not in present:
            return "this processor does not have it"
        return f"TECO_CPU_ISA={forced} asks for another" if forced else f"{chosen} is wider"

    return {name: state(name) for name in dict.fromkeys((*INSTRUCTION_SETS, *compiled))}


def processor() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def l3_bytes() -> int:
    """Size of the last-level cache that the first core sees."""
    sizes = [0]
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0))
    return max(sizes) or _DEFAULT_L3


def memory_bytes() -> int:
    """Size of the machine's memory."""
    return _meminfo("MemTotal")


def available_bytes() -> int:
    """Memory that can be taken without swapping."""
    return _meminfo("MemAvailable")


def process_memory() -> tuple[int, int]:
    """Resident bytes of this process: now, and at the most."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return peak, peak
    sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return sizes["VmRSS"], sizes["VmHWM"]


def _meminfo(name: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))
