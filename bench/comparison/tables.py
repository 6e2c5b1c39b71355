"""The tables of docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from decode import Load
from problems import Attention, Matmul

from comparison.plan import OWN, Problem
from comparison.results import Limits, Result, shortest_time

PLACES = {"memory": "weights from memory", "L3": "weights in L3", "once": "one copy of the weights"}


def unique(items: Iterable[Any]) -> list[Any]:
    """Each item once, in the order of their first appearance."""
    return list(dict.fromkeys(items))


def kernel_table(results: list[Result], limits: Limits) -> str:
    """Rows are peers, columns are numbers of rows (or batches and contexts)."""
    columns = unique((r.problem, r.rows) for r in results)
    cells = {(r.peer, r.problem, r.rows): r for r in results}
    best = {
        column: min((r.median for r in results if r.seconds and (r.problem, r.rows) == column), default=0.0)
        for column in columns
    }
    matmul = isinstance(results[0].problem, Matmul)
    lines = [["", *(["bits per weight"] if matmul else []), "error", *(_heading(*column) for column in columns)]]
    for peer in unique(r.peer for r in results):
        row = [cells[peer, problem, rows] for problem, rows in columns]
        texts = [_cell(r, best[r.problem, r.rows], limits) for r in row]
        if len(set(texts)) == 1 and row[0].reason:
            texts[1:] = [""] * (len(texts) - 1)  # said once
        error = next((f"{r.error:.1e}" for r in row if r.error is not None), "")
        lines.append([peer, *([_bits(row)] if matmul else []), error, *texts])
    own = {(r.problem, r.rows): r for r in results if r.peer.startswith(OWN) and r.nbytes}
    for arithmetic in ("int8", "fp32") if matmul else ("fp32",):
        texts = [_time(shortest_time(own[c], limits, arithmetic)) if c in own else "" for c in columns]
        empty = [""] * (2 if matmul else 1)
        lines.append([f"*the machine's limit for our format, {arithmetic} arithmetic*", *empty, *texts])
    return _markdown(lines)


def engine_table(rows: list[dict[str, Any]]) -> str:
    """Rows are engines, columns are what they were asked to do."""
    loads = unique(Load(**row["load"]) for row in rows)
    cells = {(row["engine"], Load(**row["load"])): row for row in rows}

    def heading(load: Load) -> str:
        if load.tokens == 1:
            return f"prompt of {load.prompt}"
        return f"{load.batch} sequence{'s' if load.batch > 1 else ''}, {load.tokens} tokens each"

    def cell(row: dict[str, Any]) -> str:
        if row["reason"]:
            return f"not measured: {row['reason']}"
        return f"{row['median']:.0f} ({row['low']:.0f}-{row['high']:.0f})"

    names = unique(row["engine"] for row in rows)
    body = [[name, *(cell(cells[name, load]) for load in loads)] for name in names]
    return _markdown([["", *map(heading, loads)], *body])


def share_of_limit(result: Result, limits: Limits) -> float | None:
    """Of what the machine allows; for our own kernels."""
    if not result.peer.startswith(OWN):
        return None
    return shortest_time(result, limits, result.arithmetic) / result.median


def _markdown(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def _heading(problem: Problem, rows: int) -> str:
    if isinstance(problem, Attention):
        return f"batch {problem.batch}, context {problem.context}"
    return "1 row" if rows == 1 else f"{rows} rows"


def _bits(row: list[Result]) -> str:
    problem, nbytes = row[0].problem, max(r.nbytes for r in row)
    assert isinstance(problem, Matmul)
    return f"{8 * nbytes / problem.in_features / problem.out_features:.4g}" if nbytes else ""


def _cell(result: Result, best: float, limits: Limits) -> str:
    if not result.seconds:
        return f"not measured: {result.reason}"
    unit, scale = _unit(result.median)
    median, low, high = (f"{seconds * scale:.3g}" for seconds in (result.median, *result.quartiles))
    share = share_of_limit(result, limits)
    text = f"**{median}**" if result.median <= best else median
    return f"{text} ({low}-{high}) {unit}" + ("" if share is None else f", {share:.0%}")


def _unit(seconds: float) -> tuple[str, float]:
    return ("us", 1e6) if seconds < 1e-3 else ("ms", 1e3) if seconds < 1 else ("s", 1.0)


def _time(seconds: float) -> str:
    unit, scale = _unit(seconds)
    return f"{seconds * scale:.3g} {unit}"
