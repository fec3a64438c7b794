"""Several sources become one stream of frames, each in its turn.

A source is read by a thread of its own into a short queue. One that can wait, like files in a
folder, is kept waiting while its queue is full. One that cannot, a camera, loses its oldest frame;
that is counted, and told by a frame without an image, so that nobody takes a lost one for
inspected. It judges nothing.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from runtime.sources.frame import Frame, Source

_log = logging.getLogger(__name__)

ROOM = 4
"""Frames of one source that wait at most: older ones would say nothing about the line now."""

_TOLD_S = 1.0
"""Losses of a source are told no more often: each costs a record on disk."""

_AGAIN_S = (1.0, 30.0)
"""First and longest pause before a source that failed is asked again."""


class Taken(NamedTuple):
    """The next frame, and whose it is."""

    frame: Frame
    source: Source | None
    """None if the frame tells of lost ones: there is nothing to be done with it."""


class _Lane:
    """One source, its queue, and what was lost of it."""

    def __init__(self, source: Source, live: bool) -> None:
        self.source, self.live = source, live
        self.frames: deque[Frame] = deque()
        self.ended = False
        self.newest: float | None = None
        self.untold = 0
        self.last_lost: Frame | None = None
        self.told = float("-inf")


class Feed:
    """The frames of ``sources``; the names in ``live`` are of those that cannot wait.

    ``room`` is that of one queue; ``clock`` is monotonic, in seconds.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        live: frozenset[str] = frozenset(),
        room: int = ROOM,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._room, self._clock = room, clock
        self._lanes = [_Lane(source, source.name in live) for source in sources]
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._turn = 0
        self.why_behind = "this device is too slow for its sources"
        """Said of frames that are lost from now on."""
        self.dropped: Counter[str] = Counter()
        """Frames lost so far, by source."""
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
                lambda: self.ended or any(map(self._waiting, self._lanes)), timeout_s
            )
            for step in range(len(self._lanes)):
                lane = self._lanes[(self._turn + step) % len(self._lanes)]
                if lost := self._loss(lane):
                    return Taken(lost, None)
                if lane.frames:
                    self._turn += step + 1
                    self._changed.notify_all()  # there is room again
                    return Taken(lane.frames.popleft(), lane.source)
        return None

    @property
    def ended(self) -> bool:
        """Whether no source has more frames, and none is waiting."""
        return all(lane.ended and not self._waiting(lane) for lane in self._lanes)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources."""
        return tuple(lane.source.name for lane in self._lanes)

    def ages(self) -> dict[str, float]:
        """Seconds since the newest frame of each source that ever gave one."""
        now = self._clock()
        return {
            lane.source.name: now - lane.newest for lane in self._lanes if lane.newest is not None
        }

    def close(self) -> None:
        """Let go of every source; frames that wait are not inspected any more."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        for lane in self._lanes:
            lane.source.close()
        for thread in self._threads:
            thread.join(timeout=_AGAIN_S[0])

    def _waiting(self, lane: _Lane) -> bool:
        return bool(lane.frames) or self._loss_due(lane)

    def _loss_due(self, lane: _Lane) -> bool:
        last = lane.ended and not lane.frames
        return lane.untold > 0 and (last or self._clock() - lane.told >= _TOLD_S)

    def _loss(self, lane: _Lane) -> Frame | None:
        if lane.last_lost is None or not self._loss_due(lane):
            return None
        fault = f"{lane.untold} frames up to this one were dropped: {self.why_behind}"
        frame = lane.last_lost._replace(image=None, fault=fault)
        lane.untold, lane.last_lost, lane.told = 0, None, self._clock()
        return frame

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
            if lane.live and len(lane.frames) >= self._room:
                lane.last_lost = lane.frames.popleft()
                lane.untold += 1
                self.dropped[lane.source.name] += 1
            self._changed.wait_for(lambda: len(lane.frames) < self._room or self._closed.is_set())
            lane.frames.append(frame)
            lane.newest = frame.monotonic
            self._changed.notify_all()


def _failure(source: Source, error: Exception) -> Frame:
    fault = f"{type(error).__name__}: {error}"
    return Frame(source.name, "", None, time.time(), time.monotonic(), fault)
