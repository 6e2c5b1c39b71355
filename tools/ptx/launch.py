"""Launches: a kernel by its name, arguments as bytes, a grid of blocks one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ptx.banks import BankCounter
from ptx.block import Block
from ptx.errors import PtxError
from ptx.memory import GlobalMemory
from ptx.program import Program
from ptx.source import Module, parse

Size = tuple[int, int, int]

#: Instructions of a block, whatever its number of threads: a kernel that runs for longer has gone astray.
STEP_LIMIT = 5_000_000


class Kernel:
    """A kernel that can be launched.

    Attributes
    ----------
    name : str
        Of the entry.
    parameter_sizes : list of int
        Bytes of each parameter.
    """

    def __init__(self, module: Module, name: str) -> None:
        if name not in module.entries:
            raise PtxError(f"expected one of the entries {', '.join(module.entries)}, got {name}")
        self.name = name
        self._program = Program(module, module.entries[name])
        self.parameter_sizes = self._program.parameter_sizes

    def lines(self, that_ran: bool = False) -> set[int]:
        """Lines of the PTX that hold its instructions; of those that any launch has come to."""
        return {step.instruction.line for step in self._program.steps if step.has_run or not that_ran}

    def launch(
        self,
        grid: Size,
        threads: Size,
        arguments: Sequence[bytes],
        memory: GlobalMemory,
        dynamic_shared: int = 0,
        banks: BankCounter | None = None,
        step_limit: int = STEP_LIMIT,
    ) -> None:
        """Run all blocks.

        Parameters
        ----------
        grid, threads : tuple of int
            Blocks of the launch, and threads of a block, along x, y and z.
        arguments : sequence of bytes
            Each parameter as it lies in memory.
        memory : GlobalMemory
            What the kernel may access; it is written in place.
        dynamic_shared : int
            Bytes of shared memory beside what the kernel declares.
        banks : BankCounter, optional
            Counts accesses to shared memory.
        step_limit : int
            Instructions of a block.

        Raises
        ------
        PtxError
            At the first finding; it names block, thread and line.
        """
        sizes = [len(argument) for argument in arguments]
        if sizes != self.parameter_sizes:
            raise PtxError(f"{self.name}: expected parameters of {self.parameter_sizes} bytes, got {sizes}")
        packed = bytearray(self._program.parameter_bytes)
        for place, argument in zip(self._program.parameters.values(), arguments, strict=True):
            packed[place : place + len(argument)] = argument
        for name, data in self._program.constants.items():
            memory.add_array(data, False, name)
        # What overflows is meant to: integers wrap, floats become infinities.
        with np.errstate(all="ignore"):
            for z in range(grid[2]):
                for y in range(grid[1]):
                    for x in range(grid[0]):
                        block = Block(
                            self._program,
                            (x, y, z),
                            grid,
                            threads,
                            dynamic_shared,
                            bytes(packed),
                            memory,
                            banks,
                            step_limit,
                        )
                        block.run()


def load(text: str, name: str) -> Kernel:
    """The kernel of this name in a PTX file."""
    return Kernel(parse(text), name)
