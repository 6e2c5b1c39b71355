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
RANKS = ROOT / "tests" / "simt" / "planted_ranks.cu"
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
    "overwritten_before_arrival": "missing wait: the thread writes 4 bytes",
    "source_changes": "the source of a cp.async has changed before it was waited for",
    "large_shift": "shift by more bits than there are",
    "overflow": "integer overflow in an addition",
}

# The same of several ranks: what is said, and at which marks in the source.
BUGS_OF_RANKS = {
    "relaxed_release": ("without a release and an acquire between them", "takes", "hands over"),
    "relaxed_acquire": ("without a release and an acquire between them", "takes", "hands over"),
    "no_barrier_before": ("without a release and an acquire between them", "takes", "hands over"),
    "no_wait": ("without a release and an acquire between them", "takes", "hands over"),
    "no_barrier_after": ("without a release and an acquire between them", "takes", "hands over"),
    "one_buffer": ("without a release and an acquire between them", "takes", "hands over"),
    "waits_for_the_step_before": ("without a release and an acquire between them", "takes", "hands over"),
    "memory_of_another_rank": ("out of bounds: the thread writes 4 bytes", "bug: memory_of_another_rank"),
}

CORRECT: dict[str, Callable[[int], int]] = {
    "reverse": lambda i: 64 - i,
    "warp_barrier": lambda i: (i ^ 1) + 1,
    "halves_by_themselves": lambda i: (i ^ 1) + 1,
    "waits_for_copies": lambda i: 64 - i,
    "atomics": lambda i: 4 * i + 3 if i < 32 else 0,
}

Run = Callable[[str, int], tuple[str, list[int]]]


def build(folder: Path, source: Path, flags: list[str]) -> Run:
    """Runs a kernel of the file by its name, in the order of a seed: what was found, and its output."""
    sys.path.insert(0, str(ROOT / "tools"))
    import cuda_build

    library = ctypes.CDLL(str(cuda_build.build_with_simt(folder, source, flags)))
    library.run_planted.restype = ctypes.c_char_p
    library.run_planted.argtypes = [ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p]

    def run(name: str, seed: int) -> tuple[str, list[int]]:
        output = (ctypes.c_int * 192)()
        finding = library.run_planted(name.encode(), seed, output)
        return (finding or b"").decode(), list(output)

    return run


@pytest.fixture(scope="module", params=["assembly", "portable"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a kernel of planted.cu; with fibers of either kind."""
    flags = ["-DSIMT_PORTABLE_FIBERS"] if request.param == "portable" else []
    return build(tmp_path_factory.mktemp(request.param), PLANTED, flags)


@pytest.fixture(scope="module")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a kernel of planted_ranks.cu on three ranks."""
    return build(tmp_path_factory.mktemp("ranks"), RANKS, [])


def line_of(source: Path, mark: str) -> int:
    return next(number for number, text in enumerate(source.read_text().splitlines(), 1) if text.endswith(f"// {mark}"))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CORRECT)
def test_correct_kernels_run(run: Run, name: str, seed: int) -> None:
    finding, output = run(name, seed)
    assert finding == ""
    assert output[:64] == [CORRECT[name](i) for i in range(64)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", BUGS)
def test_bugs_are_found(run: Run, name: str, seed: int) -> None:
    finding, _ = run(name, seed)
    assert finding.startswith(f"simt: kernel {name}, block (")
    assert re.search(BUGS[name].replace("(", r"\(").replace(")", r"\)"), finding), finding
    assert re.search(rf"planted\.cu:{line_of(PLANTED, f'bug: {name}')}\b", finding), finding


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no_threads", "1 to 1024 threads, at most 64 in z, got (0, 1, 1)"),
        ("too_many_threads", "1 to 1024 threads, at most 64 in z, got (1025, 1, 1)"),
        ("no_blocks", "at least one block, at most 65535 in y and z, got (0, 1, 1)"),
        ("too_many_rows", "at least one block, at most 65535 in y and z, got (1, 65536, 1)"),
        ("too_much_shared_memory", "at most 99 KB of shared memory, got 101377 bytes"),
    ],
)
def test_launches_that_no_device_takes(run: Run, name: str, problem: str) -> None:
    assert run(name, 0)[0] == f"simt: {name}: expected {problem}"


def test_every_kernel_is_tested() -> None:
    kernels = re.findall(r"__global__ void (\w+)", PLANTED.read_text())
    assert sorted(kernels) == sorted([*BUGS, *CORRECT])


# ---- several ranks


MANY_SEEDS = range(12)


@pytest.mark.parametrize("seed", MANY_SEEDS)
def test_ranks_exchange_data(run_ranks: Run, seed: int) -> None:
    """Three times, without waiting for anything but each other's data."""
    finding, output = run_ranks("all_parts", seed)
    assert finding == ""
    assert output == [3000 + 3 * (63 - i) + 9 for i in range(64)] * 3


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", BUGS_OF_RANKS)
def test_bugs_between_ranks_are_found(run_ranks: Run, name: str, seed: int) -> None:
    text, *marks = BUGS_OF_RANKS[name]
    finding, _ = run_ranks(name, seed)
    assert re.match(rf"simt: kernel {name}, rank \d, block \(0, 0, 0\), thread \(", finding)
    assert text in finding
    for mark in marks:
        assert re.search(rf"planted_ranks\.cu:{line_of(RANKS, mark)}\b", finding), finding


def test_ranks_that_wait_for_ever_are_found(run_ranks: Run) -> None:
    """A flag that is used for the next launch before it was seen: whether that comes to pass depends on the order."""
    findings = [run_ranks("flag_is_taken_back", seed)[0] for seed in MANY_SEEDS]
    line = line_of(RANKS, "bug: flag_is_taken_back")
    stuck = [text for text in findings if "ranks wait for each other for ever" in text and f"ranks.cu:{line}" in text]
    assert stuck == [text for text in findings if text]
    assert stuck


def test_stores_arrive_late(run_ranks: Run) -> None:
    """No rank sees what the others have stored before they looked: no order of instructions makes that."""
    saw = [run_ranks("stores_behind_loads", seed)[1][::64] for seed in MANY_SEEDS]
    assert [0, 0, 0] in saw
    assert any(sum(others) > 0 for others in saw)


def test_stores_arrive_in_any_order_unless_a_release_forbids_it(run_ranks: Run) -> None:
    results = {
        name: [run_ranks(name, seed) for seed in MANY_SEEDS] for name in ("word_and_release", "word_and_relaxed_flag")
    }
    assert all(finding == "" for runs in results.values() for finding, _ in runs)
    assert {output[64] for _, output in results["word_and_release"]} == {7}
    assert {output[64] for _, output in results["word_and_relaxed_flag"]} == {0, 7}


def test_time_passes_when_all_wait(run_ranks: Run) -> None:
    finding, output = run_ranks("gives_up", 0)
    assert finding == ""
    assert output[::64] == [20, 20, 20]
