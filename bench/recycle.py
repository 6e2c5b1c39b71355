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
from dataclasses import dataclass, field
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
    recycler = llm.engine.recycler = Recycler(**options)
    recycler.cost, recycler.head_cost = CountedCost(), CountedCost()
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


def predicted(mode: str, total: Total, recycler: Recycler, plain_step: float) -> float:
    """Speed-up by the formula: tokens per step over what its passes and the head's runs cost, in plain passes.

    Of single sequences; prompts are left out.
    """
    cost, head_cost = recycler.cost, recycler.head_cost
    assert isinstance(cost, CountedCost)
    assert isinstance(head_cost, CountedCost)
    steps = max(sum(cost.counts.values()), 1)
    return total.tokens / total.steps / ((cost.total() + head_cost.total()) / steps / plain_step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the 4-bit SmolLM2-135M when not given")
    parser.add_argument("--head", default="auto", help="folder of a recycle head; the one shipped when not given")
    parser.add_argument("--mode", action="append", choices=list(MODES)[1:], help="lookup and both when not given")
    parser.add_argument("--prompts", type=int, default=10, help="of each set")
    parser.add_argument("--tokens", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--batch", action="append", type=int, help="prompts at a time; 1 when not given")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    path = options.model or default_quantized_model()
    settings = {"num_threads": options.threads, "max_model_len": 2048}
    params = SamplingParams(temperature=0, max_tokens=options.tokens)
    modes = options.mode or ["lookup", "both"]
    sets = prompt_sets(load_source(path).tokenizer, options.prompts)
    sets["all"] = []

    names = ["batch", "prompts", "mode", "tok/s", "speed-up", "predicted", "tok/step", "accepted", "different"]
    names += ["perplexity"] if "strict" in modes else []
    table = Table(*names, min_width=100, title=f"greedy, up to {options.tokens} tokens, {options.threads} threads")
    rows: list[dict[str, Any]] = []
    batches = options.batch or [1]
    sums: dict[str, Total] = {}
    with tqdm(total=len(batches) * (len(sets) - 1)) as progress:
        for batch in batches:
            sums = {name: Total() for name in ("plain", *modes)}
            for set_name, prompts in sets.items():
                # New ones for each set and size: what they have learned from others is not theirs.
                llms = {mode: make(path, mode, options.head, **settings) for mode in ("plain", *modes)}
                warm_up = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
                for llm in llms.values():
                    run(llm, [[1, 2, 3] * 5] * batch, warm_up)
                totals = compare(llms, prompts, batch, params) if prompts else sums
                assert llms["plain"].engine.recycler is not None
                plain_step = llms["plain"].engine.recycler.cost(batch)
                for name, total in totals.items():
                    for field_name, value in vars(total).items() if prompts else ():
                        setattr(sums[name], field_name, getattr(sums[name], field_name) + value)
                    speedup = total.rate / totals["plain"].rate
                    recycler = llms[name].engine.recycler
                    forecast = ""
                    if name != "plain" and prompts and recycler is not None and batch == 1:
                        forecast = f"{predicted(name, total, recycler, plain_step):.2f}"
                    row = [str(batch), set_name, name, f"{total.rate:.0f}", f"{speedup:.2f}", forecast]
                    accepted = f"{total.accepted / total.guessed:.0%}" if total.guessed else ""
                    row += [f"{total.tokens / total.steps:.2f}", accepted, str(total.different)]
                    row += [f"{total.perplexity:.2f}" if total.logprobs else ""] if "strict" in modes else []
                    table.add_row(*row, end_section=name == modes[-1])
                    figures = {key: value for key, value in vars(total).items() if key != "logprobs"}
                    rows.append({"batch": batch, "prompts": set_name, "mode": name, "speedup": speedup, **figures})
                    if recycler is not None and prompts and batch == 1:
                        steps = {n: recycler.cost(n) / plain_step for n in range(1, 6) if recycler.cost.knows(n)}
                        rows[-1] |= {"step_cost": steps, "plain_step_ms": plain_step * 1e3}
                        if recycler.head_cost.knows(1):
                            rows[-1]["head_cost"] = recycler.head_cost(1) / plain_step
                progress.update(bool(prompts))
    Console().print(table)
    for row in rows:
        if "step_cost" in row and row["mode"] != "plain":
            steps = ", ".join(f"{n}: {value:.2f}" for n, value in row["step_cost"].items())
            head = f"; a run of the head {row['head_cost']:.3f}" if "head_cost" in row else ""
            print(
                f"{row['prompts']}, {row['mode']}: a step by its tokens, over a plain one of "
                f"{row['plain_step_ms']:.2f} ms: {steps}{head}"
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
