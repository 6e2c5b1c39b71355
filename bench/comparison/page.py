"""docs/performance.md: what the tables need to be read with, and the tables."""

from __future__ import annotations

from typing import Any

from problems import Attention, Matmul

from comparison.plan import OWN
from comparison.results import Limits, Result
from comparison.tables import PLACES, engine_table, kernel_table, unique

_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}

_INTRODUCTION = """# Performance beside others

Made by `make bench-peers` in one run of {minutes:.0f} minutes on {date}: kernels of this package and of others in
turns, each in a process of its own, on the same numbers, with {threads} threads.{quick}

![{own} and its peers]({picture})

The machine: {processor}, {cores} cores, {l3} MiB of last-level cache as the system tells, {system}; {instruction_set}
kernels; load {load} before the run. What it gives at its best, measured between the kernels with loops that do
nothing else (`csrc/cpu/ceilings.cpp`):

| reading memory | reading {half} MiB again and again | fp32 multiply-adds | 8-bit multiply-adds |
|---|---|---|---|
| {memory:.1f} GB/s | {cache:.1f} GB/s | {fp32:.0f} GFLOP/s | {int8:.0f} GOP/s |

A cell is the median time of one call over {rounds} rounds, with the quartiles of the rounds; the fastest kernel of a
column is bold. The percentage behind ours is the share of what the machine allows: the shortest time at the limits
above, for the bytes of the operand and of what goes in and out and for the arithmetic of its kind, over the time
taken. "Error" is ||out - ref|| / ||ref|| against float64, on the dequantised weight, for the fewest rows of the table.
"""

_MATMULS = """## Products by 4-bit weights

All hold the very same weight (zero points in the middle, scales with the precision of bf16), except that Q4_K rounds it
to its own grid and bf16 to its own precision. llama.cpp's blocks have 32 inputs whatever the group size, hence more
bits per weight. "From memory": copies of the weight take turns and fill the last-level cache four times over. "In L3":
together they take up to half of it.

ONNX Runtime, OpenVINO, llama.cpp and our int8 mode round activations to 8 bits within the call; torch's kernels take
them in bf16 or fp32. Q4_0 and Q4_K are repacked for llama.cpp's fastest kernels; it has none for Q4_1. The copies are
walked by one graph (ONNX Runtime, OpenVINO, llama.cpp) or one recorded plan (ours, as the decoder loop does it);
torch's operators are called from Python.
"""

_ATTENTION = """## Attention

{heads} query heads, {kv_heads} heads of keys and values, head_dim {head_dim}. Ours and vLLM's go through a block table
whose blocks lie in random order (of 16 and of 128 positions); torch's keys and values lie in one piece, heads
outermost; llama.cpp's as in its cache. In place of bf16, llama.cpp has an fp16 cache and fp32 queries. Decode: one
query token per sequence, copies of the cache taking turns.
"""

_END_TO_END = """## SmolLM2-135M-Instruct end to end

Tokens per second (`bench/decode.py`), greedy, prompts of random tokens that no engine has seen before; median and range
of the runs. Of a prompt, its tokens are counted; else those generated, the time for the prompt included.

{table}"""


def document(report: dict[str, Any], results: list[Result], limits: Limits, picture: str) -> str:
    """The whole page."""
    machine, settings = report["machine"], report["settings"]
    parts = [
        _INTRODUCTION.format(
            **(machine | {name: settings[name] for name in ("minutes", "date", "threads", "rounds")}),
            quick=" **A quick look of few rounds: no figures to cite.**" if settings["quick"] else "",
            own=OWN,
            picture=picture,
            l3=machine["l3_bytes"] >> 20,
            half=machine["l3_bytes"] >> 21,
            **{name: rate / 1e9 for name, rate in vars(limits).items()},
        )
    ]
    matmuls = [result for result in results if isinstance(result.problem, Matmul)]
    parts += [_MATMULS] if matmuls else []
    for problem, residence in unique((r.problem, r.residence) for r in matmuls):
        sizes = f"{problem.in_features} inputs, {problem.out_features} outputs, groups of {problem.group_size}"
        chosen = [r for r in matmuls if (r.problem, r.residence) == (problem, residence)]
        parts.append(f"### {sizes}: {PLACES[residence]}\n\n{kernel_table(chosen, limits)}")
    attentions = [result for result in results if isinstance(result.problem, Attention)]
    parts += [_ATTENTION.format(**vars(attentions[0].problem))] if attentions else []
    for dtype, residence in unique((r.problem.dtype, r.residence) for r in attentions):
        chosen = [r for r in attentions if (r.problem.dtype, r.residence) == (dtype, residence)]
        name = "Decode" if residence == "memory" else "Causal prefill"
        parts.append(f"### {name}, {_DTYPES[dtype]}\n\n{kernel_table(chosen, limits)}")
    if report["end_to_end"]:
        parts.append(_END_TO_END.format(table=engine_table(report["end_to_end"])))
    versions = "\n".join(f"| {name} | {text} |" for name, text in report["peers"].items())
    parts.append(f"## Versions\n\n| | |\n|---|---|\n| torch beside {OWN} | {machine['torch']} |\n{versions}\n")
    return "\n".join(parts)
