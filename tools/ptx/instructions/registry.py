"""Which function makes an instruction executable."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ptx.source import Instruction

if TYPE_CHECKING:
    from ptx.program import Program, Step

Builder = Callable[["Program", Instruction, "Step"], None]

#: By the first word of an instruction. A builder sets the step's `execute`, or its `control`.
BUILDERS: dict[str, Builder] = {}


def builds(*names: str) -> Callable[[Builder], Builder]:
    """Enter a builder of these instructions."""

    def enter(builder: Builder) -> Builder:
        for name in names:
            BUILDERS[name] = builder
        return builder

    return enter
