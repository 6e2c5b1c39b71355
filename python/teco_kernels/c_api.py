"""Where programs that are not Python find the kernels (docs/c-api.md): the header and the library beside this file."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def get_include() -> str:
    """The folder with `teco_kernels.h`."""
    return str(_PACKAGE / "include")


def get_library() -> str:
    """`libteco_kernels.so`, which needs neither torch nor Python."""
    return str(_PACKAGE / "libteco_kernels.so")
