"""Probes of the machine's ceilings: reading memory and multiplying-adding, with nothing else in the loop."""

from __future__ import annotations

from torch import Tensor

from teco_kernels.ops._library import operator

#: Streams per thread that `read_probe` can walk at once; how many serve best is a property of the machine.
READ_STREAMS = (1, 2, 4, 8)

_read_probe = operator("_read_probe")
_fma_probe = operator("_fma_probe")
_int8_probe = operator("_int8_probe")


def read_probe(data: Tensor, num_streams: int) -> None:
    """Read all of `data`, each thread walking `num_streams` parts of its share at once."""
    _read_probe(data, num_streams)


def fma_probe(iterations: int) -> int:
    """Run chains of fp32 multiply-adds on all threads.

    Returns
    -------
    int
        Floating-point operations done; in proportion to `iterations`. A multiply-add counts as two.
    """
    return int(_fma_probe(iterations))


def int8_probe(iterations: int) -> int:
    """Like `fma_probe` with products of 8-bit integers, by the best instruction of the set in use."""
    return int(_int8_probe(iterations))
