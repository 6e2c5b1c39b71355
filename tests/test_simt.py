"""csrc/simt finds each kind of bug that is planted in a kernel, in every order of threads, and names its line."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLANTED = ROOT / "tests" / "simt" / "planted.cu"
SEEDS = (0, 1, 2, 3)

# Kernel, and what is said of it; the line of the bug is marked in the source.
BUGS = {
    "missing_barrier": "race: the thread |uninitialised: the thread ",
    "missing_second_barrier": "race: the thread ",
    "warp_barrier_between_warps": "race: the thread |uninitialised: the thread ",
    "divergent_barrier": "divergent barrier",
    "barrier_in_a_branch": "barrier at ",
    "early_return": "barrier at ",
    "uninitialised": "uninitialised: the thread reads 4 bytes at offset 28 of shared memory",
    "left_by_another_block": "uninitialised: ",
    "beyond_global": "out of bounds: the thread reads 4 bytes at offset 256 of input (256 bytes)",
    "before_global": "out of bounds: the thread writes 4 bytes at offset -4 of output (256 bytes)",
    "beyond_shared": "out of bounds: the thread writes 4 bytes at offset 336 of shared memory (336 bytes)",
    "beyond_array": "index out of bounds of its array",
    "write_to_input": "read-only memory: the thread writes 4 bytes",
    "same_place": "race: the thread writes 4 bytes",
    "between_blocks": "another block writes it in the same launch",
    "atomic_and_plain": "race: the thread ",
    "misaligned": "misaligned: the thread accesses 16 bytes",
    "lane_outside_of_mask": "lane 20, whose value is asked for, is not in the mask",
    "half_of_the_mask": "others of its warp wait for it|lanes that do not exist or have ended",
    "two_shuffles": "lanes of its mask wait in __shfl_xor_sync",
    "missing_wait": "missing wait: the thread reads 4 bytes",
    "wait_behind_barrier": "race: the thread |missing wait: the thread ",
    "large_shift": "shift by more bits than there are",
    "overflow": "integer overflow in an addition",
}

CORRECT: dict[str, Callable[[int], int]] = {
    "reverse": lambda i: 64 - i,
    "warp_barrier": lambda i: (i ^ 1) + 1,
    "halves_by_themselves": lambda i: (i ^ 1) + 1,
    "waits_for_copies": lambda i: 64 - i,
    "atomics": lambda i: 4 * i + 3 if i < 32 else 0,
}

Run = Callable[[str, int], tuple[str, list[int]]]


@pytest.fixture(scope="module", params=["assembly", "portable"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a kernel of planted.cu; with fibers of either kind."""
    sys.path.insert(0, str(ROOT / "tools"))
    import cuda_build

    folder = tmp_path_factory.mktemp(request.param)
    flags = ["-DSIMT_PORTABLE_FIBERS"] if request.param == "portable" else []
    library = ctypes.CDLL(str(cuda_build.build_with_simt(folder, PLANTED, flags)))
    library.run_planted.restype = ctypes.c_char_p
    library.run_planted.argtypes = [ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p]

    def run(name: str, seed: int) -> tuple[str, list[int]]:
        output = (ctypes.c_int * 64)()
        finding = library.run_planted(name.encode(), seed, output)
        return (finding or b"").decode(), list(output)

    return run


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CORRECT)
def test_correct_kernels_run(run: Run, name: str, seed: int) -> None:
    finding, output = run(name, seed)
    assert finding == ""
    assert output == [CORRECT[name](i) for i in range(64)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", BUGS)
def test_bugs_are_found(run: Run, name: str, seed: int) -> None:
    finding, _ = run(name, seed)
    assert finding.startswith(f"simt: kernel {name}, block (")
    assert re.search(BUGS[name].replace("(", r"\(").replace(")", r"\)"), finding), finding
    lines = PLANTED.read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if f"// bug: {name}" in text)
    assert re.search(rf"planted\.cu:{line}\b", finding), finding


def test_every_kernel_is_tested() -> None:
    kernels = re.findall(r"__global__ void (\w+)", PLANTED.read_text())
    assert sorted(kernels) == sorted([*BUGS, *CORRECT])
