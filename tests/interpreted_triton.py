"""The Triton kernels as Triton compiles them for sm_80: their PTX, interpreted on the CPU (tools/ptx).

    python tests/interpreted_triton.py case ...       JSON: a line per case of the table
    python tests/interpreted_triton.py --general ...  the same, by the code that takes any address and stride
    python tests/interpreted_triton.py --plant CALL N JSON: a line per bug that is planted in a kernel's PTX
    python tests/interpreted_triton.py --banks        JSON: a line per call, how busy the banks of shared memory were

Run as a process of its own: the tests' process has Triton interpret its kernels, see test_triton_ptx.py.
"""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import torch
from emulated_cuda import Piece, extent, pieces_of, united
from kernel_calls import CALLS

from ptx import BankCounter, GlobalMemory, Kernel, PtxError, load
from teco_kernels.ops import _library
from teco_kernels.ops.triton_backend import use_triton
from teco_kernels.testing import all_cases, run_case
from teco_kernels.triton_kernels import _language, _launch
from teco_kernels.triton_kernels._launch import Launch
from teco_kernels.triton_kernels.ahead_of_time import Instance
from teco_kernels.triton_kernels.embedded import is_multiple_of_16

TARGET = "sm_80"

Change = Callable[[str, str], str]


class Compiled:
    """A kernel as it was compiled for a launch."""

    def __init__(self, launch: Launch, variant: str, change: Change) -> None:
        instance = Instance(launch)
        compiled = instance.compile(TARGET, variant)
        self.kinds = [kind for kind, _ in instance.parameters(variant)]
        self.shared = compiled.metadata.shared
        self.text = change(compiled.metadata.name, compiled.asm["ptx"])
        self.kernel: Kernel = load(self.text, compiled.metadata.name)
        self.name = compiled.metadata.name

    def run(self, launch: Launch, memory: GlobalMemory, banks: BankCounter) -> None:
        """All programs of the grid."""
        formats = {"i32": "i", "i64": "q", "fp32": "f"}
        values = [value for value in launch.args if value is not None]
        data = [
            struct.pack(formats.get(kind, "Q"), value.data_ptr() if isinstance(value, torch.Tensor) else value)
            for kind, value in zip(self.kinds, values, strict=True)
        ]
        scratch = [bytes(8), bytes(8)]
        x, y, z = (*launch.grid, 1, 1)[:3]
        threads = (32 * launch.num_warps, 1, 1)
        self.kernel.launch((x, y, z), threads, [*data, *scratch], memory, self.shared, banks)


class Interpreter:
    """Runs launches; `compiled` and `banks` have what was met, by the key of a kernel.

    Parameters
    ----------
    change : callable
        From the name and the PTX of a kernel to the PTX that is run.
    is_general : bool
        Run the code of unaligned tensors for all.
    """

    def __init__(self, change: Change = lambda name, text: text, *, is_general: bool = False) -> None:
        self.change, self.is_general = change, is_general
        self.compiled: dict[str, Compiled] = {}
        self.banks: dict[str, BankCounter] = {}
        self.pieces: list[Piece] = []

    def allow(self, operator: Any, args: tuple[Any, ...]) -> None:
        """What the kernels of this call may touch, beside their workspace."""
        self.pieces = list(pieces_of(operator, args))

    def memory(self, launch: Launch) -> GlobalMemory:
        """The call's tensors; what else the launch is given is workspace."""
        pieces = list(self.pieces)
        for value in launch.args:
            if isinstance(value, torch.Tensor) and value.numel() > 0:
                begin, end = extent(value)
                if not any(p.begin <= begin and end <= p.end for p in self.pieces):
                    pieces.append(Piece(begin, end, 1, True, "workspace"))
        memory = GlobalMemory()
        for piece in united(pieces):
            memory.add(piece.begin, piece.end - piece.begin, piece.written, piece.name)
        return memory

    def run(self, launch: Launch) -> None:
        """As `_launch.launch_with` takes it."""
        tensors = [value for value in launch.args if isinstance(value, torch.Tensor)]
        is_aligned = all(map(is_multiple_of_16, tensors)) and not self.is_general
        variant = "aligned" if is_aligned else "general"
        kinds = list(Instance(launch).parameters(variant))
        key = f"{launch.kernel.__name__} {launch.constants} {launch.num_warps} {variant} {kinds}"
        key += "".join("-" if value is None else "x" for value in launch.args)
        if key not in self.compiled:
            self.compiled[key] = Compiled(launch, variant, self.change)
        self.compiled[key].run(
            launch, self.memory(launch), self.banks.setdefault(launch.kernel.__name__, BankCounter())
        )


@contextmanager
def interpretation(interpreter: Interpreter) -> Iterator[None]:
    """Within it, operators on CPU tensors run Triton's PTX."""
    require, _language.require = _language.require, lambda interpreted: None  # it is PTX that runs, not Triton
    use_triton("cpu")
    _language.require = require
    _launch.launch_with(interpreter.run)
    _library.record_calls(interpreter.allow)
    try:
        yield
    finally:
        _library.record_calls(None)
        _launch.launch_with(None)
        use_triton(None)


def run_cases(names: list[str], *, is_general: bool = False) -> None:
    """Print what became of each case."""
    cases = {case.name: case for case in all_cases()}
    for name in names:
        interpreter = Interpreter(is_general=is_general)
        try:
            with interpretation(interpreter):
                result = run_case(cases[name])
            found: dict[str, Any] = {"ok": result.ok, "errors": str(result.errors)}
        except PtxError as error:
            found = {"ok": False, "errors": str(error)}
        kernels = sorted({compiled.name for compiled in interpreter.compiled.values()})
        print(json.dumps({"case": name, "kernels": kernels, **found}), flush=True)


#: In a kernel's PTX: what is replaced in one line, and by what.
BUGS: dict[str, tuple[str, Callable[[re.Match[str]], str]]] = {
    "dropped barrier": (r"bar\.sync\s+0;", lambda match: ""),
    "a group too few is waited for": (r"(cp\.async\.wait_group\s+)(\d+)", lambda m: f"{m[1]}{int(m[2]) + 1}"),
    "another shift": (r"(sh[lr]\.[bu]32\s.*, )(\d+);", lambda m: f"{m[1]}{int(m[2]) + 1};"),
    "another half of the factors": (r"(mma\.[^}]*\}, \{ )(%\w+), (%\w+)", lambda m: f"{m[1]}{m[3]}, {m[2]}"),
}


def plant(call: str, most: int) -> None:
    """Print what became of each bug, planted in at most so many of the lines that the call's first kernel runs."""
    interpreter = Interpreter()
    with interpretation(interpreter):
        expected = CALLS[call]()
    compiled = next(iter(interpreter.compiled.values()))
    name = compiled.name
    rows, ran = compiled.text.split("\n"), sorted(compiled.kernel.lines(that_ran=True))
    for bug, (pattern, replacement) in BUGS.items():
        lines = [line for line in ran if re.search(pattern, rows[line - 1])]
        for line in lines[:: max(-(-len(lines) // most), 1)]:
            row = re.sub(pattern, replacement, rows[line - 1])
            changed = "\n".join([*rows[: line - 1], row, *rows[line:]])
            wrong = Interpreter(lambda other, text, changed=changed: changed if other == name else text)
            try:
                with interpretation(wrong):
                    out = CALLS[call]()
                outcome = "unnoticed" if torch.equal(out, expected) else "another result"
            except PtxError as error:
                outcome = str(error)
            print(
                json.dumps({"kernel": name, "bug": bug, "line": rows[line - 1].strip(), "outcome": outcome}), flush=True
            )


def count_banks() -> None:
    """Print, for each call: cycles of the banks and their ideal, by kernel and instruction."""
    for call, function in CALLS.items():
        interpreter = Interpreter()
        with interpretation(interpreter):
            function()
        print(
            json.dumps({"call": call, "banks": {k: banks.total() for k, banks in interpreter.banks.items()}}),
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1] == "--plant":
        plant(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1] == "--banks":
        count_banks()
    elif sys.argv[1] == "--general":
        run_cases(sys.argv[2:], is_general=True)
    else:
        run_cases(sys.argv[1:])
