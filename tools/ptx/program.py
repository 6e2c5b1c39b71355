"""A kernel made ready to run: every instruction a function, every variable a place."""

from __future__ import annotations

import numpy as np

from ptx.errors import PtxError
from ptx.operands import Execute, Read, reader
from ptx.source import Entry, Instruction, Module, Symbol, Variable
from ptx.types import TYPES, Array, Type


class Step:
    """An instruction as it is executed.

    Attributes
    ----------
    instruction : Instruction
        What it is made of.
    guard : callable or None
        Reads its predicate.
    execute : callable or None
        What it does; None for those that decide which instruction comes next: `control` says how.
    control : str
        "", "branch", "exit", "barrier" or "warp barrier".
    target : int
        Of a branch.
    has_run : bool
        Whether any thread has come to it.
    """

    def __init__(self, instruction: Instruction, guard: Read | None) -> None:
        self.instruction = instruction
        self.guard = guard
        self.execute: Execute | None = None
        self.control = ""
        self.target = -1
        self.has_run = False


def _laid_out(variables: list[Variable]) -> tuple[dict[str, int], int]:
    """Offsets of variables one after the other, and the size of all."""
    places, end = {}, 0
    for variable in variables:
        place = -(-end // variable.alignment) * variable.alignment
        places[variable.name] = place
        end = place + variable.size
    return places, end


class Program:
    """A kernel of a module.

    Attributes
    ----------
    parameters : dict
        Offsets of the parameters in their memory, by name.
    parameter_sizes : list of int
        Bytes of each, in their order.
    static_shared, local_bytes : int
        Bytes of shared memory of a block, and of local memory of a thread.
    constants : dict
        Data of the module's variables, in memory of this process.
    """

    def __init__(self, module: Module, entry: Entry) -> None:
        from ptx.instructions import BUILDERS

        self.entry = entry
        self.parameters, self.parameter_bytes = _laid_out(entry.parameters)
        self.parameter_sizes = [variable.size for variable in entry.parameters]
        outside = [v for v in module.variables if v.space == "shared"]
        inside = [v for v in entry.variables if v.space == "shared"]
        static = [v for v in (*outside, *inside) if v.size and self._is_used(v)]
        self._shared, end = _laid_out(static)
        dynamic = [v for v in (*outside, *inside) if not v.size]
        alignment = max((v.alignment for v in dynamic), default=1)
        self.static_shared = -(-end // alignment) * alignment
        self._shared.update({v.name: self.static_shared for v in dynamic})
        self._local, self.local_bytes = _laid_out([v for v in entry.variables if v.space == "local"])
        self.constants: dict[str, Array] = {
            v.name: np.frombuffer(bytearray(v.data.ljust(v.size, b"\0")), np.uint8)
            for v in module.variables
            if v.space in ("global", "const") and v.size
        }
        self.steps: list[Step] = []
        for instruction in entry.instructions:
            try:
                guard = reader(self, instruction.guard, TYPES["pred"]) if instruction.guard else None
                step = Step(instruction, guard)
                if instruction.name not in BUILDERS:
                    raise PtxError(f"an instruction that is not known to the interpreter: {instruction.name}")
                BUILDERS[instruction.name](self, instruction, step)
            except PtxError as error:
                raise PtxError(f"{entry.name}, line {instruction.line}: {instruction.text}\n  {error}") from None
            self.steps.append(step)

    def _is_used(self, variable: Variable) -> bool:
        """Shared memory of the module belongs to the kernels that name it."""
        return any(variable.name in instruction.text for instruction in self.entry.instructions)

    def type_of(self, register: str) -> Type:
        """The type that a register is declared with."""
        return self.entry.type_of(register)

    def address_of(self, name: str) -> int:
        """Of a variable, within its state space."""
        if name in self.parameters:
            return self.parameters[name]
        if name in self._shared:
            return self._shared[name]
        if name in self._local:
            return self._local[name]
        if name in self.constants:
            return int(self.constants[name].ctypes.data)
        raise PtxError(f"expected a variable or a parameter, got {name}")

    def label(self, operand: object) -> int:
        """Index of the instruction behind a label."""
        if not isinstance(operand, Symbol) or operand.name not in self.entry.labels:
            raise PtxError(f"expected a label, got {operand}")
        return self.entry.labels[operand.name]
