"""Draws the results: a panel per shape, a group of bars per number of rows, the machine's limits as lines over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from problems import Attention, Matmul

from comparison.plan import OWN, PEERS
from comparison.results import Limits, Result, operations, shortest_time
from comparison.tables import PLACES

_COLUMNS = 3
#: Ours in two strong tones; the others in one family per project.
_COLOURS = {
    f"{OWN}, int8 activations": "#1864ab",
    f"{OWN}, exact": "#4dabf7",
    f"{OWN}, paged": "#1864ab",
    "ONNX Runtime MatMulNBits (level 4)": "#2b8a3e",
    "OpenVINO": "#9c36b5",
    "llama.cpp Q4_0": "#d9480f",
    "llama.cpp Q4_1": "#ff922b",
    "llama.cpp Q4_K": "#ffc078",
    "llama.cpp flash attention": "#d9480f",
    "vLLM, paged": "#c92a2a",
    "torch int4pack, bf16": "#343a40",
    "torch linear, fp32 weight": "#868e96",
    "torch linear, bf16 weight": "#ced4da",
    "torch SDPA": "#868e96",
}


def draw(results: list[Result], limits: Limits, title: str, path: Path) -> None:
    """Write a PNG. Products are told in operations per second, attention at decode in bytes of keys and values."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = _panels(results)
    height = -(-len(panels) // _COLUMNS)
    with mpl.rc_context({"font.size": 8, "font.family": "DejaVu Sans", "axes.edgecolor": "#868e96"}):
        figure = Figure(figsize=(16, 1.6 + 3.4 * max(height, 1)), layout="constrained")
        lines = "black lines: the machine's limit for our format, with int8 (solid) and fp32 arithmetic (dashed)"
        figure.suptitle(f"{title}\n{lines}", fontsize=11)
        grid: Any = figure.subplots(max(height, 1), _COLUMNS, squeeze=False)
        for axes, (name, chosen) in zip(grid.flat, panels.items(), strict=False):
            _panel(axes, name, chosen, limits)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_axis_off()
        names = [peer.name for peer in PEERS if any(r.peer == peer.name and r.seconds for r in results)]
        handles = [mpl.patches.Patch(color=_colour(name), label=name) for name in names]
        figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
        figure.savefig(path, format="png", dpi=120)


def _panels(results: list[Result]) -> dict[str, list[Result]]:
    panels: dict[str, list[Result]] = {}
    for result in results:
        problem = result.problem
        if isinstance(problem, Matmul):
            place = "" if result.residence == "once" else f", {PLACES[result.residence]}"
            name = f"{problem.in_features} x {problem.out_features}, groups of {problem.group_size}{place}"
        else:
            kind = "decode" if result.residence == "memory" else "prefill"
            name = f"attention, {kind}, {problem.dtype}"
        if result.seconds:
            panels.setdefault(name, []).append(result)
    return panels


def _panel(axes: Any, name: str, results: list[Result], limits: Limits) -> None:
    bandwidth = isinstance(results[0].problem, Attention) and results[0].residence == "memory"
    of: Callable[[Result], float] = (lambda r: r.nbytes / r.median / 1e9) if bandwidth else (lambda r: r.rate / 1e9)
    groups = list(dict.fromkeys((r.problem, r.rows) for r in results))
    for place, group in enumerate(groups):
        members = [r for r in results if (r.problem, r.rows) == group]
        width = 0.84 / len(members)
        for index, result in enumerate(members):
            x = place - 0.42 + (index + 0.5) * width
            low, high = result.quartiles
            value = of(result)
            axes.bar(x, value, width * 0.94, color=_colour(result.peer))
            slow, fast = value * result.median / high, value * result.median / low
            spread = [[max(0.0, value - slow)], [max(0.0, fast - value)]]  # a single round may round below 0
            axes.errorbar(x, value, yerr=spread, color="black", lw=0.6)
        for result in members:
            if not result.peer.startswith(OWN):
                continue
            seconds = shortest_time(result, limits, result.arithmetic)
            amount = result.nbytes if bandwidth else operations(result.problem, result.rows)
            limit = amount / seconds / 1e9
            style = "-" if result.arithmetic == "int8" else "--"
            axes.plot([place - 0.45, place + 0.45], [limit, limit], color="black", lw=1.2, ls=style)
    axes.set_title(name, fontsize=9)
    axes.set_xticks(range(len(groups)), [_tick(*group) for group in groups])
    axes.set_ylabel("GB/s of keys and values" if bandwidth else "10⁹ operations per second")
    if not bandwidth and len(groups) > 1:
        axes.set_yscale("log")
    axes.grid(axis="y", which="major", color="#e9ecef", lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _tick(problem: Matmul | Attention, rows: int) -> str:
    if isinstance(problem, Attention):
        return f"batch {problem.batch}\n{problem.context}"
    return "1 row" if rows == 1 else f"{rows} rows"


def _colour(name: str) -> str:
    return _COLOURS.get(name, "#adb5bd")
