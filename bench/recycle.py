"""Decodes plainly and with recycled tokens, in turns, and compares speed and text.

Both get the same prompts, one after the other (`--batch`: so many at a time), and generate greedily; neither order nor
load of the machine favours one. The texts must be equal.

    python bench/recycle.py --prompts 10 --tokens 256
    python bench/recycle.py --prompts 32 --batch 1 --batch 8 --batch 32
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

from prompts import prompt_sets
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from teco_kernels import LLM, SamplingParams
from teco_kernels.quantization import default_quantized_model


@dataclass
class Total:
    """Of one set of prompts, over its batches."""

    plain_seconds: float = 0.0
    recycled_seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    guessed: int = 0
    accepted: int = 0
    different: int = 0

    @property
    def speedup(self) -> float:
        return self.plain_seconds / self.recycled_seconds

    def row(self) -> list[str]:
        return [
            f"{self.tokens / self.plain_seconds:.0f}",
            f"{self.tokens / self.recycled_seconds:.0f}",
            f"{self.speedup:.2f}",
            f"{self.tokens / self.steps:.2f}",
            f"{self.accepted / max(self.guessed, 1):.0%}",
            str(self.different),
        ]


def run(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - started, [output.outputs[0].token_ids for output in outputs]


def compare(plain: LLM, recycled: LLM, prompts: list[list[int]], batch: int, params: SamplingParams) -> Total:
    total = Total()
    for number, start in enumerate(range(0, len(prompts), batch)):
        chosen = prompts[start : start + batch]
        before = recycled.metrics()
        results = {}
        for llm in (plain, recycled) if number % 2 else (recycled, plain):
            results[llm] = run(llm, chosen, params)
        after = recycled.metrics()
        total.plain_seconds += results[plain][0]
        total.recycled_seconds += results[recycled][0]
        total.tokens += sum(map(len, results[plain][1]))
        total.steps += after["steps"] - before["steps"]
        total.guessed += after["guessed_tokens"] - before["guessed_tokens"]
        total.accepted += after["accepted_tokens"] - before["accepted_tokens"]
        total.different += sum(a != b for a, b in zip(results[plain][1], results[recycled][1], strict=True))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the 4-bit SmolLM2-135M when not given")
    parser.add_argument("--prompts", type=int, default=10, help="of each set")
    parser.add_argument("--tokens", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--batch", action="append", type=int, help="prompts at a time; 1 when not given")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    path = options.model or default_quantized_model()
    settings = {"num_threads": options.threads, "max_model_len": 2048}
    plain, recycled = LLM(path, **settings), LLM(path, recycle_head="lookup", **settings)
    params = SamplingParams(temperature=0, max_tokens=options.tokens)
    sets = prompt_sets(plain.tokenizer, options.prompts)
    warm_up = SamplingParams(temperature=0, max_tokens=32)
    for llm in (plain, recycled):
        run(llm, [next(iter(sets.values()))[0]], warm_up)

    table = Table(title=f"greedy, up to {options.tokens} tokens, {options.threads} threads")
    for column in (
        "batch",
        "prompts",
        "plain tok/s",
        "recycled tok/s",
        "speed-up",
        "tok/step",
        "accepted",
        "different",
    ):
        table.add_column(column, justify="right")
    rows = []
    batches = options.batch or [1]
    with tqdm(total=len(batches) * len(sets)) as progress:
        for batch in batches:
            for name, prompts in sets.items():
                total = compare(plain, recycled, prompts, batch, params)
                table.add_row(str(batch), name, *total.row())
                rows.append({"batch": batch, "prompts": name, "speedup": total.speedup, **vars(total)})
                progress.update()
    Console().print(table)
    cost = recycled.engine.recycler.cost if recycled.engine.recycler else None
    if cost and 1 in cost:
        times = ", ".join(f"{size}: {cost(size) / cost(1):.2f}" for size in range(2, 6) if size in cost)
        print(f"time of a step by its tokens, over that of one ({cost(1) * 1e3:.2f} ms): {times}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
