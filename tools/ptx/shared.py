"""Shared memory of a block, with a shadow: who accessed a byte last, and what was waited for since.

Two accesses of different threads, one of them a write, are a race when no barrier is between them: a barrier of the
block, or, within a warp, one of the warp. What cp.async copies is there when its thread has waited for it, and not
before; what nobody has written cannot be read.
"""

from __future__ import annotations

import numpy as np

from ptx.active import WARP
from ptx.errors import PtxError
from ptx.types import UNSIGNED, Array

_NOBODY, _SEVERAL = -1, -2


class SharedMemory:
    """Memory of `size` bytes for `threads` threads."""

    def __init__(self, size: int, threads: int) -> None:
        self.size = size
        self._bytes = np.zeros(size, np.uint8)
        self._written = np.zeros(size, bool)
        self._pending = np.zeros(size, bool)  # by a cp.async that was not waited for
        self._writer = np.full(size, _NOBODY, np.int32)
        self._write_epoch = np.full(size, -1, np.int32)
        self._write_warp_epoch = np.zeros(size, np.int32)
        self._reader = np.full(size, _NOBODY, np.int32)  # _SEVERAL: threads of one warp; then _reader_warp is it,
        self._reader_warp = np.full(size, _NOBODY, np.int32)  # _SEVERAL: of more than one
        self._read_epoch = np.full(size, -1, np.int32)
        self._read_warp_epoch = np.zeros(size, np.int32)
        self._epoch = 0
        self._warp_epoch = np.zeros(threads // WARP, np.int32)

    def pass_barrier(self) -> None:
        """All threads of the block have come to a barrier."""
        self._epoch += 1

    def pass_warp_barrier(self, warps: Array) -> None:
        """All threads of these warps have."""
        self._warp_epoch[warps] += 1

    def load(self, threads: Array, addresses: Array, count: int, width: int) -> Array:
        """`count` neighbouring elements of `width` bytes at each address: [n, count]."""
        places = self._places(addresses, count * width, "a read")
        self._check_pending(places, "a read")
        if not self._written[places].all():
            raise PtxError(
                f"a read of shared memory at {self._first(places, ~self._written)}, which nobody has written"
            )
        self._check_writes(threads, places, "a read")
        self._note_reads(threads, places)
        return self._bytes[places].view(UNSIGNED[8 * width])

    def store(self, threads: Array, addresses: Array, values: Array) -> None:
        """Write elements [n, count]."""
        data = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
        places = self._places(addresses, data.shape[1], "a write")
        self._check_pending(places, "a write")
        self._check_writes(threads, places, "a write")
        self._check_reads(threads, places)
        self._note_writes(threads, places)
        self._bytes[places] = data
        if (self._bytes[places] != data).any():
            raise PtxError("race: threads write different values to the same shared memory at once")
        self._written[places] = True

    def begin_copy(self, threads: Array, addresses: Array, size: int) -> None:
        """A cp.async to these addresses: they may change at any time until it was waited for."""
        places = self._places(addresses, size, "a cp.async")
        self._check_pending(places, "a cp.async")
        self._check_writes(threads, places, "a cp.async")
        self._check_reads(threads, places)
        self._note_writes(threads, places)
        self._pending[places] = True

    def end_copy(self, threads: Array, addresses: Array, data: Array) -> None:
        """Its data uint8 [n, size] arrive."""
        places = addresses.astype(np.int64)[:, None] + np.arange(data.shape[1])
        self._check_reads(threads, places)
        self._note_writes(threads, places)
        self._bytes[places] = data
        self._pending[places] = False
        self._written[places] = True

    def _places(self, addresses: Array, size: int, what: str) -> Array:
        places = addresses.astype(np.int64)
        if (places % size).any():
            raise PtxError(
                f"misaligned: {what} of {size} bytes of shared memory at {int(places[(places % size) != 0][0])}"
            )
        if int(places.min()) < 0 or int(places.max()) + size > self.size:
            outside = int(places[(places < 0) | (places + size > self.size)][0])
            raise PtxError(f"out of bounds: {what} of {size} bytes at {outside} of {self.size} bytes of shared memory")
        return places[:, None] + np.arange(size)

    def _first(self, places: Array, which: Array) -> int:
        return int(places[which[places]][0])

    def _check_pending(self, places: Array, what: str) -> None:
        if self._pending[places].any():
            first = self._first(places, self._pending)
            raise PtxError(f"{what} of shared memory at {first} before the cp.async to it was waited for")

    def _check_writes(self, threads: Array, places: Array, what: str) -> None:
        recent = self._write_epoch[places] == self._epoch
        if not recent.any():
            return
        writer, me = self._writer[places], threads[:, None]
        synchronised = (writer // WARP == me // WARP) & (self._write_warp_epoch[places] < self._warp_epoch[me // WARP])
        race = recent & (writer != me) & ~synchronised
        if race.any():
            who, byte = np.argwhere(race)[0]
            raise PtxError(
                f"race: {what} of shared memory at {int(places[who, byte])} by thread {int(threads[who])}, which "
                f"thread {int(writer[who, byte])} writes, without a barrier between them"
            )

    def _check_reads(self, threads: Array, places: Array) -> None:
        recent = self._read_epoch[places] == self._epoch
        if not recent.any():
            return
        me = threads[:, None]
        warp = self._reader_warp[places]
        synchronised = (warp == me // WARP) & (self._read_warp_epoch[places] < self._warp_epoch[me // WARP])
        race = recent & (self._reader[places] != me) & ~synchronised
        if race.any():
            who, byte = np.argwhere(race)[0]
            raise PtxError(
                f"race: a write of shared memory at {int(places[who, byte])} by thread {int(threads[who])}, which "
                "other threads read, without a barrier between them"
            )

    def _note_writes(self, threads: Array, places: Array) -> None:
        self._writer[places] = threads[:, None]
        self._write_epoch[places] = self._epoch
        self._write_warp_epoch[places] = self._warp_epoch[threads // WARP][:, None]

    def _note_reads(self, threads: Array, places: Array) -> None:
        me, my_warp = threads[:, None], (threads // WARP)[:, None]
        fresh = self._read_epoch[places] != self._epoch
        earlier, earlier_warp = self._reader[places], self._reader_warp[places]
        reader = np.where(fresh | (earlier == me), me, _SEVERAL)
        warp = np.where(fresh | (earlier_warp == my_warp), my_warp, _SEVERAL)
        self._reader[places] = reader
        self._reader_warp[places] = warp
        # Of several threads that read a byte by this same instruction, the last was noted.
        self._reader[places[self._reader[places] != reader]] = _SEVERAL
        self._reader_warp[places[self._reader_warp[places] != warp]] = _SEVERAL
        self._read_epoch[places] = self._epoch
        self._read_warp_epoch[places] = self._warp_epoch[threads // WARP][:, None]
