"""The tables of docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from comparison.plan import OWN, Problem
from comparison.results import Limits, Result, operations, shortest_time
from decode import Load
from problems import Attention, Matmul

PLACES = {"memory": "weights from memory", "L3": "weights in L3", "once": "one copy of the weights"}


def document(report: dict[str, Any], results: list[Result], limits: Limits, picture: str) -> str:
    """The whole page."""
    machine, settings = report["machine"], report["settings"]
    quick = " **A quick look of few rounds: no figures to cite.**" if settings["quick"] else ""
    parts = [
        f"""# Performance beside others

Made by `make bench-peers` in one run of {settings["minutes"]:.0f} minutes on {settings["date"]}: kernels of this package
and of others in turns, each in a process of its own, on the same numbers with {settings["threads"]} threads.{quick}

![{OWN} and its peers]({picture})

The machine: {machine["processor"]}, {machine["cores"]} cores, {machine["l3_bytes"] >> 20} MiB of L3 as the system tells,
{machine["system"]}; {machine["instruction_set"]} kernels; load {machine["load"]} before the run. What it gives at its best, measured
between the kernels with loops that do nothing else (`csrc/cpu/ceilings.cpp`):

| reading memory | reading {machine["l3_bytes"] >> 21} MiB again and again | fp32 multiply-adds | 8-bit multiply-adds |
|---|---|---|---|
| {limits.memory / 1e9:.1f} GB/s | {limits.cache / 1e9:.1f} GB/s | {limits.fp32 / 1e9:.0f} GFLOP/s | {limits.int8 / 1e9:.0f} GOP/s |

How to read the tables: a cell is the median time of one call over {settings["rounds"]} rounds, and the quartiles of the rounds.
The percentage behind ours is the share of what the machine allows: the shortest time at the limits above (bytes of
the operand and of what goes in and out, and arithmetic of its kind), over the time taken. The fastest kernel of a column
is bold (dense weights and exact arithmetic take part). "Error" is ||out - ref|| / ||ref|| against the float64 product by the dequantised
weight, or float64 attention, with the fewest rows of the table.
"""
    ]
    matmuls = [result for result in results if isinstance(result.problem, Matmul)]
    if matmuls:
        parts.append(
            """## Products by 4-bit weights

All hold the very same weight (zero point in the middle, scales with the precision of bf16), except that Q4_K rounds it
to its own grid. llama.cpp's Q4_0 and Q4_1 have blocks of 32 inputs whatever the group size, hence more bits per weight. "From memory":
copies of the weight take turns and fill the last-level cache more than four times. "In L3": together they take half of it.
Activations of ONNX Runtime, OpenVINO, llama.cpp and of our int8 mode are rounded to 8 bits in the call; torch's kernels take bf16
or fp32. llama.cpp's Q4_0 and Q4_K are repacked for its fastest kernels; it has none for Q4_1.
"""
        )
        for key in _unique((r.problem, r.residence) for r in matmuls):
            problem, residence = key
            chosen = [r for r in matmuls if (r.problem, r.residence) == key]
            heading = f"### {problem.in_features} inputs, {problem.out_features} outputs, groups of {problem.group_size}"
            parts.append(f"{heading}: {PLACES[residence]}\n\n{_kernel_table(chosen, limits)}")
    attentions = [result for result in results if isinstance(result.problem, Attention)]
    if attentions:
        sizes = attentions[0].problem
        parts.append(
            f"""## Attention

{sizes.heads} query heads, {sizes.kv_heads} heads of keys and values, head_dim {sizes.head_dim}. Ours and vLLM's go through a block table
whose blocks lie in random order; torch's keys and values lie in one piece, heads outermost, llama.cpp's as in its cache. In the columns of
bf16, llama.cpp has an fp16 cache and fp32 queries. Decode: one query token per sequence, copies of the cache taking turns.
"""
        )
        for dtype in _unique(r.problem.dtype for r in attentions):
            for decode in (True, False):
                chosen = [r for r in attentions if r.problem.dtype == dtype and (r.residence == "memory") == decode]
                if chosen:
                    name = "Decode" if decode else "Causal prefill"
                    parts.append(f"### {name}, {_DTYPES[dtype]}\n\n{_kernel_table(chosen, limits)}")
    if report["end_to_end"]:
        parts.append(_end_to_end(report["end_to_end"]))
    versions = "\n".join(f"| {name} | {text} |" for name, text in report["peers"].items())
    parts.append(f"## Versions\n\n| | |\n|---|---|\n| torch of {OWN} | {machine['torch']} |\n{versions}\n")
    return "\n".join(parts)


_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def _unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


def _kernel_table(results: list[Result], limits: Limits) -> str:
    """Rows are peers, columns are numbers of rows (or batches and contexts)."""
    columns = _unique((r.problem, r.rows) for r in results)
    peers = _unique(r.peer for r in results)
    cells = {(r.peer, r.problem, r.rows): r for r in results}
    best = {column: min((r.median for r in results if (r.problem, r.rows) == column and r.seconds), default=0.0) for column in columns}
    lines = [f"| | bits per weight | error | {' | '.join(_heading(*c) for c in columns)} |"]
    lines.append("|---" * (3 + len(columns)) + "|")
    for peer in peers:
        row = [cells[(peer, *column)] for column in columns]
        reasons = _unique(r.reason for r in row)
        texts = [_cell(r, best[(r.problem, r.rows)], limits) for r in row]
        if len(reasons) == 1 and reasons[0]:  # said once
            texts = [f"not measured: {reasons[0]}"] + [""] * (len(row) - 1)
        error = next((f"{r.error:.1e}" for r in row if r.error == r.error), "")
        lines.append(f"| {peer} | {_bits(row)} | {error} | {' | '.join(texts)} |")
    for arithmetic in ("int8", "fp32"):
        own = [next((r for r in results if (r.problem, r.rows) == c and r.peer.startswith(OWN) and r.nbytes), None) for c in columns]
        if arithmetic == "fp32" or isinstance(results[0].problem, Matmul):
            texts = [_time(shortest_time(r, limits, arithmetic)) if r else "" for r in own]
            lines.append(f"| *the machine's limit for our format, {arithmetic} arithmetic* | | | {' | '.join(texts)} |")
    text = "\n".join(lines) + "\n"
    return text if isinstance(results[0].problem, Matmul) else _without_column(text, 2)


def _without_column(table: str, column: int) -> str:
    lines = (line.split("|") for line in table.splitlines())
    return "\n".join("|".join(cells[:column] + cells[column + 1 :]) for cells in lines) + "\n"


def _heading(problem: Problem, rows: int) -> str:
    if isinstance(problem, Attention):
        return f"batch {problem.batch}, context {problem.context}"
    return "1 row" if rows == 1 else f"{rows} rows"


def _bits(row: list[Result]) -> str:
    problem, nbytes = row[0].problem, max(r.nbytes for r in row)
    return f"{8 * nbytes / problem.in_features / problem.out_features:.4g}" if nbytes and isinstance(problem, Matmul) else ""


def _cell(result: Result, best: float, limits: Limits) -> str:
    if not result.seconds:
        return f"not measured: {result.reason}"
    low, high = result.quartiles
    unit, scale = _unit(result.median)
    median = f"{result.median * scale:.3g}"
    text = f"**{median}**" if result.median <= best else median
    text += f" ({low * scale:.3g}-{high * scale:.3g}) {unit}"
    share = share_of_limit(result, limits)
    return text if share is None else f"{text}, {share:.0%}"


def share_of_limit(result: Result, limits: Limits) -> float | None:
    """Of what the machine allows; for our own kernels."""
    if not result.peer.startswith(OWN):
        return None
    arithmetic = "int8" if "int8" in result.peer else "fp32"
    return shortest_time(result, limits, arithmetic) / result.median


def _unit(seconds: float) -> tuple[str, float]:
    return ("us", 1e6) if seconds < 1e-3 else ("ms", 1e3) if seconds < 1 else ("s", 1.0)


def _time(seconds: float) -> str:
    unit, scale = _unit(seconds)
    return f"{seconds * scale:.3g} {unit}"


def rate(result: Result) -> float:
    """Operations per second."""
    return operations(result.problem, result.rows) / result.median


def _end_to_end(rows: list[dict[str, Any]]) -> str:
    loads = _unique(Load(**load) for row in rows for load in [row["load"]])
    names = _unique(row["engine"] for row in rows)
    cells = {(row["engine"], Load(**row["load"])): row for row in rows}

    def heading(load: Load) -> str:
        sequences = "1 sequence" if load.batch == 1 else f"{load.batch} sequences"
        return f"prompt of {load.prompt}" if load.tokens == 1 else f"{sequences}, {load.tokens} tokens each"

    def cell(row: dict[str, Any]) -> str:
        if row["reason"]:
            return f"not measured: {row['reason']}"
        return f"{row['median']:.0f} ({row['low']:.0f}-{row['high']:.0f})"

    lines = [f"| | {' | '.join(map(heading, loads))} |", "|---" * (1 + len(loads)) + "|"]
    lines += [f"| {name} | {' | '.join(cell(cells[name, load]) for load in loads)} |" for name in names]
    return (
        "## SmolLM2-135M-Instruct end to end\n\nTokens per second (`bench/decode.py`), greedy, prompts of random tokens that no engine has seen "
        "before; median and range of the runs. Of a prompt, its tokens are counted; else those generated, the time for "
        "the prompt included.\n\n" + "\n".join(lines) + "\n"
    )
