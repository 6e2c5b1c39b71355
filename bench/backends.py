"""Holds every operator of every backend against the numerics contract and draws what came out.

    python bench/backends.py [--json docs/backends.json] [--png docs/backends.png] [--quick]

Backends: the CPU's kernels; the CUDA kernels, emulated (docs/gpu.md); the Triton kernels, in Triton's interpreter. All
run the same cases on the same inputs against the same float64 references, and each output is held against the CPU
backend's too. A backend without a kernel says so through `supports`, and its reason stands in the picture. Emulation
and interpretation take milliseconds for what a kernel does in microseconds: of the table only the cases of moderate
size are run, all of those or (--quick) the smallest of each operator and dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from emulated_cuda import emulation  # noqa: E402

from teco_kernels import supports  # noqa: E402
from teco_kernels.ops._reference import relative_error  # noqa: E402
from teco_kernels.ops.support import operators  # noqa: E402
from teco_kernels.ops.triton_backend import use_triton  # noqa: E402
from teco_kernels.testing import Case, all_cases  # noqa: E402
from teco_kernels.testing.case import short_dtype  # noqa: E402


@contextmanager
def _interpreter() -> Iterator[None]:
    use_triton("cpu")
    try:
        yield
    finally:
        use_triton(None)


BACKENDS: dict[str, tuple[str, Callable[[], AbstractContextManager[Any]]]] = {
    "CPU": ("cpu", nullcontext),
    "CUDA, emulated": ("cuda", emulation),
    "Triton, interpreted": ("triton", _interpreter),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64)


@dataclass
class Cell:
    """An operator of a backend in a dtype: cases that passed, or why there are none.

    `worst` is the largest share of the allowed error that a case took, `apart` the largest relative distance from the
    CPU's kernel.
    """

    operator: str
    backend: str
    dtype: str
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    worst: float = 0.0
    apart: float = 0.0
    reason: str = ""


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative error of floating outputs; of others whether they are equal."""
    if out.is_floating_point():
        return relative_error(out, reference)
    return 0.0 if torch.equal(out, reference.to(out.dtype)) else float("inf")


def largest(outputs: dict[str, torch.Tensor], references: dict[str, torch.Tensor]) -> float:
    """Of all outputs of a case."""
    return max((error(outputs[name], reference) for name, reference in references.items()), default=0.0)


def is_not_empty(case: Case) -> bool:
    """Whether a case has something to compute."""
    sizes = all(case.params.get(size) != 0 for size in ("tokens", "rows", "sequences", "num_blocks", "hidden_size"))
    return sizes and case.params.get("setup") != "empty"


def cases(quick: bool) -> list[Case]:
    """Those that emulation and interpreter get through."""
    moderate = [case for case in all_cases() if case.bytes_moved < 1e6 and case.flops < 8e6]
    if not quick:
        return moderate
    smallest: dict[tuple[str, torch.dtype], Case] = {}
    for case in moderate:
        key = (case.operator, case.dtype)
        if is_not_empty(case) and (key not in smallest or case.flops < smallest[key].flops):
            smallest[key] = case
    return list(smallest.values())


def run(chosen: list[Case]) -> dict[tuple[str, str, str], Cell]:
    """A cell for every operator, backend and dtype of which there are cases."""
    cells: dict[tuple[str, str, str], Cell] = {}
    for case in chosen:
        inputs = case.inputs()
        references, on_cpu = case.outputs(case.reference, inputs), case.outputs(case.function, inputs)
        for name, (backend, context) in BACKENDS.items():
            key = (case.operator, name, short_dtype(case.dtype))
            cell = cells.setdefault(key, Cell(*key))
            with context():
                answer = supports(case.operator, backend=backend, device="cpu", dtype=case.dtype, **case.params)
                if not answer:
                    cell.reason = cell.reason or answer.reason
                    continue
                outputs = case.outputs(case.function, inputs)
            worst = largest(outputs, references)
            cell.worst = max(cell.worst, worst / case.max_error if case.max_error else worst)
            cell.apart = max(cell.apart, largest(outputs, on_cpu))
            if worst <= case.max_error:
                cell.passed += 1
            else:
                cell.failed.append(case.name)
    return cells


_COLOURS = {"passes": "#2b8a3e", "no kernel": "#ced4da", "fails": "#c92a2a"}


def _state(cell: Cell) -> str:
    return "fails" if cell.failed else "passes" if cell.passed else "no kernel"


def draw(cells: dict[tuple[str, str, str], Cell], path: Path) -> None:
    """Write the PNG: a row per operator, a column per backend and dtype."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    names = [op for op in operators() if any(key[0] == op for key in cells)]
    dtypes = [short_dtype(dtype) for dtype in DTYPES]
    reasons: list[str] = []
    with mpl.rc_context({"font.size": 8.5, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(11.5, 1.9 + 0.3 * len(names) + 0.2 * 9))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        left, width, top = 2.35, 0.62, 0.3 * len(names)
        columns = [(backend, dtype) for backend in BACKENDS for dtype in dtypes[:3]]
        place = {column: left + width * i + 0.25 * (i // 3) for i, column in enumerate(columns)}
        for backend in BACKENDS:
            x = place[backend, dtypes[0]]
            axes.text(x + 1.5 * width, top + 0.62, backend, ha="center", weight="bold")
            for dtype in dtypes[:3]:
                axes.text(place[backend, dtype] + width / 2, top + 0.2, dtype, ha="center", color="#495057")
        for i, operator in enumerate(names):
            y = top - 0.3 * (i + 1)
            axes.text(left - 0.12, y + 0.125, operator, ha="right", va="center", family="DejaVu Sans Mono")
            for backend in BACKENDS:
                own = [cell for key, cell in cells.items() if key[:2] == (operator, backend)]
                whole = all(cell.dtype == "int64" for cell in own)  # an operator without activations
                for cell in own:
                    x = place[backend, dtypes[0] if whole else cell.dtype]
                    w = 3 * width if whole else width
                    state = _state(cell)
                    axes.add_patch(Rectangle((x, y), w - 0.04, 0.26, color=_COLOURS[state]))
                    text, colour = f"{cell.passed}" if cell.passed else "", "white"
                    if state == "no kernel":
                        reason = cell.reason.replace(operator, "it")
                        if reason not in reasons:
                            reasons.append(reason)
                        text, colour = f"[{reasons.index(reason) + 1}]", "#495057"
                    if cell.failed:
                        text = f"{len(cell.failed)} fail"
                    axes.text(x + w / 2 - 0.02, y + 0.125, text, ha="center", va="center", color=colour, fontsize=7.5)
        axes.text(0.15, top + 1.05, "Every operator against its float64 reference", fontsize=13, weight="bold")
        note = "Green: so many cases, all within the contract. Grey: no kernel, by the reason below. None ran on a GPU."
        axes.text(0.15, -0.35, note, color="#495057")
        for i, reason in enumerate(reasons):
            axes.text(0.15, -0.62 - 0.22 * i, f"[{i + 1}] {reason}", color="#495057", fontsize=7)
        axes.set_xlim(0, left + width * 9 + 0.75)
        axes.set_ylim(-0.8 - 0.22 * len(reasons), top + 1.35)
        axes.axis("off")
        figure.savefig(path, format="png", dpi=120)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "backends.json")
    parser.add_argument("--png", type=Path, default=ROOT / "docs" / "backends.png")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    cells = run(cases(arguments.quick))
    for cell in cells.values():
        numbers = f"{cell.passed} pass, worst {cell.worst:.0%} of what is allowed, {cell.apart:.1e} from the CPU's"
        print(f"{cell.operator:24} {cell.backend:20} {cell.dtype:6} {numbers if cell.passed else cell.reason}")
        for name in cell.failed:
            print(f"    FAILS {name}")
    # JSON has no infinity.
    table = [{**asdict(cell), "apart": min(cell.apart, 1e9), "worst": min(cell.worst, 1e9)} for cell in cells.values()]
    arguments.json.write_text("[\n" + ",\n".join(map(json.dumps, table)) + "\n]\n")
    draw(cells, arguments.png)
    sys.exit(any(cell.failed for cell in cells.values()))


if __name__ == "__main__":
    main()
