"""What the interpreter raises: a finding about the kernel, or an instruction that it does not know."""

from __future__ import annotations


class PtxError(Exception):
    """What is wrong; the interpreter adds the kernel, the line of the PTX, and the instruction."""
