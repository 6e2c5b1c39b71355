"""Triton, where it is installed; what the kernels need to be written down, where it is not.

Kernels that were compiled ahead of time run without Triton: their functions are then only names.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from teco_kernels.triton_kernels import is_embedded

__all__ = ["COUNTS", "HAS_TRITON", "INTERPRETED", "constexpr", "jit", "require", "tl"]

#: Arguments of kernels for which no code is made of its own where they are 1 or a multiple of 16: it would load
#: nothing in greater pieces, and the bits of a row would depend on how many rows there are.
COUNTS = frozenset(
    {
        "block_table_stride",
        "blocks_per_group",
        "first_token",
        "group",
        "heads",
        "inner",
        "lse_a_stride",
        "lse_b_stride",
        "lse_stride",
        "max_splits",
        "num_groups",
        "num_heads",
        "num_kv_heads",
        "num_pairs",
        "num_query_heads",
        "num_recycled",
        "num_rows",
        "num_seqs",
        "num_tiles",
        "sliding_window",
        "split_rows",
        "vocab_size",
    }
)

#: Whether the package is there.
HAS_TRITON = find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl

    jit: Any = triton.jit(do_not_specialize=sorted(COUNTS))
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


def require(interpreted: bool) -> None:
    """Raise when kernels cannot run in this process, interpreted on the CPU or not."""
    if interpreted and not HAS_TRITON:
        raise ImportError(
            "teco_kernels: the Triton interpreter needs the package triton; pip install 'teco_kernels[triton]'"
        )
    if not interpreted and not HAS_TRITON and not is_embedded():
        raise ImportError(
            "teco_kernels: Triton kernels for a GPU need the package triton (pip install 'teco_kernels[triton]'), "
            "or a build that embeds them"
        )
    if interpreted and not _IS_INTERPRETED:
        raise RuntimeError("teco_kernels: TRITON_INTERPRET=1 must be set before triton is imported")
    if not interpreted and _IS_INTERPRETED:
        raise RuntimeError(
            "teco_kernels: Triton was imported with TRITON_INTERPRET=1; its kernels do not run on a GPU in this process"
        )
