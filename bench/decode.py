"""Generates with this package and with others, in turns, and compares their speed.

Each engine lives in a process of its own, with the interpreter of the environment that it is installed in, and is
asked one run at a time: whatever else the machine does meanwhile hits all of them alike. Every run generates greedily
`--tokens` tokens for each of `--batch` sequences, after prompts of `--prompt` tokens; the median of the runs counts,
with prefill. With one token, it is the prompts' tokens that are counted.

    python bench/decode.py --engine teco --engine transformers --batch 1 --batch 16
    python bench/decode.py --engine teco --engine llama_cpp=peers/bin/python
    python bench/decode.py --prompt 512 --tokens 1
    python bench/decode.py --engine transformers --engine transformers:attention --engine transformers:gptq
    python bench/decode.py --engine vllm:bf16=.venv-vllm/bin/python --engine vllm:gptq=.venv-vllm/bin/python
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from worker_process import Worker, WorkerError

WORKERS = Path(__file__).resolve().parent / "engines"
#: Engines whose threads are OpenMP's: these must be told to stay on a core each, and may else share one.
_OPENMP = {"transformers", "llama_cpp"}


@dataclass(frozen=True)
class Load:
    """What an engine is asked to do in one run."""

    batch: int
    prompt: int
    tokens: int

    def speed(self, seconds: float) -> float:
        """Tokens per second: of the prompts when only one more is asked for, else of what is generated."""
        return self.batch * (self.prompt if self.tokens == 1 else self.tokens) / seconds


class Engine:
    """A worker process: reads ``batch prompt tokens`` lines, answers each with the seconds that the run took.

    `reason` says why it does not run (any more), or is None.
    """

    def __init__(self, spec: str, threads: int) -> None:
        self.name, _, python = spec.partition("=")
        module, *variant = self.name.split(":")
        script = WORKERS / f"{module}_engine.py"
        if not script.exists():
            raise SystemExit(f"--engine: expected one of {', '.join(sorted(known_engines()))}, got {module!r}")
        self.reason: str | None = None
        self.description = "not started"
        self._worker: Worker | None = None
        try:
            binding = {"OMP_PROC_BIND": "true"} if module in _OPENMP else {}
            environment = {"OMP_NUM_THREADS": str(threads), **binding}
            self._worker = Worker([python or sys.executable, str(script), str(threads), *variant], environment)
            self.description = self._worker.answer()["description"]
        except WorkerError as error:
            self.reason = str(error)

    def run(self, load: Load) -> float | None:
        """Tokens per second; None when the engine does not run."""
        if self._worker is None or self.reason:
            return None
        try:
            return load.speed(self._worker.ask(f"{load.batch} {load.prompt} {load.tokens}")["seconds"])
        except WorkerError as error:
            self.reason = str(error)
            return None

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()


def known_engines() -> list[str]:
    return [path.stem.removesuffix("_engine") for path in WORKERS.glob("*_engine.py")]


def race(
    engines: list[Engine], loads: list[Load], runs: int, advance: Callable[[], object] = lambda: None
) -> dict[tuple[str, Load], list[float]]:
    """Tokens per second of each run of each engine, in turns; `advance` is called after each."""
    speeds: dict[tuple[str, Load], list[float]] = {}
    for load in loads:
        for run in range(runs + 1):  # the first one warms up
            for engine in engines:
                speed = engine.run(load)
                if run and speed:
                    speeds.setdefault((engine.name, load), []).append(speed)
                advance()
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", help=f"NAME[:VARIANT][=PYTHON]; of {', '.join(known_engines())}")
    parser.add_argument("--batch", action="append", type=int, help="sequences at a time")
    parser.add_argument("--prompt", type=int, default=14, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    engines = [Engine(spec, options.threads) for spec in options.engine or ["teco", "transformers"]]
    loads = [Load(batch, options.prompt, options.tokens) for batch in options.batch or [1]]
    speeds = race(engines, loads, options.runs)
    table = Table(
        title=f"tokens/s, {options.threads} threads, {options.tokens} tokens, median of {options.runs} (range)"
    )
    table.add_column("engine")
    for load in loads:
        table.add_column(f"batch {load.batch}", justify="right")
    for engine in engines:
        cells = []
        for load in loads:
            measured = speeds.get((engine.name, load))
            cells.append(
                f"{statistics.median(measured):.1f} ({min(measured):.1f} to {max(measured):.1f})" if measured else "-"
            )
        reason = f"; stopped: {engine.reason}" if engine.reason else ""
        table.add_row(f"{engine.name}: {engine.description}{reason}", *cells)
        engine.close()
    Console().print(table)
    if options.json:
        rows = [
            {"engine": name, "batch": load.batch, "prompt": load.prompt, "tokens_per_second": measured}
            for (name, load), measured in speeds.items()
        ]
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
