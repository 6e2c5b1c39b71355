"""An interpreter of PTX, NVIDIA's assembly for GPUs, on a CPU: what a compiler emitted is run, not what it was given.

It needs numpy, and nothing of the project around it. See README.md for what it checks and what it leaves out.
"""

from ptx.banks import Access, BankCounter
from ptx.errors import PtxError
from ptx.launch import Kernel, load
from ptx.memory import GlobalMemory
from ptx.source import parse

__all__ = ["Access", "BankCounter", "GlobalMemory", "Kernel", "PtxError", "load", "parse"]
