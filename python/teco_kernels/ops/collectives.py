"""Collectives of ranks that share memory, as operators; `comm` is the number of a communicator in this process.

`teco_kernels.parallel` has the functions that are meant to be called.
"""

from __future__ import annotations

from teco_kernels import _host
from teco_kernels.ops._library import operator, register_exception, register_fake_writing_only


def _interruption(name: str, message: str) -> BaseException:
    return _host.take_raised() or KeyboardInterrupt()


register_exception("CommunicatorError", lambda name, message: _host.CommunicatorError(message))
register_exception("Interrupted", _interruption)
register_fake_writing_only("all_reduce", "all_reduce_rms_norm", "all_gather", "reduce_scatter", "broadcast")

#: ``(out, input, comm)``
all_reduce = operator("all_reduce")
#: ``(out, residual_out, input, residual, weight, eps, comm)``
all_reduce_rms_norm = operator("all_reduce_rms_norm")
#: ``(out, input, comm)``
all_gather = operator("all_gather")
#: ``(out, input, comm)``
reduce_scatter = operator("reduce_scatter")
#: ``(out, input, root, comm)``
broadcast = operator("broadcast")
