"""The CUDA kernels, run on the CPU by csrc/simt: the library, and operator calls whose memory accesses are checked."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from teco_kernels.ops import _library

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

SEEDS = (0, 1, 2, 3)


@functools.cache
def library() -> Path:
    """The library of emulated kernels; built once, and again when a source has changed."""
    import cuda_build

    return cuda_build.build_emulation(ROOT / "build" / "emulation")


class Piece(NamedTuple):
    """Memory of a tensor; `granule`: bytes of an element."""

    begin: int
    end: int
    granule: int
    written: bool
    name: str


def united(pieces: list[Piece]) -> Iterator[Piece]:
    """The same memory as pieces that do not overlap: tensors may be views of each other."""
    whole: Piece | None = None
    for piece in sorted(pieces):
        if whole is None or piece.begin >= whole.end:
            if whole is not None:
                yield whole
            whole = piece
        else:
            whole = Piece(
                whole.begin,
                max(whole.end, piece.end),
                min(whole.granule, piece.granule),
                whole.written or piece.written,
                f"{whole.name} and {piece.name}",
            )
    if whole is not None:
        yield whole


def pieces_of(operator: Any, args: tuple[Any, ...]) -> Iterator[Piece]:
    """Memory between the first and the last element of each tensor of a call; written as the schema says."""
    moves_bytes = operator._schema.name.endswith("_blocks")  # where elements are but bytes
    for argument, tensor in zip(operator._schema.arguments, args, strict=True):
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 0:
            written = argument.alias_info is not None and argument.alias_info.is_write
            begin, end = extent(tensor)
            yield Piece(begin, end, 1 if moves_bytes else tensor.element_size(), written, argument.name)


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first element, and behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@contextmanager
def emulation(path: Path | None = None, seed: int = 0) -> Iterator[ctypes.CDLL]:
    """Within it, operators on CPU tensors run the emulated CUDA kernels, threads in the order of the seed.

    A kernel may touch what lies between the first and the last element of its operator's tensors, and write only those
    that the schema says it writes; any other access is a RuntimeError, like every finding.
    """
    path = path or library()
    simt = ctypes.CDLL(str(path))
    simt.simt_allow.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_bool, ctypes.c_char_p]

    def allow(operator: Any, args: tuple[Any, ...]) -> None:
        simt.simt_forget()
        for piece in united(list(pieces_of(operator, args))):
            simt.simt_allow(piece.begin, piece.end - piece.begin, piece.granule, piece.written, piece.name.encode())

    simt.simt_seed(seed)
    _library.emulate_cuda(path)
    _library.record_calls(allow)
    try:
        yield simt
    finally:
        _library.record_calls(None)
        _library.emulate_cuda(None)
        simt.simt_forget()
