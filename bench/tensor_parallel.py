"""Step times of a model shared by ranks, in turns with those of one process, beside what a model of cost predicts.

    python bench/tensor_parallel.py MODEL
    python bench/tensor_parallel.py MODEL --ranks 1 2 3 --rounds 20 --json tensor-parallel.json

A decode step of one request. The prediction: what one rank takes with one thread, times the share of the bytes that the
slowest rank reads in each phase between two collectives, but not less than what one process takes with a thread on
every core, as the memory is one for all; a collective per phase; and what is spent outside of a step's plan.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from teco_kernels import LLM, SamplingParams
from teco_kernels.decoder import runner
from teco_kernels.decoder.loader import load_source
from teco_kernels.decoder.model import Transformer
from teco_kernels.decoder.shard import Shard
from teco_kernels.ops import Plan

PROMPT = list(range(5, 25))


def phases(path: Path, world_size: int, activation: Any) -> list[list[int]]:
    """Bytes of weights that each rank reads, per phase of a step: between two collectives nobody waits."""
    source = load_source(path)
    ranks = []
    for rank in range(world_size):
        shard = Shard.of(source.config, rank, world_size)
        model = Transformer(source, dtype=torch.float32, max_model_len=64, activation=activation, shard=shard)
        parts = []
        for layer in model.stack.layers:
            parts += [layer.qkv.nbytes + layer.output.nbytes, layer.gate_up.nbytes + layer.down.nbytes]
        ranks.append([*parts, model.lm_head.nbytes])
    return [list(phase) for phase in zip(*ranks, strict=True)]


def milliseconds(llm: LLM, num_tokens: int) -> float:
    """Of a step, that of a decode stream of so many tokens."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    llm.generate([PROMPT], replace(params, max_tokens=4), use_tqdm=False)  # awake, with warm caches
    started = time.perf_counter()
    llm.generate([PROMPT], params, use_tqdm=False)
    return (time.perf_counter() - started) / num_tokens * 1e3


class TimedPlan(Plan):
    """Adds up the time of all replays."""

    seconds = 0.0

    def replay(self) -> None:
        started = time.perf_counter()
        super().replay()
        TimedPlan.seconds += time.perf_counter() - started


def outside_plan(llm: LLM, num_tokens: int) -> float:
    """Milliseconds of a step in which no kernels run."""
    before = TimedPlan.seconds
    whole = milliseconds(llm, num_tokens) * num_tokens
    return (whole - (TimedPlan.seconds - before) * 1e3) / num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--collective-us", type=float, default=1.5, help="of an all_reduce_rms_norm of a token")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runner.Plan = TimedPlan  # type: ignore[misc]
    cores = len(os.sched_getaffinity(0))

    contestants = {f"{n} ranks, 1 thread each": (n, 1) for n in options.ranks}
    contestants[f"1 process, {cores} threads"] = (1, cores)
    llms = {
        name: LLM(options.model, tensor_parallel_size=n, num_threads=threads, max_model_len=512)
        for name, (n, threads) in contestants.items()
    }
    times: dict[str, list[float]] = {name: [] for name in llms}
    torch.set_num_threads(1)
    one = next(name for name, of in contestants.items() if of == (1, 1))
    outside: list[float] = []
    for _ in range(options.rounds):
        for name, llm in llms.items():
            torch.set_num_threads(contestants[name][1])
            times[name].append(milliseconds(llm, options.tokens))
        torch.set_num_threads(1)
        outside.append(outside_plan(llms[one], options.tokens))
    medians = {name: statistics.median(values) for name, values in times.items()}
    fixed = statistics.median(outside)

    table = Table("", "measured, ms", "predicted, ms", "share of the slowest rank", "collectives")
    results: dict[str, Any] = {}
    together = next(name for name, of in contestants.items() if of == (1, cores))
    for name, (n, _) in contestants.items():
        parts = phases(options.model, n, "int8")
        share = sum(map(max, parts)) / sum(map(sum, parts))
        # Of two phases per layer the ends, and the embedding; the two of the head's result.
        collectives = len(parts) + 2 if n > 1 else 0
        predicted = medians[name]
        if n > 1:
            crowd = max(1.0, n / cores)
            alone = (medians[one] - fixed) * share * crowd
            predicted = fixed + max(alone, medians[together] - fixed) + collectives * options.collective_us * 1e-3
        results[name] = {"measured": medians[name], "predicted": predicted, "share": share}
        table.add_row(name, f"{medians[name]:.2f}", f"{predicted:.2f}", f"{share:.3f}", str(collectives))
    Console().print(table)
    for llm in llms.values():
        llm.close()
    if options.json:
        options.json.write_text(json.dumps({"milliseconds": times, "fixed": fixed, "results": results}, indent=1))


if __name__ == "__main__":
    main()
