"""The loop of the line: what is found on a frame is kept, said, and only then done with.

One thread does it all, so that whoever hears that the loop is alive knows that inferences end. What
hangs on the loop (registers, page, evidence, drift) is told of each verdict after it is safe; a
fault of one of them is said and stops nothing. It knows no camera, no model and no broker.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Protocol

from runtime.line.feed import Feed, Taken
from runtime.line.in_hand import InHand
from runtime.line.inspection import Inspected, Inspector
from runtime.line.line_metrics import LineMetrics
from runtime.line.notify import Notifier
from runtime.line.outbox import Unkept
from runtime.line.thermal import Cooling, Heat
from runtime.line.verdict import Finding, Verdict
from runtime.sources.frame import Frame

_log = logging.getLogger(__name__)

_GIVEN_UP = 2
"""A frame that so many processes did not survive is not looked at again."""

IDLE_S = 0.25
"""How soon a line that waits for frames sees that it is to stop."""

TICK_S = 1.0
"""How often what hangs on the loop is asked whether it has something to do."""

_HEAT_S = 5.0

_BROKEN = ("engine", "program")
_IN_A_ROW = 3
"""After so many of them the loop no longer counts as alive: only a restart can help."""


class Beside(Protocol):
    """Something that hangs on the loop."""

    def judged(self, frame: Frame, inspected: Inspected, said: Finding) -> None:
        """``said`` of ``frame`` is kept; it is a ``Verdict`` unless the disk refused it."""
        ...

    def tick(self) -> None:
        """A second has gone by."""
        ...


class Records(Protocol):
    """``runtime.line.outbox.Outbox``."""

    def append(self, finding: Finding) -> Verdict | Unkept:
        """Number and keep it; it is on the disk when this returns."""
        ...


class Line:
    """Frames of ``feed`` through ``inspector`` into ``records``; ``in_hand`` outlives a crash.

    ``say`` is told what is said of each, a ``Verdict`` unless the disk refused it. ``idle`` is
    called while there is no frame, ``beat`` each time round as long as the engine works.
    ``read_heat`` asks the sensors; ``clock`` is monotonic, ``rest`` sleeps.
    """

    def __init__(
        self,
        feed: Feed,
        inspector: Inspector,
        records: Records,
        in_hand: InHand,
        *,
        say: Callable[[Finding], object],
        notifier: Notifier,
        metrics: LineMetrics,
        cooling: Cooling,
        read_heat: Callable[[], Heat],
        idle: Callable[[], object] = lambda: None,
        beat: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        rest: Callable[[float], object] = time.sleep,
    ) -> None:
        self._feed, self._inspector, self._records = feed, inspector, records
        self._in_hand = in_hand
        self._say, self._notifier, self._metrics = say, notifier, metrics
        self._cooling, self._read_heat = cooling, read_heat
        self._idle, self._beat, self._clock, self._rest = idle, beat, clock, rest
        self._stopping = False
        self._failures = 0
        self._tick_at = self._heat_at = float("-inf")
        self._complained: Counter[str] = Counter()
        self.beside: list[Beside] = []
        self.heat = Heat({}, ())
        """As last read."""

    def stop(self) -> None:
        """End after the frame in hand; a signal handler may call it."""
        self._stopping = True

    def run(self) -> None:
        """Inspect until every source has ended, or ``stop``. Raises only what ``say`` raises."""
        while not (self._stopping or self._feed.ended):
            self._tick()
            taken = self._feed.take(IDLE_S)
            if taken is None:
                self._guarded("between frames", self._idle)
            else:
                start = self._clock()
                self._inspect(taken)
                self._rest(self._cooling.rest_s(self._clock() - start))
            if self._failures < _IN_A_ROW:
                self._notifier.alive()
                self._guarded("beat", self._beat)
        self._tick(last=True)
        self._guarded("frame in hand", self._in_hand.end)

    def _inspect(self, taken: Taken) -> None:
        frame, source = taken
        start = self._clock()
        inspected = self._look(frame, max(0.0, start - frame.monotonic))
        found = self._clock()
        kept = self._records.append(inspected.finding)
        recorded = self._clock()
        said = _refused(inspected.finding, kept) if isinstance(kept, Unkept) else kept
        self._say(said)
        self._count(inspected, said, recorded - found, self._clock() - frame.monotonic)
        for beside in self.beside:
            self._guarded(_name(beside), partial(beside.judged, frame, inspected, said))
        if isinstance(kept, Verdict):
            self._guarded(f"{source.name}: done", partial(source.done, frame))
        if frame.image is not None:
            self._failures = self._failures + 1 if inspected.fault in _BROKEN else 0

    def _look(self, frame: Frame, waited_s: float) -> Inspected:
        ended = 0

        def begin() -> None:
            nonlocal ended
            ended = self._in_hand.begin(frame)

        self._guarded("frame in hand", begin)
        if ended < _GIVEN_UP:
            return self._inspector.inspect(frame, waited_s)
        why = f"the program ended {ended} times while it looked at this frame"
        return self._inspector.give_up(frame, why, waited_s)

    def _count(self, inspected: Inspected, said: Finding, record_s: float, total_s: float) -> None:
        own = {"record": record_s * 1e3, "total": total_s * 1e3}
        self._metrics.add(inspected, said.verdict, {**inspected.finding.milliseconds, **own})
        if not isinstance(said, Verdict):
            self._metrics.unkept()

    def _tick(self, *, last: bool = False) -> None:
        now = self._clock()
        if now < self._tick_at and not last:
            return
        self._tick_at = now + TICK_S
        if now >= self._heat_at:
            self._heat_at = now + _HEAT_S
            self._guarded("heat", partial(self._cool, now))
        for beside in self.beside:
            self._guarded(_name(beside), beside.tick)

    def _cool(self, now: float) -> None:
        self.heat = self._read_heat()
        if change := self._cooling.observe(self.heat, now):
            _log.warning("%s", change)

    def _guarded(self, what: str, act: Callable[[], object]) -> None:
        """What hangs on the loop may fail: that is said, less and less often, and no more."""
        try:
            act()
        except Exception as error:
            fault = f"{what}: {type(error).__name__}"
            self._complained[fault] += 1
            times = self._complained[fault]
            if times & (times - 1) == 0:  # the 1st, 2nd, 4th, 8th ...
                so_far = f" ({times} times so far)" if times > 1 else ""
                _log.warning("%s: %s%s", fault, error, so_far)


def _name(beside: Beside) -> str:
    return type(beside).__name__.lower()


def _refused(finding: Finding, unkept: Unkept) -> Finding:
    """What is said of a frame whose record the disk refused: nobody may act on it."""
    return Finding(
        time=finding.time, boot=finding.boot, monotonic=finding.monotonic, source=finding.source,
        frame=finding.frame, verdict="NOT INSPECTED",
        reason=f"the record could not be kept: {unkept.reason}",
        milliseconds=finding.milliseconds,
    )  # fmt: skip
