"""Triton, where it is installed; what the kernels need to be written down, where it is not.

Kernels that were compiled ahead of time run without Triton: their functions are then only names.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from teco_kernels.triton_kernels import is_embedded

__all__ = ["HAS_TRITON", "INTERPRETED", "constexpr", "jit", "problem", "tl"]

#: Whether the package is there.
HAS_TRITON = find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
    constexpr: Any = tl.constexpr
else:
    tl: Any = None  # type: ignore[no-redef]

    def jit(function: Any = None, **options: Any) -> Any:
        """Leave the function as it is: something that has a name."""
        return function if function is not None else lambda decorated: decorated

    def constexpr(value: Any) -> Any:
        """Leave the value as it is."""
        return value


def _interprets() -> bool:
    """Whether Triton runs kernels on the CPU; it decides so once, when a kernel's decorator runs."""
    if not HAS_TRITON:
        return False
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.sum, InterpretedFunction)


_IS_INTERPRETED = _interprets()
#: For kernels: bf16 arithmetic of the interpreter is wrong, and so is its rounding.
INTERPRETED = constexpr(_IS_INTERPRETED)


def problem(interpreted: bool) -> str:
    """Why kernels cannot run, interpreted on the CPU or not; empty when they can."""
    if interpreted and not HAS_TRITON:
        return "the Triton interpreter needs the package triton; pip install 'teco_kernels[triton]'"
    if interpreted and not _IS_INTERPRETED:
        late = os.environ.get("TRITON_INTERPRET") == "1"
        return "TRITON_INTERPRET=1 must be set before triton is imported" + (", it was set after" if late else "")
    if not interpreted and not HAS_TRITON and not is_embedded():
        return "kernels for a GPU need the package triton (pip install 'teco_kernels[triton]'), or to be in the build"
    if not interpreted and _IS_INTERPRETED:
        return "Triton was imported with TRITON_INTERPRET=1; its kernels do not run on a GPU in this process"
    return ""
