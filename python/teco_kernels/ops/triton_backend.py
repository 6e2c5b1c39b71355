"""Sends tensors of a device to the Triton kernels: the same operators, checks and shapes, other kernels.

`teco_kernels.triton_kernels`, and with it Triton, is imported when this is asked for, never before.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch

from teco_kernels.ops import _library

Device = Literal["cpu", "cuda"]

_Launch = ctypes.CFUNCTYPE(ctypes.c_bool)
_launch_next = ctypes.CDLL(str(_library._LIBRARY)).teco_launch_next
_launch_next.argtypes, _launch_next.restype = [ctypes.c_void_p], None

_device: Device | None = None
_registered: torch.library.Library | None = None


def use_triton(device: Device | None) -> None:
    """Send the tensors of this kind of device to the Triton kernels, in this process; None ends it.

    Parameters
    ----------
    device : {"cpu", "cuda"} or None
        "cuda": tensors on a GPU, NVIDIA's or AMD's. "cpu": Triton's interpreter, for tests; it needs
        ``TRITON_INTERPRET=1`` in the environment before Triton is first imported. Operators without a Triton kernel
        (`supports` tells) stay where they are.

    Raises
    ------
    ImportError
        When Triton is not installed, and for a GPU, nothing was compiled ahead of time either.
    RuntimeError
        When Triton was imported for the other of both.
    """
    global _device, _registered
    if device not in ("cpu", "cuda", None):
        raise ValueError(f"device: expected 'cpu', 'cuda' or None, got {device!r}")
    if device is not None:  # first: what cannot be chosen leaves the one that was
        from teco_kernels import triton_kernels

        triton_kernels.prepare(interpreted=device == "cpu")
    if _registered is not None:
        _registered._destroy()
        _device, _registered = None, None
    if device is None:
        return
    library = torch.library.Library("teco_kernels", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is replaced, which is the point
        for name, launcher in triton_kernels.launchers().items():
            checks = torch.library.get_kernel(f"teco_kernels::{name}", device.upper())
            library.impl(name, partial(_call, checks, launcher), device.upper(), with_keyset=True)
    _device, _registered = device, library


def triton_device() -> Device | None:
    """The device whose tensors go to Triton's kernels."""
    return _device


def _device_of(args: tuple[Any, ...]) -> AbstractContextManager[object]:
    """Makes the device of the tensors current, as kernels are launched on that."""
    tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _call(checks: Any, launcher: Callable[..., None], keys: Any, *args: Any) -> None:
    """Let the compiled operator check its arguments; where it would run its kernel, it runs `launcher`."""
    raised: list[BaseException] = []
    launched = False

    def launch() -> bool:
        nonlocal launched
        if not launched:  # an operator may have several kernels of its own, a launcher does all of it
            launched = True
            try:
                with _device_of(args):
                    launcher(*args)
            except BaseException as error:
                raised.append(error)
        return not raised

    callback = _Launch(launch)
    _launch_next(ctypes.cast(callback, ctypes.c_void_p))
    try:
        checks.call_boxed(keys, *args)
    except RuntimeError:
        if raised:
            raise raised[0] from None
        raise
    finally:
        _launch_next(None)
