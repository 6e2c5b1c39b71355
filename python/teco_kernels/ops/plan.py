"""Operator calls recorded once and replayed natively."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from teco_kernels.ops._library import operator

_plan_begin = operator("_plan_begin")
_plan_end = operator("_plan_end")
_plan_run = operator("_plan_run")
_plan_free = operator("_plan_free")


class Plan:
    """The operator calls of a function, to be run again without Python, dispatcher or checks of their arguments.

    What a call read and wrote when it was recorded, it reads and writes again: the same addresses, with what lies there
    by then. Only this package's operators are recorded, not those of torch; on the CPU.

    Parameters
    ----------
    function : callable
        Run once, now. Its tensors must stay where they are for as long as the plan lives.
    keep_alive : object
        Held by the plan: what owns the tensors.

    Notes
    -----
    What the operators check in the *values* of their arguments (ids within the table, slots within the cache) is not
    checked again: the caller answers for what it puts there. The threads are those of ``torch.get_num_threads()`` at
    each replay.
    """

    def __init__(self, function: Callable[[], object], keep_alive: object) -> None:
        _plan_begin()
        try:
            function()
        finally:
            self._plan: int = _plan_end()
            weakref.finalize(self, _plan_free, self._plan)
        self._keep_alive = keep_alive

    def replay(self) -> None:
        """Run all calls, in their order."""
        _plan_run(self._plan)
