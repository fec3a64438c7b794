"""Frames from one process to another through shared memory: a few places, the oldest overwritten.

Neither side ever waits for the other: who finds a place locked takes another one. A place is
locked by a POSIX record lock, which the kernel lifts when its holder dies, and which orders memory
between processors where plain counters would not (ARM). It knows no camera.
"""

import contextlib
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.errors import DataError
from runtime.preprocess import MAX_PIXELS

PLACES = 4
"""Frames that wait at most; one of them may be in the making."""

_HEAD = struct.Struct("<8s4I")
_MAGIC = b"FFRING01"
_PLACE = struct.Struct("<Q2dI")
_FAULT_BYTES = 256
_AHEAD = 4096
"""Bytes before the pixels of the whole ring, and of each place: whole pages."""

Array = npt.NDArray[Any]


class Shape(NamedTuple):
    """What every frame of a ring is."""

    height: int
    width: int
    channels: int
    """1 (gray), 3 (RGB)."""
    itemsize: int
    """Bytes of a level: 1 or 2."""

    @property
    def array(self) -> tuple[int, ...]:
        """Of the NumPy array: ``[H, W]`` or ``[H, W, 3]``."""
        return (self.height, self.width, self.channels)[: 2 if self.channels == 1 else 3]

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8 or uint16."""
        return np.dtype(f"u{self.itemsize}")

    @property
    def place_bytes(self) -> int:
        """Of one place, in whole pages."""
        size = self.height * self.width * self.channels * self.itemsize
        return _AHEAD + -(-size // _AHEAD) * _AHEAD

    def check(self) -> None:
        """Raise DataError if this is no picture, or too large a one."""
        whole = self.channels in (1, 3) and self.itemsize in (1, 2)
        if not whole or not 0 < self.height * self.width <= MAX_PIXELS:
            raise DataError(
                f"expected gray or RGB pictures of 8 or 16 bit and at most {MAX_PIXELS:,} pixels, "
                f"got {self.height}x{self.width}, {self.channels} channels of {self.itemsize} bytes"
            )


class Taken(NamedTuple):
    """One frame out of the ring."""

    number: int
    """Counts every frame that the camera took, from 1 on: a gap is a loss."""
    time: float
    monotonic: float
    image: Array | None
    """None where ``fault`` says why there is none."""
    fault: str


class RingWriter:
    """The camera's side. ``number`` is that of the newest frame.

    ``waits`` is for who writes no more than is taken: then no place but the next one will do.
    Raises DataError as ``Shape.check``.
    """

    def __init__(self, descriptor: int, shape: Shape, *, waits: bool = False) -> None:
        shape.check()
        self.shape = shape
        self.number = 0
        self._descriptor = descriptor
        os.ftruncate(descriptor, _AHEAD + PLACES * shape.place_bytes)
        self._memory = mmap.mmap(descriptor, 0)
        self._last, self._waits = 0, waits
        _HEAD.pack_into(self._memory, 0, _MAGIC, *shape)

    @contextlib.contextmanager
    def place(self, time: float, monotonic: float, *, fault: str = "") -> Iterator[Array]:
        """The pixels of a free place, to be filled in the block; then the frame is there."""
        self.number += 1
        index = self._lock_oldest()
        start = _AHEAD + index * self.shape.place_bytes
        try:
            # No number: a frame that breaks off half-way is none.
            _PLACE.pack_into(self._memory, start, 0, 0.0, 0.0, 0)
            yield _pixels(self._memory, self.shape, index)
            told = fault.encode(errors="replace")[:_FAULT_BYTES]
            _PLACE.pack_into(self._memory, start, self.number, time, monotonic, len(told))
            at = start + _PLACE.size
            self._memory[at : at + len(told)] = told
        finally:
            _unlock(self._descriptor, index)

    def _lock_oldest(self) -> int:
        """The place after the last one, or the one after that if it is being read."""
        if self._waits:
            self._last = (self._last + 1) % PLACES
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, self._last)
            return self._last
        for step in range(1, PLACES):
            index = (self._last + step) % PLACES
            if _lock(self._descriptor, index):
                self._last = index
                return index
        raise AssertionError("one reader holds one place at most")


class RingReader:
    """The side of the consumer: frames in order, lost ones as gaps in their numbers."""

    def __init__(self, descriptor: int) -> None:
        """Raises DataError if the other side has made no ring."""
        # It may not shrink below what is mapped: reading beyond its end would kill this process.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        size = os.fstat(descriptor).st_size
        if size < _AHEAD:
            raise DataError("expected frames from the camera's process, got none")
        self._memory = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
        magic, *numbers = _HEAD.unpack_from(self._memory)
        self.shape = Shape(*numbers)
        self.shape.check()
        if magic != _MAGIC or size < _AHEAD + PLACES * self.shape.place_bytes:
            raise DataError("what the camera's process shares is no ring of frames")
        self._descriptor = descriptor

    def take(self, after: int) -> Taken | None:
        """The oldest frame that is newer than number ``after``; None if there is none yet."""
        while newer := sorted(n for n in map(self._number, range(PLACES)) if n[0] > after):
            for number, index in newer:
                if taken := self._read(number, index):
                    return taken
        return None

    def _number(self, index: int) -> tuple[int, int]:
        """The frame in this place, 0 if it is being written."""
        if not _lock(self._descriptor, index, shared=True):
            return 0, index
        try:
            start = _AHEAD + index * self.shape.place_bytes
            return _PLACE.unpack_from(self._memory, start)[0], index
        finally:
            _unlock(self._descriptor, index)

    def _read(self, number: int, index: int) -> Taken | None:
        """What is in this place, or None if it is overwritten meanwhile."""
        if not _lock(self._descriptor, index, shared=True):
            return None
        try:
            start = _AHEAD + index * self.shape.place_bytes
            found, when, monotonic, length = _PLACE.unpack_from(self._memory, start)
            if found != number:
                return None
            if length:
                at = start + _PLACE.size
                told = self._memory[at : at + min(length, _FAULT_BYTES)].decode(errors="replace")
                return Taken(number, when, monotonic, None, told)
            image = _pixels(self._memory, self.shape, index).copy()
            return Taken(number, when, monotonic, image, "")
        finally:
            _unlock(self._descriptor, index)


def _pixels(memory: mmap.mmap, shape: Shape, index: int) -> Array:
    start = _AHEAD + index * shape.place_bytes + _AHEAD
    return np.ndarray(shape.array, shape.dtype, memory, start)


def _lock(descriptor: int, index: int, *, shared: bool = False) -> bool:
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB, 1, index)
    except OSError:  # BlockingIOError, or PermissionError on some systems
        return False
    return True


def _unlock(descriptor: int, index: int) -> None:
    fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, index)
