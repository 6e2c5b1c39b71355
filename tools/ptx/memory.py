"""Global memory: pieces of this process's own, at their own addresses; what lies outside of them is out of bounds."""

from __future__ import annotations

import bisect
import ctypes
from dataclasses import dataclass

import numpy as np

from ptx.errors import PtxError
from ptx.types import UNSIGNED, Array

_GRANULE = 16  # the widest access


@dataclass(frozen=True)
class Piece:
    """Memory from `begin` up to `end` that a kernel may read, and write where `writable`."""

    begin: int
    end: int
    writable: bool
    name: str


class GlobalMemory:
    """What a kernel may access."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._begins: list[int] = []
        self._views: list[dict[int, Array]] = []

    def add(self, begin: int, size: int, writable: bool, name: str) -> None:
        """Allow `size` bytes from this address on. They must outlive this object, and overlap no others."""
        if size == 0:
            return
        place = bisect.bisect(self._begins, begin)
        for other in self._pieces[max(place - 1, 0) : place + 1]:
            if begin < other.end and other.begin < begin + size:
                raise ValueError(f"{name}: expected memory that overlaps no other, got some of {other.name}")
        start = begin - begin % _GRANULE
        # Down to an aligned address, so that elements of any width lie at multiples of it.
        raw = np.frombuffer((ctypes.c_uint8 * (begin + size - start)).from_address(start), np.uint8)
        views = {width: raw[: len(raw) - len(raw) % width].view(UNSIGNED[8 * width]) for width in (1, 2, 4, 8)}
        self._pieces.insert(place, Piece(begin, begin + size, writable, name))
        self._begins.insert(place, begin)
        self._views.insert(place, views)

    def add_array(self, array: Array, writable: bool, name: str) -> int:
        """Allow the memory of a contiguous array; its address."""
        if not array.flags.c_contiguous:
            raise ValueError(f"{name}: expected a contiguous array")
        self.add(array.ctypes.data, array.nbytes, writable, name)
        return int(array.ctypes.data)

    def _find(self, addresses: Array, size: int, is_write: bool) -> list[tuple[int, Array | slice]]:
        """Pieces that the accesses lie in, and which accesses those are."""
        low, high = int(addresses.min()), int(addresses.max())
        first = bisect.bisect(self._begins, low) - 1
        if first >= 0 and low >= self._pieces[first].begin and high + size <= self._pieces[first].end:
            found: list[tuple[int, Array | slice]] = [(first, slice(None))]
        else:
            owners = np.searchsorted(np.array(self._begins, np.uint64), addresses, side="right") - 1
            for owner, address in zip(owners.tolist(), addresses.tolist(), strict=True):
                if owner < 0 or address + size > self._pieces[owner].end:
                    raise PtxError(self._outside(address, size, is_write))
            found = [(int(owner), owners == owner) for owner in np.unique(owners)]
        if size & (size - 1) == 0 and (addresses & np.uint64(size - 1)).any():
            address = int(addresses[(addresses & np.uint64(size - 1)) != 0][0])
            raise PtxError(f"misaligned: an access of {size} bytes at {address:#x}")
        if is_write:
            for owner, _ in found:
                if not self._pieces[owner].writable:
                    raise PtxError(f"read-only memory: a write of {size} bytes to {self._pieces[owner].name}")
        return found

    def _outside(self, address: int, size: int, is_write: bool) -> str:
        nearest = min(self._pieces, key=lambda p: min(abs(address - p.begin), abs(address - p.end)), default=None)
        where = (
            f"at offset {address - nearest.begin} of {nearest.name} ({nearest.end - nearest.begin} bytes)"
            if nearest
            else f"at {address:#x}"
        )
        return f"out of bounds: {'a write' if is_write else 'a read'} of {size} bytes {where}"

    def check(self, addresses: Array, size: int, is_write: bool = False) -> None:
        """Raise unless all of these accesses are allowed."""
        if len(addresses):
            self._find(addresses, size, is_write)

    def load(self, addresses: Array, count: int, width: int) -> Array:
        """`count` neighbouring elements of `width` bytes at each address (uint64 [n]): [n, count]."""
        out = np.empty((len(addresses), count), UNSIGNED[8 * width])
        if len(addresses):
            for owner, which in self._find(addresses, count * width, False):
                index = self._index(owner, addresses[which], width)
                out[which] = self._views[owner][width][index[:, None] + np.arange(count)]
        return out

    def store(self, addresses: Array, values: Array) -> None:
        """Write elements [n, count]; of several to the same place, the last."""
        if len(addresses):
            width = values.dtype.itemsize
            for owner, which in self._find(addresses, values.shape[1] * width, True):
                index = self._index(owner, addresses[which], width)
                self._views[owner][width][index[:, None] + np.arange(values.shape[1])] = values[which]

    def _index(self, owner: int, addresses: Array, width: int) -> Array:
        begin = self._pieces[owner].begin
        return (addresses - np.uint64(begin - begin % _GRANULE)).astype(np.int64) // width
