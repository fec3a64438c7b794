"""A camera as a source of frames: it may vanish and come back, and is never waited for in vain.

Loss is a frame without an image, so that the verdict is NOT INSPECTED. It knows no library that
reads cameras: those live in a process of their own, one after the other.
"""

import logging
import threading
import time
from collections.abc import Iterator

from runtime.sources.address import Address
from runtime.sources.camera_child import CameraChild
from runtime.sources.camera_process import ALIVE
from runtime.sources.frame import Frame
from runtime.sources.frame_ring import Taken
from runtime.sources.watchdog import Watchdog

_log = logging.getLogger(__name__)

_DROPS_S = 1.0
"""Losses to slowness are told no more often: each costs a record on disk."""


class Camera:
    """One camera. Frames that nobody takes in time make room for newer ones.

    Whoever is slower than the camera gets a frame without an image that says how many were lost,
    at most once a second.
    """

    live = True
    """It goes on while nobody looks."""

    def __init__(self, address: Address, name: str) -> None:
        self.name = name
        self.dropped = 0
        """Frames that were lost since the start, because this device or its network is too slow."""
        self.restarts = 0
        """Processes that had to be replaced."""
        self._address = address
        self._watchdog = Watchdog()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._child: CameraChild | None = None
        self._untold, self._told = 0, float("-inf")

    @property
    def pid(self) -> int | None:
        """Of the camera's process; None while there is none."""
        with self._lock:
            return self._child.pid if self._child else None

    def __iter__(self) -> Iterator[Frame]:
        """Frames, and news of their absence, until ``close``; from the next frame on.

        The camera's process dies with the thread that iterates.
        """
        while child := self._start():
            lost = False
            try:
                yield from self._frames(child)
                lost = not self._closed.is_set()
            finally:
                why = self._end(child, lost)
            if self._closed.is_set():
                return
            pause = self._watchdog.lost()
            if told := self._watchdog.news(time.monotonic(), why):
                _log.warning("%s: %s", self.name, told)
                yield self._fault("lost", told)
            self._closed.wait(pause)
            self.restarts += 1

    def done(self, frame: Frame) -> None:
        """A camera brings no frame twice."""

    def close(self) -> None:
        """End the camera's process and the iteration; any thread may call it."""
        with self._lock:
            self._closed.set()
            if self._child:
                self._child.dismiss()

    def _start(self) -> CameraChild | None:
        with self._lock:
            if self._closed.is_set():
                return None
            self._child = CameraChild(self._address)
            self._stamp = time.strftime(f"%Y%m%d-%H%M%S-{self.restarts}", time.gmtime())
            self._watchdog.begin(time.monotonic())
            return self._child

    def _end(self, child: CameraChild, lost: bool) -> str:
        with self._lock:
            self._child = None
            if not lost:
                child.dismiss()
            return child.close()

    def _frames(self, child: CameraChild) -> Iterator[Frame]:
        """Those of one process, as long as the camera gives signs."""
        number, ended = 0, False
        while not self._closed.is_set():
            if taken := child.take(number):
                self._watchdog.frame(taken.monotonic)
                self._untold += taken.number - number - 1
                self.dropped += taken.number - number - 1
                number = taken.number
                if lost := self._drops():
                    yield self._fault(f"{number}-dropped", lost)
                yield self._frame(taken)
                continue
            left_s = self._watchdog.deadline - time.monotonic()
            if ended or left_s <= 0:
                return
            words = child.hear(left_s)
            if words is None:
                ended = True  # what it left in memory is still to be taken
            elif ALIVE in words:
                self._watchdog.alive(time.monotonic())

    def _frame(self, taken: Taken) -> Frame:
        name = f"{self._stamp}-{taken.number}"
        return Frame(self.name, name, taken.image, taken.time, taken.monotonic, taken.fault)

    def _fault(self, word: str, why: str) -> Frame:
        name = f"{self._stamp}-{word}"
        return Frame(self.name, name, None, time.time(), time.monotonic(), why)

    def _drops(self) -> str:
        now = time.monotonic()
        if not self._untold or now - self._told < _DROPS_S:
            return ""
        count, self._untold, self._told = self._untold, 0, now
        return f"{count} frames up to this one were dropped: this device is slower than the camera"
