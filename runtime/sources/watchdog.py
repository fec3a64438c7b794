"""When a camera counts as lost, and what is said of it how often: decisions, without a camera."""

import statistics
from collections import deque

_NOTICED_S, _NOTICED_PERIODS = 0.8, 1.8
"""The promise is one second, or two frame periods if they are longer. The rest of it is for ending
the process and saying so, on a machine that is busy."""

_FIRST_OPENING_S = 20.0
_OPENING_S = 5.0
"""What a camera may take for its first frame: before it is known, and afterwards at least."""

_PAUSES_S = (0.0, 0.5, 1.0, 2.0)
"""Before one process follows the next; the last one again and again."""

_AGAIN_S, _NEWS_S = 60.0, 10.0
"""A loss is told again after the one time, or the other if there is a new reason."""


class Watchdog:
    """Follows one camera through losses and returns. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._gaps: deque[float] = deque(maxlen=8)
        self._period_s: float | None = None
        self._patience = 1
        self._sign: float | None = None
        self._taken: float | None = None
        self._began = 0.0
        self._opening_s: float | None = None
        self._waits_for_a_trigger = False
        self._failures = 0
        self._last_told: tuple[float, str] | None = None
        self.last_frame: float | None = None
        """When the newest frame of all was taken."""

    def begin(self, now: float) -> None:
        """A process was started. The camera may have another rhythm now than it had."""
        self._gaps.clear()
        self._sign = self._taken = None
        self._waits_for_a_trigger = False
        self._began = now

    def frame(self, taken: float) -> None:
        """A frame was taken; the camera is there."""
        if self._taken is not None:
            self._gaps.append(taken - self._taken)
            self._period_s = statistics.median(self._gaps)
            self._patience = 1
        self._there(taken)
        self._taken = self.last_frame = taken

    def alive(self, now: float) -> None:
        """The camera waits for its trigger, and answers."""
        self._waits_for_a_trigger = True
        self._there(now)

    def _there(self, now: float) -> None:
        if self._sign is None:
            self._opening_s = min(now - self._began, _FIRST_OPENING_S)
            self._failures, self._last_told = 0, None
        self._sign = now

    @property
    def deadline(self) -> float:
        """Without a sign of the camera until then it is lost."""
        if self._sign is None:
            return self._began + self._opening_limit_s
        return self._sign + self._limit_s

    @property
    def _limit_s(self) -> float:
        if self._waits_for_a_trigger:
            return _NOTICED_S
        if self._period_s is None:  # one frame does not say when the next is due
            return self._opening_limit_s
        return max(_NOTICED_S, _NOTICED_PERIODS * self._period_s) * self._patience

    @property
    def _opening_limit_s(self) -> float:
        if self._opening_s is None:
            return _FIRST_OPENING_S
        return max(_OPENING_S, 2 * self._opening_s)

    def lost(self) -> float:
        """The camera is gone: how many seconds to wait before the next process."""
        self._failures += 1
        if self._taken is not None and not self._gaps:
            self._patience *= 2  # was it lost after its first frame, or has it become slower?
        return _PAUSES_S[min(self._failures, len(_PAUSES_S)) - 1]

    def news(self, now: float, why: str) -> str | None:
        """What is to be said of the loss now, if anything."""
        if self._last_told is not None:
            told, before = self._last_told
            if now - told < (_AGAIN_S if why == before else _NEWS_S):
                return None
        self._last_told = now, why
        since = "yet" if self.last_frame is None else f"for {now - self.last_frame:.1f} s"
        return f"camera lost: no frame {since}" + (f": {why}" if why else "")
