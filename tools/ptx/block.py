"""A block of threads that runs: registers, memory, and which threads go on.

All threads that stand at one instruction execute it at once. Threads that went different ways form groups; the group
that stands at the lowest instruction goes on, and takes in another when it comes to where that one stands. A barrier
holds its threads until all have come.
"""

from __future__ import annotations

import numpy as np

from ptx.active import WARP, Active
from ptx.banks import BankCounter
from ptx.copies import Copies
from ptx.errors import PtxError
from ptx.memory import GlobalMemory
from ptx.program import Program, Step
from ptx.shared import SharedMemory
from ptx.types import UNSIGNED, Array

Size = tuple[int, int, int]

#: What a register holds that was never written.
_POISON = 0xA5A5A5A5A5A5A5A5


class Block:
    """One block of a launch.

    Attributes
    ----------
    shape : tuple of int
        Of the arrays that hold a value per thread: threads, as many as make whole warps.
    thread_index : list of array
        x, y and z of every thread.
    threads, index, grid : tuple of int
        Threads of a block, where this block lies, and how many there are.
    """

    def __init__(
        self,
        program: Program,
        index: Size,
        grid: Size,
        threads: Size,
        dynamic_shared: int,
        parameters: bytes,
        memory: GlobalMemory,
        banks: BankCounter | None,
        step_limit: int,
    ) -> None:
        count = threads[0] * threads[1] * threads[2]
        padded = -(-count // WARP) * WARP
        self.program, self.index, self.grid, self.threads = program, index, grid, threads
        self.shape = (padded,)
        number = np.arange(padded, dtype=np.uint32)
        self.thread_index = [
            number % threads[0],
            number // threads[0] % threads[1],
            number // (threads[0] * threads[1]),
        ]
        self.dynamic_shared = dynamic_shared
        self.parameters = np.frombuffer(parameters.ljust(16, b"\0"), np.uint8)
        self.memory, self.banks = memory, banks
        self.shared = SharedMemory(program.static_shared + dynamic_shared, padded)
        self.local = np.zeros((padded, program.local_bytes), np.uint8)
        self.copies = Copies(padded)
        self._registers: dict[str, Array] = {}
        self._living = number < count
        self._ready: dict[int, Active] = {0: Active(self._living.copy())}
        self._waiting: list[tuple[int, Active]] = []
        self._steps_left = step_limit

    def register(self, name: str) -> Array:
        """Its bits, [threads]."""
        found = self._registers.get(name)
        if found is None:
            bits = self.program.type_of(name).bits
            poison = np.bool_(True) if bits == 1 else UNSIGNED[bits](_POISON & ((1 << bits) - 1))
            found = self._registers[name] = np.full(self.shape, poison)
        return found

    def set_register(self, name: str, bits: Array, active: Active) -> None:
        """Write [threads], or one value for all, for the threads that are active."""
        if active.is_all:
            self._registers[name] = bits if bits.shape == self.shape else np.broadcast_to(bits, self.shape).copy()
        else:
            self._registers[name] = np.where(active.mask, bits, self.register(name))

    def run(self) -> None:
        """Until all threads have ended."""
        while self._ready or self._waiting:
            if not self._ready:
                self._release()
            place = min(self._ready)
            active = self._ready.pop(place)
            self._run_group(place, active)

    def _run_group(self, place: int, active: Active) -> None:
        """Go on with these threads until others are to have their turn."""
        steps, ready = self.program.steps, self._ready
        limit = min(ready, default=len(steps) + 1)
        while True:
            if place >= len(steps):
                raise PtxError(f"{self.program.entry.name}: expected the kernel to end with ret")
            step = steps[place]
            step.has_run = True
            self._steps_left -= 1
            if self._steps_left < 0:
                raise PtxError(self._located(step, active, "the kernel runs for too long"))
            chosen = active
            try:
                if step.guard is not None:
                    chosen = active & step.guard(self)
                if step.execute is not None:
                    if chosen is active or chosen:
                        step.execute(self, chosen)
                    place += 1
                elif not chosen:
                    place += 1
                elif step.control == "branch":
                    others = active.without(chosen)
                    if not others:
                        place = step.target
                    else:
                        self._put(place + 1, others)
                        self._put(step.target, chosen)
                        return
                else:
                    self._stop(step, place, chosen)
                    if others := active.without(chosen):
                        self._put(place + 1, others)
                    return
            except PtxError as error:
                raise PtxError(self._located(step, chosen, str(error))) from None
            if place >= limit:
                self._put(place, active)
                return

    def _put(self, place: int, active: Active) -> None:
        there = self._ready.get(place)
        self._ready[place] = active if there is None else there | active

    def _stop(self, step: Step, place: int, active: Active) -> None:
        if step.control == "exit":
            self._living &= ~active.mask
        else:
            self._waiting.append((place, active))

    def _release(self) -> None:
        """No thread can go on: all wait at a barrier, which is then passed, or something is wrong."""
        places = {place for place, _ in self._waiting}
        everyone = np.logical_or.reduce([active.mask for _, active in self._waiting])
        step = self.program.steps[min(places)]
        exited = int(self.shape[0] - everyone.sum()) - int(self.shape[0] - np.prod(self.threads))
        if exited:
            raise PtxError(self._located(step, Active(everyone), f"a barrier, but {exited} threads have ended"))
        for place in places:
            active = Active(np.logical_or.reduce([a.mask for p, a in self._waiting if p == place]))
            if not self._exist(active).whole_warps:
                raise PtxError(self._located(step, active, "divergent barrier: threads of a warp wait at another one"))
        if len(places) > 1:
            raise PtxError(self._located(step, Active(everyone), "divergent barrier: warps wait at different ones"))
        self._waiting = []
        self.shared.pass_barrier()
        self._ready[places.pop() + 1] = Active(everyone)

    def _exist(self, active: Active) -> Active:
        """With the threads that do not exist, so that the last warp counts as whole."""
        count = int(np.prod(self.threads))
        if count == self.shape[0]:
            return active
        mask = active.mask.copy()
        mask[count:] = mask[count - 1]
        return Active(mask)

    def _located(self, step: Step, active: Active, what: str) -> str:
        threads = active.index
        thread = f", thread {int(threads[0])}" if len(threads) else ""
        return (
            f"{self.program.entry.name}, block {self.index}{thread}, line {step.instruction.line}: "
            f"{step.instruction.text}\n  {what}"
        )
