"""The CUDA kernels, run on the CPU by csrc/simt: the library, and operator calls whose memory accesses are checked."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


@contextmanager
def emulation(path: Path | None = None, seed: int = 0) -> Iterator[ctypes.CDLL]:
    """Within it, operators on CPU tensors run the emulated CUDA kernels, threads in the order of the seed.

    A kernel may touch the storage of its operator's tensors, and write only those that the schema says it writes; any
    other access is a RuntimeError, like every finding.
    """
    path = path or library()
    simt = ctypes.CDLL(str(path))
    simt.simt_allow.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_bool, ctypes.c_char_p]

    def allow(operator: Any, args: tuple[Any, ...]) -> None:
        simt.simt_forget()
        storages: dict[int, tuple[int, int, bool, str]] = {}
        for argument, tensor in zip(operator._schema.arguments, args, strict=True):
            if not isinstance(tensor, torch.Tensor) or tensor.numel() == 0:
                continue
            storage, written = (
                tensor.untyped_storage(),
                argument.alias_info is not None and argument.alias_info.is_write,
            )
            _, granule, was_written, names = storages.get(storage.data_ptr(), (0, 8, False, ""))
            storages[storage.data_ptr()] = (
                storage.nbytes(),
                min(granule, tensor.element_size()),
                written or was_written,
                f"{names} and {argument.name}" if names else argument.name,
            )
        for address, (size, granule, written, names) in storages.items():
            simt.simt_allow(address, size, granule, written, names.encode())

    simt.simt_seed(seed)
    _library.emulate_cuda(path)
    _library.record_calls(allow)
    try:
        yield simt
    finally:
        _library.record_calls(None)
        _library.emulate_cuda(None)
        simt.simt_forget()
