"""Heat: how warm the machine is, and how much of its time the line works because of that.

It reads sysfs, as ``runtime.machine`` knows it, and decides; it drops no frame itself. A line that
works half of its time lets frames wait, and the oldest of those are dropped and counted.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from runtime import machine

LIMIT_C = 90.0
"""A choice: some degrees before most boards begin to slow themselves down."""

_BACK_C = 5.0
"""So much cooler than the limit before more is done again: no to and fro around it."""

_LONGER_S, _SHORTER_S = 30.0, 10.0
"""What a change must have had time to do before the next one, up and down."""

_LEAST = 1 / 8
"""Never less: a device that inspects nothing tells nobody that it is hot."""

_REST_S = 0.5
"""Longest rest between two frames: the loop has to show that it is alive, to a PLC each second."""


class Heat(NamedTuple):
    """What the sensors say."""

    zones: Mapping[str, float]
    """Degrees Celsius, hottest first; empty where no zone can be read."""
    throttling: tuple[str, ...]
    """What the kernel slows down now because of heat."""

    @property
    def celsius(self) -> float | None:
        """Of the hottest zone."""
        return max(self.zones.values(), default=None)

    def __str__(self) -> str:
        if not self.zones:
            return "no sensor"
        zone = max(self.zones, key=self.zones.__getitem__)
        return f"{zone} at {self.zones[zone]:.1f} °C"


def read_heat(root: Path = machine.ROOT) -> Heat:
    """The thermal zones of the file tree ``root``, and what is throttled."""
    return Heat(machine.temperatures(root), machine.throttling(root))


class Cooling:
    """The share of its time that the line may work: all of it, then half, a quarter, an eighth."""

    def __init__(self, limit_c: float = LIMIT_C) -> None:
        self.limit_c = limit_c
        self._since = float("-inf")
        self.share = 1.0
        self.reason = ""
        """Why it is less than all; empty otherwise."""

    @property
    def shedding(self) -> bool:
        """Whether the line works less than it could."""
        return self.share < 1.0

    def observe(self, heat: Heat, now: float) -> str | None:
        """Decide anew at ``now``, monotonic seconds; what changed, in a sentence, or None."""
        why = self._too_hot(heat)
        settled = now - self._since
        if why and self.share > _LEAST and settled >= _SHORTER_S:
            self.share, self.reason, self._since = self.share / 2, why, now
            return f"{why}: works {self.share:.0%} of the time"
        if self.shedding and self._cool(heat) and settled >= _LONGER_S:
            self.share, self._since = self.share * 2, now
            self.reason = self.reason if self.shedding else ""
            return f"{heat}, cooler again: works {self.share:.0%} of the time"
        return None

    def rest_s(self, busy_s: float) -> float:
        """How long to rest after a frame that kept the line busy for ``busy_s`` seconds."""
        return min(_REST_S, busy_s * (1 / self.share - 1))

    def _too_hot(self, heat: Heat) -> str:
        if heat.throttling:
            return f"{heat}, {', '.join(heat.throttling)} is active"
        if heat.celsius is not None and heat.celsius >= self.limit_c:
            return f"{heat}, the limit is {self.limit_c:g} °C"
        return ""

    def _cool(self, heat: Heat) -> bool:
        # A zone that cannot be read any more must not keep the line slow for ever.
        below = heat.celsius is None or heat.celsius < self.limit_c - _BACK_C
        return below and not heat.throttling
