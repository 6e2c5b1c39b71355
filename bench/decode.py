"""Generates with this package and with others, in turns, and compares their speed.

Each engine lives in a process of its own, with the interpreter of the environment that it is installed in, and is
asked one run at a time: whatever else the machine does meanwhile hits all of them alike. Every run generates greedily
from the same prompt, `--tokens` tokens for each of `--batch` sequences; the median of the runs counts, with prefill.

    python bench/decode.py --engine teco --engine transformers --batch 1 --batch 16
    python bench/decode.py --engine teco --engine llama_cpp=peers/bin/python
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

WORKERS = Path(__file__).resolve().parent / "engines"


class Engine:
    """A worker process: reads ``batch tokens`` lines, answers each with the seconds that the run took."""

    def __init__(self, spec: str, threads: int) -> None:
        self.name, _, python = spec.partition("=")
        script = WORKERS / f"{self.name}_engine.py"
        if not script.exists():
            raise SystemExit(f"--engine: expected one of {', '.join(sorted(known_engines()))}, got {self.name!r}")
        self.process = subprocess.Popen(
            [python or sys.executable, str(script), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.description = self._answer()["description"]

    def run(self, batch: int, tokens: int) -> float | None:
        """Seconds; None when the engine cannot."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{batch} {tokens}\n")
        self.process.stdin.flush()
        seconds = self._answer()["seconds"]
        return None if seconds is None else float(seconds)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, object]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, object] = json.loads(line)
                return answer
        raise SystemExit(f"{self.name}: ended with code {self.process.wait()} before it answered")


def known_engines() -> list[str]:
    return [path.stem.removesuffix("_engine") for path in WORKERS.glob("*_engine.py")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", help=f"NAME or NAME=PYTHON; of {', '.join(known_engines())}")
    parser.add_argument("--batch", action="append", type=int, help="sequences at a time")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    engines = [Engine(spec, options.threads) for spec in options.engine or ["teco", "transformers"]]
    batches = options.batch or [1]
    table = Table(
        title=f"tokens/s, {options.threads} threads, {options.tokens} tokens, median of {options.runs} (range)"
    )
    table.add_column("engine")
    for batch in batches:
        table.add_column(f"batch {batch}", justify="right")
    speeds: dict[tuple[str, int], list[float]] = {}
    for batch in batches:
        for run in range(options.runs + 1):  # the first one warms up
            for engine in engines:
                seconds = engine.run(batch, options.tokens)
                if run and seconds:
                    speeds.setdefault((engine.name, batch), []).append(batch * options.tokens / seconds)
    for engine in engines:
        cells = []
        for batch in batches:
            measured = speeds.get((engine.name, batch))
            cells.append(
                f"{statistics.median(measured):.1f} ({min(measured):.1f} to {max(measured):.1f})" if measured else "-"
            )
        table.add_row(f"{engine.name}: {engine.description}", *cells)
        engine.close()
    Console().print(table)
    if options.json:
        rows = [{"engine": name, "batch": batch, "tokens_per_second": s} for (name, batch), s in speeds.items()]
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
