"""The command's tables: results of the library as rich renderables."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from teco_kernels.ops.support import BACKENDS, operators, supports
from teco_kernels.testing.bench import Timing
from teco_kernels.testing.case import TOLERANCE, CaseResult, short_dtype
from teco_kernels.testing.ceilings import Ceilings

if TYPE_CHECKING:
    from teco_kernels.quantization.report import LayerReport

_STYLE: dict[str, Any] = {"box": SIMPLE_HEAD, "title_justify": "left", "title_style": "bold", "caption_justify": "left"}
_LABELS = {"teco_kernels": "teco_kernels", "l3_bytes": "last-level cache", "memory_bytes": "memory"}


def facts_table(facts: Mapping[str, Any]) -> Table:
    """The machine and the build."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        if isinstance(value, list):
            value = ", ".join(value)
        if name.endswith("_bytes"):
            value = size(value)
        table.add_row(f"[dim]{_LABELS.get(name, name.replace('_', ' '))}", escape(str(value)))
    return table


def instruction_set_table(states: Mapping[str, str]) -> Table:
    """Which instruction set was picked and why not another."""
    table = Table("instruction set", "", title="CPU kernels", **_STYLE)
    for name, state in states.items():
        table.add_row(name, f"[green]{escape(state)}" if state.startswith("in use") else f"[dim]{escape(state)}")
    return table


def support_rows() -> Iterator[dict[str, Any]]:
    """Per operator and backend: the dtypes it takes, or why there are none."""
    for op in operators():
        for backend in BACKENDS:
            device = "cpu" if backend == "cpu" else "cuda"
            answers = {dtype: supports(op, backend=backend, device=device, dtype=dtype) for dtype in TOLERANCE}
            dtypes = [str(dtype).removeprefix("torch.") for dtype, answer in answers.items() if answer]
            reason = "" if dtypes else next(iter(answers.values())).reason
            yield {"operator": op, "backend": backend, "dtypes": dtypes, "reason": reason}


def support_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Which operator runs on which backend; reasons that all operators share stand below."""
    rows = list(rows)
    table = Table("operator", *BACKENDS, title="Operators", **_STYLE)
    for op, cells in itertools.groupby(rows, key=lambda row: row["operator"]):
        texts = [f"[green]{' '.join(map(short_dtype, row['dtypes']))}" if row["dtypes"] else "[dim]no" for row in cells]
        table.add_row(op, *texts)
    reasons = {row["backend"]: row["reason"].replace(f" of {row['operator']}", "") for row in rows if row["reason"]}
    lines = (f"{backend}: {reason.removeprefix('backend: ')}" for backend, reason in reasons.items())
    table.caption = escape("\n".join(lines))
    return table


def verify_table(results: Iterable[CaseResult]) -> Table:
    """Per operator, dtype and tolerance: cases, how many passed, the worst error."""
    table = Table(title="Conformance against float64", **_STYLE)
    table.add_column("operator")
    table.add_column("dtype")
    for name in ("passed", "worst error", "tolerance"):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, str, float], list[CaseResult]] = {}
    for result in results:
        case = result.case
        if result.unsupported:
            continue
        groups.setdefault((case.operator, short_dtype(case.dtype), case.max_error), []).append(result)
    operators = list(dict.fromkeys(operator for operator, _, _ in groups))
    shown = ""
    for operator, dtype, tolerance in sorted(groups, key=lambda group: operators.index(group[0])):
        members = groups[operator, dtype, tolerance]
        if shown and operator != shown:
            table.add_section()
        passed = sum(member.ok for member in members)
        worst = max(member.worst for member in members)
        table.add_row(
            operator if operator != shown else "",
            dtype,
            f"[{'green' if passed == len(members) else 'bold red'}]{passed}/{len(members)}",
            f"{worst:.1e}" if worst else "0",
            f"{tolerance:.1e}" if tolerance else "equal",
        )
        shown = operator
    return table


def bench_table(timings: Iterable[Timing], ceilings: Ceilings) -> Table:
    """Time, rates (the one that limits is bold), and the share of what memory and arithmetic would allow."""
    table = Table(title="Timings from cold caches", **_STYLE)
    table.add_column("case", overflow="fold")
    for name in ("median", "quartiles", "GB/s", "Gop/s", "of ceiling"):
        table.add_column(name, justify="right", no_wrap=True)
    groups: dict[str, list[Timing]] = {}
    for timing in timings:
        groups.setdefault(timing.case.operator, []).append(timing)
    for operator, members in groups.items():
        table.add_section()
        table.add_row(f"[bold]{operator}")
        for timing in members:
            low, high = (quartile / timing.seconds - 1 for quartile in (timing.quartile_low, timing.quartile_high))
            share, by_memory = timing.share(ceilings), timing.bound(ceilings) == "memory"
            bandwidth = f"{timing.bandwidth / 1e9:.1f}"
            rate = f"{timing.rate / 1e9:.1f}" if timing.case.flops else ""
            table.add_row(
                Padding(timing.case.summary + ("" if timing.cold else " (warm)"), (0, 0, 0, 2)),
                duration(timing.seconds),
                f"{low:+.0%} {high:+.0%}",
                f"[bold]{bandwidth}" if by_memory else bandwidth,
                rate if by_memory else f"[bold]{rate}",
                f"[{'green' if share >= 0.7 else 'yellow' if share >= 0.35 else 'red'}]{share:.0%}",
            )
    table.caption = (
        f"Ceilings, measured in between: reading memory {ceilings.read_bandwidth / 1e9:.1f} GB/s, "
        f"fp32 {ceilings.fp32 / 1e9:.0f} Gop/s, 8-bit {ceilings.int8 / 1e9:.0f} Gop/s; a multiply-add is two. "
        "GB/s count what must move at the least. Memory is read before it is written: who writes much stays below 100%."
    )
    return table


def quantization_table(reports: Iterable[LayerReport]) -> Table:
    """Per layer: the error of each matrix's output, what it is of that of rounding, dampening, time."""
    from teco_kernels.quantization.report import by_layer

    layers = by_layer(reports)
    kinds = list(dict.fromkeys(kind for row in layers.values() for kind in row if kind))
    table = Table("layer", title="Errors of the outputs", padding=(0, 1, 0, 0), **_STYLE)
    for name in (*(kind.removesuffix("_proj") for kind in kinds), "of RTN", "damping", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    captions = []
    for layer, row in layers.items():
        members = list(row.values())
        ratio = sum(member.ratio for member in members) / len(members)
        if "" in row:
            captions.append(f"{layer}: {row[''].error:.2%}, {ratio:.0%} of rounding, {row[''].seconds:.1f} s")
            continue
        errors = (f"{row[kind].error:.1%}" if kind in row else "" for kind in kinds)
        dampening = max(member.dampening for member in members)
        seconds = sum(member.seconds for member in members)
        table.add_row(layer, *errors, f"{ratio:.0%}", f"{dampening:g}", f"{seconds:.1f}")
    table.caption = escape("\n".join(captions))
    return table


def run_table(rows: Iterable[tuple[str, str, str]]) -> Table:
    """What a run of the decoder took: name, value, remark."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value, remark in rows:
        table.add_row(f"[dim]{name}", f"[bold]{escape(value)}", f"[dim]{escape(remark)}")
    return table


def duration(seconds: float) -> str:
    """In the unit that shows three digits."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def size(num_bytes: float) -> str:
    """In binary units."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} GiB"
