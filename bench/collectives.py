"""Times collectives beside those of Gloo and OpenMPI, in turns on one machine.

Every contestant has its ranks, which sleep while another one is timed; each round times every case of each contestant
once, and medians over the rounds are what counts. Every rank has a core of its own, and one thread.

    python bench/collectives.py
    python bench/collectives.py --mpi-python mpi-venv/bin/python --rounds 30 --json collectives.json

OpenMPI takes part where `mpirun` is found and the given Python has mpi4py and numpy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

RANK = Path(__file__).with_name("collectives_rank.py")
SIZES = {"64 B": 64, "4 KB": 4 << 10, "8 KB": 8 << 10, "16 KB": 16 << 10, "256 KB": 256 << 10, "16 MB": 16 << 20}
# "native": in place, in a recorded plan.
TECO_CASES = (
    "all_reduce",
    "all_reduce, in place",
    "all_reduce_rms_norm, in place",
    "all_reduce, native",
    "all_reduce_rms_norm, native",
)


class Contestant:
    """Running ranks, and the pipes to them."""

    def __init__(self, name: str, command: list[list[str]], folder: Path, world_size: int) -> None:
        self.name = name
        paths = [folder / f"{name}.{rank}" for rank in range(world_size)]
        for path in paths:
            os.mkfifo(f"{path}.in")
            os.mkfifo(f"{path}.out")
        self._processes = [subprocess.Popen(line) for line in command]
        self._asked: list[IO[str]] = []
        self._answers: list[IO[str]] = []
        for path in paths:
            self._asked.append(open(f"{path}.in", "w"))  # noqa: SIM115 (closed in close)
            self._answers.append(open(f"{path}.out"))  # noqa: SIM115

    def time(self, case: str, num_bytes: int) -> float:
        """Seconds per call, of the slowest rank."""
        repeats = max(3, min(1000, (32 << 20) // num_bytes))
        if self.name == "gloo":
            repeats = max(3, repeats // 10)
        for pipe in self._asked:
            print(json.dumps((case, num_bytes, repeats)), file=pipe, flush=True)
        return max(float(pipe.readline()) for pipe in self._answers)

    def close(self) -> None:
        """End its processes."""
        for pipe in (*self._asked, *self._answers):
            with contextlib.suppress(OSError):
                pipe.close()
        for process in self._processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def python_ranks(name: str, folder: Path, world_size: int) -> Contestant:
    """This package, "teco", or torch's "gloo"."""
    worker = [sys.executable, str(RANK), name, str(folder), str(world_size)]
    return Contestant(name, [[*worker, "--rank", str(rank)] for rank in range(world_size)], folder, world_size)


def contestants(folder: Path, world_size: int, mpi_python: str | None) -> Iterator[Contestant]:
    """All that can be had."""
    for name in ("teco", "gloo"):
        yield python_ranks(name, folder, world_size)
    if mpi_python is None:
        return
    mpirun = shutil.which("mpirun")
    if mpirun is None or subprocess.run([mpi_python, "-c", "import mpi4py, numpy"]).returncode != 0:
        print("OpenMPI takes no part: it needs mpirun, and mpi4py and numpy in --mpi-python", file=sys.stderr)
        return
    run = [mpirun, "--bind-to", "none", "--oversubscribe", "-n", str(world_size)]
    if os.geteuid() == 0:
        run.append("--allow-run-as-root")
    yield Contestant("mpi", [[*run, mpi_python, str(RANK), "mpi", str(folder), str(world_size)]], folder, world_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--mpi-python", help="a Python with mpi4py and numpy")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    times: dict[tuple[str, str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        running = []
        for contestant in contestants(Path(folder), options.ranks, options.mpi_python):
            stack.callback(contestant.close)
            running.append(contestant)
        for _ in tqdm(range(options.rounds)):
            for size, num_bytes in SIZES.items():
                for contestant in running:
                    for case in TECO_CASES if contestant.name == "teco" else ("all_reduce",):
                        seconds = contestant.time(case, num_bytes)
                        times.setdefault((size, contestant.name, case), []).append(seconds)

    median = {key: statistics.median(values) for key, values in times.items()}
    table = Table(title=f"{options.ranks} ranks, medians of {options.rounds} rounds; load {os.getloadavg()[0]:.1f}")
    table.add_column("size")
    columns = list(dict.fromkeys(key[1:] for key in times))
    for name, case in columns:
        table.add_column(f"{name}: {case}", justify="right")
    for size, num_bytes in SIZES.items():
        cells = []
        for name, case in columns:
            seconds = median[size, name, case]
            ratio = seconds / median[size, "teco", "all_reduce"]
            cells.append(f"{seconds * 1e6:.1f} us\n{num_bytes / seconds / 1e9:.2f} GB/s\n{ratio:.2f}")
        table.add_row(size, *cells)
    table.caption = "time of a call, bytes of the tensor per second, and the time over that of teco's all_reduce"
    Console().print(table)
    if options.json:
        rows = [
            {"size": size, "contestant": name, "case": case, "median": median[size, name, case], "seconds": values}
            for (size, name, case), values in times.items()
        ]
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
