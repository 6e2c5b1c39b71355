"""Times the kernels of this package and of others in turns, and writes docs/performance.{json,png,md}.

Peers live in environments of their own, which `make bench-peers` makes. One that is missing, refuses or crashes becomes
a row that says why.

    python bench/compare_peers.py --peers .venv-peers/bin/python --vllm .venv-vllm/bin/python
    python bench/compare_peers.py --quick --out build/bench-peers
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from comparison.bars import draw
from comparison.page import document
from comparison.plan import FULL, PEERS, QUICK, Task
from comparison.results import Limits, Result
from comparison.rounds import LimitProber, Setting, Team, run_task
from decode import Engine, Load, race
from tqdm import tqdm

from teco_kernels.assets import AssetError
from teco_kernels.quantization import default_quantized_model
from teco_kernels.testing.machine import facts

LOADS = [Load(batch=1, prompt=512, tokens=1), Load(batch=1, prompt=14, tokens=64), Load(batch=8, prompt=14, tokens=64)]
QUICK_LOADS = [Load(batch=1, prompt=14, tokens=16)]
#: Of each of the machine's limits, at the start and after each task: it shows its best only at times.
_LIMIT_SECONDS = 0.25
ENGINES = ("teco", "llama_cpp", "transformers")


class Run:
    """A run and what it has given so far; every task that is done is written at once."""

    def __init__(self, setting: Setting, quick: bool, folder: Path) -> None:
        self.setting, self.quick, self.folder = setting, quick, folder
        self.results: list[Result] = []
        self.end_to_end: list[dict[str, Any]] = []
        self.peers: dict[str, str] = {}
        self._start, self._date, self._machine = time.time(), time.strftime("%Y-%m-%d"), facts()
        self._prober = LimitProber()
        self.limits: Limits = self._prober.measure(_LIMIT_SECONDS)

    def kernels(self, kind: str, tasks: list[Task], bar: tqdm) -> None:
        """Time all tasks of a kind."""
        peers = [peer for peer in PEERS if peer.kind == kind]
        team = Team(peers, self.setting)
        try:
            for name, text in team.descriptions.items():
                self.peers[name] = text
            for name, reason in team.reasons.items():
                self.peers[name] = f"not measured: {reason}"
            for task in tasks:
                bar.set_description(task.name)
                self.results += run_task(task, peers, team, self.setting, bar.update)
                self.limits |= self._prober.measure(_LIMIT_SECONDS)
                self.write()
        finally:
            team.close()

    def engines(self, loads: list[Load], bar: tqdm) -> None:
        """Time the whole model, in this package and in others."""
        bar.set_description("end to end")
        with contextlib.suppress(AssetError):  # then the engines say what is missing
            default_quantized_model()
        specs = [f"llama_cpp={self.setting.pythons['peers']}" if name == "llama_cpp" else name for name in ENGINES]
        engines = [Engine(spec, self.setting.threads) for spec in specs]
        runs = max(2, self.setting.rounds // 2)
        speeds = race(engines, loads, runs, bar.update)
        for engine in engines:
            engine.close()
            for load in loads:
                measured = speeds.get((engine.name, load), [])
                self.end_to_end.append(
                    {
                        "engine": f"{engine.name} {engine.description}",
                        "load": vars(load),
                        "tokens_per_second": measured,
                        "median": statistics.median(measured) if measured else None,
                        "low": min(measured, default=None),
                        "high": max(measured, default=None),
                        "reason": None if measured else engine.reason,
                    }
                )
        self.write()

    def write(self) -> None:
        """The JSON file, the picture and the page."""
        report = {
            "machine": self._machine,
            "settings": {
                "date": self._date,
                "minutes": (time.time() - self._start) / 60,
                "threads": self.setting.threads,
                "rounds": self.setting.rounds,
                "seconds": self.setting.seconds,
                "quick": self.quick,
            },
            "limits": vars(self.limits),
            "peers": self.peers,
            "results": [result.as_json() for result in self.results],
            "end_to_end": self.end_to_end,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "performance.json").write_text(json.dumps(report, indent=1) + "\n")
        picture = self.folder / "performance.png"
        threads, rounds = self.setting.threads, self.setting.rounds
        title = f"{self._machine['processor']}, {threads} threads; medians and quartiles of {rounds} rounds"
        draw(self.results, self.limits, title, picture)
        page = document(report, self.results, self.limits, picture.name)
        (self.folder / "performance.md").write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=".venv-peers/bin/python", help="interpreter that has the peers")
    parser.add_argument("--vllm", default=".venv-vllm/bin/python", help="interpreter that has vLLM")
    parser.add_argument("--quick", action="store_true", help="a minute: few shapes, few rounds")
    parser.add_argument("--only", choices=("matmul", "attention", "end-to-end"), action="append")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="9, or 3 when quick")
    parser.add_argument("--seconds", type=float, help="of one run of a peer, about: 0.2, or 0.05 when quick")
    parser.add_argument("--out", type=Path, help="folder; docs, or build/bench-peers when quick")
    options = parser.parse_args()
    pythons = {"own": sys.executable, "peers": options.peers, "vllm": options.vllm}
    rounds = options.rounds or (3 if options.quick else 9)
    seconds = options.seconds or (0.05 if options.quick else 0.2)
    torch.set_num_threads(options.threads)
    folder = options.out or Path("build/bench-peers" if options.quick else "docs")
    run = Run(Setting(pythons, options.threads, rounds, seconds), options.quick, folder)
    tasks = QUICK if options.quick else FULL
    loads = QUICK_LOADS if options.quick else LOADS
    wanted = options.only or ["matmul", "attention", "end-to-end"]
    kinds = {kind: [task for task in tasks if task.problem.kind == kind] for kind in wanted if kind != "end-to-end"}
    steps = sum(len(task.rows) * sum(p.kind == kind for p in PEERS) for kind, some in kinds.items() for task in some)
    steps *= rounds
    steps += len(loads) * (max(2, rounds // 2) + 1) * len(ENGINES) if "end-to-end" in wanted else 0
    with tqdm(total=steps, unit="run") as bar:
        for kind, some in kinds.items():
            run.kernels(kind, some, bar)
        if "end-to-end" in wanted:
            run.engines(loads, bar)
    print(f"{folder}/performance.md, .json, .png: {(time.time() - run._start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
