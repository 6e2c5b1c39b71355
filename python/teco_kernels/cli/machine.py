"""Commands about a machine: what it has, whether the operators are right on it, and how fast they are."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from teco_kernels.cli.command import Threads, UsageError, app, check_folders, check_picture, set_threads

if TYPE_CHECKING:
    from teco_kernels.testing import Case

Operator = Annotated[
    list[str] | None, typer.Option("--operator", help="Only this operator; may be given several times.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write a report to this file.")]


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Tell what was compiled, what this machine has, and which operator runs where."""
    from teco_kernels.cli import tables
    from teco_kernels.testing import machine

    facts, states, rows = machine.facts(), machine.instruction_sets(), list(tables.support_rows())
    if as_json:
        typer.echo(json.dumps({"machine": facts, "instruction_sets": states, "operators": rows}, indent=2))
        return
    console = Console()
    for table in (tables.facts_table(facts), tables.instruction_set_table(states), tables.support_table(rows)):
        console.print(table, "")


@app.command()
def verify(
    operator: Operator = None,
    device: Annotated[str, typer.Option(help="Whose kernels to check: cpu or cuda.")] = "cpu",
    triton: Annotated[
        bool, typer.Option("--triton", help="The Triton kernels; on the CPU with TRITON_INTERPRET=1, slowly.")
    ] = False,
    json_file: JsonFile = None,
    threads: Threads = None,
) -> None:
    """Hold every operator against its float64 reference; exit code 1 when one is wrong."""
    from teco_kernels.cli import tables
    from teco_kernels.testing import verify as verification

    verification.check_device(device)
    check_folders(json_file)
    cases = _chosen_cases(operator)
    set_threads(threads)
    results = []
    with _progress() as progress:
        task = progress.add_task("", total=len(cases))
        for case, result in zip(cases, verification.verify(cases, device=device, triton=triton), strict=True):
            results.append(result)
            failed = sum(not result.ok for result in results)
            text = f"{case.operator}" + (f"  [red]{failed} failed" if failed else "")
            progress.update(task, advance=1, description=text)
    console = Console()
    console.print(tables.verify_table(results))
    failures = [result for result in results if not result.ok]
    for result in failures:
        problem = result.exception or f"errors {result.errors} exceed {result.case.max_error:g}"
        console.print(
            f"[bold red]failed[/] {escape(f'{result.case.name}: {problem}')}", highlight=False, soft_wrap=True
        )
    reasons = Counter(f"{result.case.operator}: {result.unsupported}" for result in results if result.unsupported)
    for reason, count in reasons.items():
        console.print(f"not run, {count} cases of {reason}", highlight=False, markup=False, soft_wrap=True)
    num_run = len(results) - reasons.total()
    console.print(f"{num_run - len(failures)} of {num_run} cases passed")
    if json_file:
        json_file.write_text(json.dumps(verification.report(results, device, triton), indent=2) + "\n")
        console.print(f"report: {json_file}", highlight=False, markup=False)
    if failures:
        raise typer.Exit(1)


@app.command()
def bench(
    operator: Operator = None,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="Time per case.")] = 0.5,
    quick: Annotated[bool, typer.Option("--quick", help="One case per operator, for a short time.")] = False,
    json_file: JsonFile = None,
    png_file: Annotated[Path | None, typer.Option("--png", help="Also draw the roofline; needs matplotlib.")] = None,
) -> None:
    """Time the operators from cold caches, beside the machine's measured ceilings."""
    from teco_kernels.cli import tables
    from teco_kernels.testing import bench as benchmark
    from teco_kernels.testing import machine

    check_folders(json_file)
    check_picture(png_file)
    cases = [case for case in _chosen_cases(operator) if case.benchmark]
    if quick:
        cases = list({case.operator: case for case in reversed(cases)}.values())[::-1]
        seconds = min(seconds, 0.05)
    if not cases:
        raise ValueError("operator: none of these has a case that is large enough to be timed")
    set_threads(threads)
    _warn_if_busy()
    timings = []
    with _progress() as progress:
        task = progress.add_task("measuring the ceilings", total=len(cases))
        for timing, best in benchmark.bench(cases, seconds=seconds):
            timings.append(timing)
            ceilings = best
            progress.update(task, advance=1, description=timing.case.operator)
    facts = machine.facts()
    console = Console()
    console.print(tables.bench_table(timings, ceilings))
    machine_line = f"{facts['processor']}, {facts['instruction_set']}, {facts['threads']} threads"
    console.print(machine_line, highlight=False, markup=False)
    if json_file:
        json_file.write_text(json.dumps(benchmark.report(timings, ceilings), indent=2) + "\n")
        console.print(f"report: {json_file}", highlight=False, markup=False)
    if png_file:
        from teco_kernels.testing import roofline

        roofline.draw(timings, ceilings, machine_line, png_file)
        console.print(f"picture: {png_file}", highlight=False, markup=False)


def _chosen_cases(operators: list[str] | None) -> list[Case]:
    """The case table, or the part of it that --operator asks for."""
    from teco_kernels.testing import all_cases

    cases = list(all_cases())
    known = list(dict.fromkeys(case.operator for case in cases))
    for name in operators or ():
        if name not in known:
            raise UsageError(f"--operator: expected one of {', '.join(known)}; got {name!r}")
    return [case for case in cases if not operators or case.operator in operators]


def _warn_if_busy() -> None:
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load > 0.5 * cores:
        text = f"the load of this machine is {load:.1f} on {cores} cores: times will be long and shares too low"
        typer.echo(f"teco-kernels: {text}", err=True)


def _progress() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    return Progress(
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
