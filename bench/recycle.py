"""Decodes plainly and with recycled tokens, in turns, and compares speed and text.

All get the same prompts, one after the other (`--batch`: so many at a time), and generate greedily; neither order nor
load of the machine favours one. With verification the texts must be equal. Modes:

    lookup   context lookup alone
    head     the recycle head alone
    both     lookup, and the head where lookup has nothing to say or is less sure
    strict   the head's word counts unasked, every other token, as in the RecycleGPT paper: another text

    python bench/recycle.py --prompts 10 --tokens 256 --mode lookup --mode head --mode both
    python bench/recycle.py --prompts 32 --batch 1 --batch 8 --batch 32
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prompts import prompt_sets
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from teco_kernels import LLM, SamplingParams
from teco_kernels.decoder.loader import load_source
from teco_kernels.decoder.recycler import Recycler, StepCost
from teco_kernels.quantization import default_quantized_model

MODES: dict[str, dict[str, Any]] = {
    "plain": {"max_tokens": 0, "lookup": False},  # guesses nothing, but has its steps measured
    "lookup": {},
    "head": {"lookup": False, "head": True},
    "both": {"head": True},
    "strict": {"head": True, "verify": False},
}


class CountedCost(StepCost):
    """Also counts the steps of each size."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()

    def add(self, num_tokens: int, seconds: float) -> None:
        super().add(num_tokens, seconds)
        self.counts[num_tokens] += 1

    def total(self) -> float:
        """Seconds of all steps, each taken for the latest median of its size."""
        return sum(count * self(size) for size, count in self.counts.items())


@dataclass
class Total:
    """Of one mode on one set of prompts, over its batches."""

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    guessed: int = 0
    accepted: int = 0
    different: int = 0
    logprobs: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def perplexity(self) -> float:
        return math.exp(-sum(self.logprobs) / max(len(self.logprobs), 1))


def make(path: Path, mode: str, head: str | None, **settings: Any) -> LLM:
    """A model of its own, which has seen no prompt yet."""
    options = MODES[mode]
    with_head = options.get("head", False)
    verify = options.get("verify", True)
    llm = LLM(path, recycle_head=head if with_head else "lookup", recycle_verify=verify, **settings)
    llm.engine.scheduler.enable_prefix_caching = False  # the same prompts come again with another batch size
    llm.engine.recycler = Recycler(**options)
    return llm


def run(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - started, [output.outputs[0].token_ids for output in outputs]


def compare(llms: dict[str, LLM], prompts: list[list[int]], batch: int, params: SamplingParams) -> dict[str, Total]:
    """All modes on all prompts; the first is plain decoding. Every batch begins with another one."""
    totals = {name: Total() for name in llms}
    names = list(llms)
    for number, start in enumerate(range(0, len(prompts), batch)):
        chosen = prompts[start : start + batch]
        texts: dict[str, list[list[int]]] = {}
        first = number % len(names)
        for name in names[first:] + names[:first]:
            total, before = totals[name], llms[name].metrics()
            seconds, texts[name] = run(llms[name], chosen, params)
            after = llms[name].metrics()
            total.seconds += seconds
            total.tokens += sum(map(len, texts[name]))
            total.steps += after["steps"] - before["steps"]
            total.guessed += after["guessed_tokens"] - before["guessed_tokens"]
            total.accepted += after["accepted_tokens"] - before["accepted_tokens"]
        for name, total in totals.items():
            total.different += sum(a != b for a, b in zip(texts[names[0]], texts[name], strict=True))
            if name in (names[0], "strict") and "strict" in names:
                for prompt, text in zip(chosen, texts[name], strict=True):
                    total.logprobs += llms[names[0]].score(prompt + text)[len(prompt) - 1 :]
    return totals


@dataclass
class Row:
    """A mode's total beside that of plain decoding; `predicted` and `costs`: of single sequences, prompts left out.

    `predicted` is the speed-up by the formula: tokens per step over what its passes and the head's runs cost, in plain
    passes. `costs`: of a step by its number of tokens, and of a run of the head, in plain passes.
    """

    batch: int
    prompts: str
    mode: str
    total: Total
    speedup: float
    predicted: float | None = None
    plain_step_ms: float | None = None
    costs: dict[str, float] = field(default_factory=dict)

    def cells(self) -> list[str]:
        total = self.total
        return [
            str(self.batch),
            self.prompts,
            self.mode,
            f"{total.rate:.0f}",
            f"{self.speedup:.2f}",
            f"{self.predicted:.2f}" if self.predicted else "",
            f"{total.tokens / total.steps:.2f}",
            f"{total.accepted / total.guessed:.0%}" if total.guessed else "",
            str(total.different),
            f"{total.perplexity:.2f}" if total.logprobs else "",
        ]


def measured(
    llms: dict[str, LLM], prompts: list[list[int]], batch: int, set_name: str, params: SamplingParams
) -> list[Row]:
    """All modes on one set of prompts."""
    for llm in llms.values():  # the sizes of steps that every run has are recorded
        run(llm, [[1, 2, 3] * 5] * batch, SamplingParams(temperature=0, max_tokens=32, ignore_eos=True))
    recyclers = {name: llm.engine.recycler for name, llm in llms.items()}
    for recycler in recyclers.values():
        assert recycler is not None
        recycler.cost, recycler.head_cost, recycler.silent_cost = CountedCost(), CountedCost(), CountedCost()
    rows = []
    for name, total in compare(llms, prompts, batch, params).items():
        rows.append(Row(batch, set_name, name, total, 1.0 if not rows else total.rate / rows[0].total.rate))
        recycler, plain = recyclers[name], recyclers["plain"]
        if batch == 1 and recycler is not None and plain is not None:
            plain_step = plain.cost(1)
            costs = [recycler.cost, recycler.head_cost, recycler.silent_cost]
            assert all(isinstance(cost, CountedCost) for cost in costs)
            steps = recycler.cost.counts.total()  # type: ignore[attr-defined]
            seconds = sum(cost.total() for cost in costs)  # type: ignore[attr-defined]
            rows[-1].predicted = total.tokens / total.steps / (seconds / steps / plain_step)
            rows[-1].plain_step_ms = plain_step * 1e3
            rows[-1].costs = {str(n): recycler.cost(n) / plain_step for n in range(1, 6) if recycler.cost.knows(n)}
            if recycler.head_cost.knows(1):
                rows[-1].costs["head"] = recycler.head_cost(1) / plain_step
    return rows


def overall(rows: list[Row]) -> list[Row]:
    """The modes on all sets together."""
    sums: dict[str, Total] = {}
    for row in rows:
        total = sums.setdefault(row.mode, Total())
        for name, value in vars(row.total).items():
            setattr(total, name, getattr(total, name) + value)
    plain = next(iter(sums.values()))
    return [Row(rows[0].batch, "all", mode, total, total.rate / plain.rate) for mode, total in sums.items()]


def print_table(rows: list[Row], title: str) -> None:
    names = ["batch", "prompts", "mode", "tok/s", "speed-up", "predicted", "tok/step", "accepted", "different", "ppl"]
    table = Table(*names, min_width=100, title=title)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(*row.cells(), end_section=following is None or following.prompts != row.prompts)
    Console().print(table)
    for row in rows:
        if row.costs and row.plain_step_ms and row.mode != "plain":
            costs = ", ".join(f"{name}: {value:.2f}" for name, value in row.costs.items())
            print(
                f"{row.prompts}, {row.mode}: steps by tokens, over a plain one of {row.plain_step_ms:.2f} ms: {costs}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the 4-bit SmolLM2-135M when not given")
    parser.add_argument("--head", default="auto", help="folder of a recycle head; the one shipped when not given")
    parser.add_argument("--mode", action="append", choices=list(MODES)[1:], help="lookup and both when not given")
    parser.add_argument(
        "--set", action="append", help="of prompts: MT-bench, HumanEval or Wikipedia; all when not given"
    )
    parser.add_argument("--prompts", type=int, default=10, help="of each set")
    parser.add_argument("--tokens", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--batch", action="append", type=int, help="prompts at a time; 1 when not given")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    path = options.model or default_quantized_model()
    settings = {"num_threads": options.threads, "max_model_len": 2048}
    params = SamplingParams(temperature=0, max_tokens=options.tokens)
    modes = ["plain", *(options.mode or ["lookup", "both"])]
    sets = prompt_sets(load_source(path).tokenizer, options.prompts)
    if unknown := set(options.set or ()) - set(sets):
        parser.error(f"--set: expected some of {', '.join(sets)}; got {', '.join(sorted(unknown))}")
    sets = {name: prompts for name, prompts in sets.items() if name in (options.set or sets)}
    rows: list[Row] = []
    tasks = [(batch, name) for batch in options.batch or [1] for name in sets]
    for batch, name in tqdm(tasks, unit="set"):
        # New ones for each set and size: what they have learned from others is not theirs.
        llms = {mode: make(path, mode, options.head, **settings) for mode in modes}
        rows += measured(llms, sets[name], batch, name, params)
        if name == list(sets)[-1] and len(sets) > 1:
            rows += overall(rows[-len(sets) * len(modes) :])
    print_table(rows, f"greedy, up to {options.tokens} tokens, {options.threads} threads")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
