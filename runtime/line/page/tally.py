"""What the verdicts of a line add up to: totals, the last seconds, the last hour.

Told of each frame, it does a few additions; what has to be worked out, is worked out once a second.
It keeps no image and knows no file.
"""

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, get_args

import msgspec

from runtime.delivery.status_document import clipped
from runtime.line.verdict import Finding, Word

STRIP = 60
"""Verdicts of the newest frames that are shown one by one."""

MINUTES = 60

_RATE_S = 10
_RECENT_S = 60
_NAMES = 32
"""Labels and flags at most: a page that anybody can fill is none."""


class Minute(msgspec.Struct, frozen=True, kw_only=True):
    """Frames by verdict."""

    verdicts: dict[Word, int] = {}


class FlagCount(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of flag that was raised since the start."""

    word: str
    count: int
    recent: int
    """In the last minute."""
    reason: str
    """Of the last frame that had it."""
    time: str


class _Second:
    """What was said in one second."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.sources: Counter[str] = Counter()
        self.flags: Counter[str] = Counter()


class Tally:
    """Counts since it was made. ``clock`` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._number = 0
        self._strip: deque[tuple[int, Word]] = deque(maxlen=STRIP)
        self._verdicts: Counter[Word] = Counter()
        self._labels: Counter[str] = Counter()
        self._flags: Counter[str] = Counter()
        self._flagged: dict[str, tuple[str, str]] = {}
        self._seconds: deque[_Second] = deque()
        self._minutes: deque[tuple[int, Counter[Word]]] = deque()

    def add(self, said: Finding) -> None:
        """Count one frame."""
        now = self._clock()
        self._number += 1
        self._strip.append((self._number, said.verdict))
        self._verdicts[said.verdict] += 1
        if said.verdict == "DEFECT" and said.label is not None:
            _count(self._labels, said.label)
        for word in said.flags:
            if _count(self._flags, word):
                self._flagged[word] = (clipped(said.reason), said.time)
        second = self._second(int(now))
        second.sources[said.source] += 1
        second.flags.update(said.flags)
        self._minute(int(now // 60))[said.verdict] += 1

    def totals(self) -> dict[str, Any]:
        """The fields of a ``Snapshot`` that come from verdicts."""
        now = self._clock()
        last_minute = [s for s in self._seconds if s.number > now - _RECENT_S]
        # The second that has just begun would make every rate too low.
        last = [s for s in self._seconds if int(now) - _RATE_S <= s.number < int(now)]
        over = max(1.0, min(_RATE_S, now - self._started))
        sources = sum((s.sources for s in last), Counter[str]())
        flags = sum((s.flags for s in last_minute), Counter[str]())
        return {
            "strip": tuple(self._strip),
            "verdicts": {word: self._verdicts[word] for word in get_args(Word)},
            "labels": dict(self._labels.most_common()),
            "minutes": self._hour(int(now // 60)),
            "per_second": sources.total() / over,
            "rates": {name: count / over for name, count in sources.items()},
            "last_minute": sum(s.sources.total() for s in last_minute),
            "flags": tuple(
                FlagCount(
                    word=word, count=count, recent=flags[word],
                    reason=self._flagged[word][0], time=self._flagged[word][1],
                )
                for word, count in self._flags.most_common()
            ),
        }  # fmt: skip

    def _second(self, number: int) -> _Second:
        if not self._seconds or self._seconds[-1].number != number:
            self._seconds.append(_Second(number))
            while self._seconds[0].number < number - _RECENT_S:
                self._seconds.popleft()
        return self._seconds[-1]

    def _minute(self, number: int) -> Counter[Word]:
        if not self._minutes or self._minutes[-1][0] != number:
            self._minutes.append((number, Counter()))
            if len(self._minutes) > MINUTES:
                self._minutes.popleft()
        return self._minutes[-1][1]

    def _hour(self, now: int) -> tuple[Minute, ...]:
        known = dict(self._minutes)
        numbers = range(now - MINUTES + 1, now + 1)
        return tuple(Minute(verdicts=dict(known.get(number, {}))) for number in numbers)


def _count(counter: Counter[str], name: str) -> bool:
    """Count ``name``, unless it is one too many."""
    if name not in counter and len(counter) >= _NAMES:
        return False
    counter[name] += 1
    return True
