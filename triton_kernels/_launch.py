"""Launching a kernel, and what the host side of several operators shares."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

Grid = tuple[int, ...]

#: Programs that CUDA allows in the second and third axis of a grid; the first takes 2**31 - 1.
MAX_GRID_YZ = 65535


class Launch(NamedTuple):
    """A kernel with all that it is launched with."""

    kernel: Any
    grid: Grid
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Triton's; multiply-adds are fused in `tl.dot` alone, so that a formula has the same bits everywhere."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}


def compile_and_run(launch: Launch) -> None:
    """Let Triton compile the kernel, where it has not yet, and run it."""
    launch.kernel[launch.grid](*launch.args, **launch.constants, **launch.options)


_run: Callable[[Launch], None] = compile_and_run


def launch_with(run: Callable[[Launch], None] | None) -> None:
    """What becomes of launches from now on; None: `compile_and_run`."""
    global _run
    _run = run or compile_and_run


class _Recording(threading.local):
    launches: list[Launch] | None = None


_recording = _Recording()


def recorded(call: Callable[[], object]) -> list[Launch]:
    """What a launcher would run. Other threads go on launching."""
    launches = _recording.launches = []
    try:
        call()
    finally:
        _recording.launches = None
    return launches


def launch(kernel: Any, grid: Grid, *args: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any) -> None:
    """Run `kernel` over `grid`; an empty grid is nothing to do."""
    if 0 in grid:
        return
    if max(grid[1:], default=0) > MAX_GRID_YZ:
        raise ValueError(
            f"{kernel.__name__}: expected at most {MAX_GRID_YZ} programs in the second and third axis of its grid, "
            f"got {grid}"
        )
    launched = Launch(kernel, grid, args, constants, num_warps, num_stages)
    if _recording.launches is None:
        _run(launched)
    else:
        _recording.launches.append(launched)


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below a / b."""
    return -(-a // b)


def power_of_two(n: int, low: int = 1, high: int = 1 << 20) -> int:
    """Smallest power of two not below n, kept within `low` and `high`."""
    return min(max(1 << max(n - 1, 0).bit_length(), low), high)


class Rows(NamedTuple):
    """The leading dimensions of a tensor as rows of its last one, `inner` rows with one stride after the other."""

    num_rows: int
    size: int
    inner: int
    stride: int
    outer_stride: int | None  # None: there is one stride


def rows_of(tensor: Tensor) -> Rows:
    """Rows of a tensor whose last dimension has stride 1. They have two strides at most, as was checked."""
    size, count = tensor.shape[-1], 1
    inner, stride = 1, size
    outer_stride: int | None = None
    for n, s in reversed(list(zip(tensor.shape, tensor.stride(), strict=True))[:-1]):
        count *= n
        if n == 1 or outer_stride is not None:
            continue
        if inner == 1:
            inner, stride = n, s
        elif s == inner * stride:
            inner *= n
        else:
            outer_stride = s
    return Rows(count, size, inner, stride, outer_stride)
