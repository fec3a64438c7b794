"""A video file as a source of frames: each of them once, then it ends.

A file can wait, so nothing is dropped. It is decoded in a process of its own all the same: what
comes from outside may crash a decoder or hang it.
"""

import threading
import time
from collections.abc import Iterator

from runtime.sources.address import Address
from runtime.sources.camera_child import CameraChild
from runtime.sources.frame import Frame
from runtime.sources.frame_ring import Array

_STUCK_S = 60.0
"""A frame that takes longer to decode never comes: the disk is gone, or the decoder hangs."""


class Video:
    """One video file. What cannot be read of it is a last frame without an image."""

    live = False
    dropped = 0

    def __init__(self, address: Address, name: str) -> None:
        self.name = name
        self._address = address
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._child: CameraChild | None = None

    def __iter__(self) -> Iterator[Frame]:
        """All frames from the first one on; their time is that of their decoding."""
        child = self._start()
        if child is None:
            return
        number, ended = 0, False
        try:
            deadline = time.monotonic() + _STUCK_S
            while not self._closed.is_set():
                if taken := child.take(number):
                    number = taken.number
                    yield self._frame(number, taken.image, taken.time, taken.monotonic)
                    deadline = time.monotonic() + _STUCK_S
                elif ended or time.monotonic() > deadline:
                    break
                else:
                    ended = child.hear(deadline - time.monotonic()) is None
        finally:
            why = self._end(child)
        if not ended:
            why = f"no frame for {_STUCK_S:g} s"
        if why and not self._closed.is_set():
            fault = f"{self._address.place}: {why}"
            yield self._frame(number + 1, None, time.time(), time.monotonic(), fault)

    def done(self, frame: Frame) -> None:
        """After a restart a video begins anew: how far it got is not kept."""

    def close(self) -> None:
        """End the process and the iteration; any thread may call it."""
        with self._lock:
            self._closed.set()
            if self._child:
                self._child.dismiss()

    def _start(self) -> CameraChild | None:
        with self._lock:
            if not self._closed.is_set():
                self._child = CameraChild(self._address, waits=True)
            return self._child

    def _end(self, child: CameraChild) -> str:
        with self._lock:
            self._child = None
            return child.close()

    def _frame(
        self, number: int, image: Array | None, when: float, monotonic: float, fault: str = ""
    ) -> Frame:
        return Frame(self.name, f"{number:06d}", image, when, monotonic, fault)
