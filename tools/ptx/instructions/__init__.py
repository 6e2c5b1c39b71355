"""The instructions, by the sections of the PTX ISA."""

from ptx.instructions import (
    access,
    bits,
    comparison,
    control,
    conversion,
    copies,
    floating,
    integer,
    matrix,
    movement,
    warp,
)
from ptx.instructions.registry import BUILDERS

__all__ = [
    "BUILDERS",
    "access",
    "bits",
    "comparison",
    "control",
    "conversion",
    "copies",
    "floating",
    "integer",
    "matrix",
    "movement",
    "warp",
]
