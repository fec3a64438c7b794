"""Several sources become one stream of frames, each in its turn.

A source is read by a thread of its own, one frame ahead, and kept waiting until that frame is
taken: files wait, and a camera lets its oldest frames go and says so itself. It judges nothing.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from runtime.sources.frame import Frame, Source

_log = logging.getLogger(__name__)

_AGAIN_S = (1.0, 30.0)
"""First and longest pause before a source that failed is asked again."""

_CLOSE_S = 2.0


class Taken(NamedTuple):
    """The next frame, and whose it is."""

    frame: Frame
    source: Source


class _Lane:
    """One source, and the frame that is next."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.frame: Frame | None = None
        self.newest: float | None = None
        self.ended = False


class Feed:
    """The frames of ``sources``; ``clock`` is monotonic, in seconds."""

    def __init__(
        self, sources: Sequence[Source], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._lanes = [_Lane(source) for source in sources]
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._turn = 0
        self._threads = [
            threading.Thread(target=self._read, args=(lane,), daemon=True, name=lane.source.name)
            for lane in self._lanes
        ]
        for thread in self._threads:
            thread.start()

    def take(self, timeout_s: float) -> Taken | None:
        """The next frame, source by source in turn; None if none comes for ``timeout_s``."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.ended or any(lane.frame for lane in self._lanes), timeout_s
            )
            for step in range(len(self._lanes)):
                lane = self._lanes[(self._turn + step) % len(self._lanes)]
                if lane.frame:
                    taken = Taken(lane.frame, lane.source)
                    self._turn += step + 1
                    lane.frame = None
                    self._changed.notify_all()  # there is room again
                    return taken
        return None

    @property
    def ended(self) -> bool:
        """Whether no source has more frames, and none is waiting."""
        return all(lane.ended and not lane.frame for lane in self._lanes)

    @property
    def sources(self) -> tuple[Source, ...]:
        """All of them, ended or not."""
        return tuple(lane.source for lane in self._lanes)

    def ages(self) -> dict[str, float]:
        """Seconds since the newest frame of each source that ever gave one."""
        now = self._clock()
        return {
            lane.source.name: now - lane.newest for lane in self._lanes if lane.newest is not None
        }

    def dropped(self) -> dict[str, int]:
        """Frames that were lost because the line was behind, of each source."""
        return {source.name: source.dropped for source in self.sources}

    def close(self) -> None:
        """Let go of every source; a frame that waits is not inspected any more."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        for lane in self._lanes:
            lane.source.close()
        for thread in self._threads:
            thread.join(_CLOSE_S)

    def _read(self, lane: _Lane) -> None:
        first, longest = _AGAIN_S
        pause = first
        while not self._closed.is_set():
            try:
                for frame in lane.source:
                    self._put(lane, frame)
                    pause = first
                break
            except Exception as error:  # of any library that reads a camera
                _log.exception("%s", lane.source.name)
                self._put(lane, _failure(lane.source, error))
            self._closed.wait(pause)
            pause = min(2 * pause, longest)
        with self._changed:
            lane.ended = True
            self._changed.notify_all()

    def _put(self, lane: _Lane, frame: Frame) -> None:
        with self._changed:
            self._changed.wait_for(lambda: lane.frame is None or self._closed.is_set())
            lane.frame = frame
            if frame.image is not None:
                lane.newest = frame.monotonic
            self._changed.notify_all()


def _failure(source: Source, error: Exception) -> Frame:
    fault = f"{type(error).__name__}: {error}"
    return Frame(source.name, "", None, time.time(), time.monotonic(), fault)
