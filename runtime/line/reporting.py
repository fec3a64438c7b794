"""How the device is, signed and put into the outbox now and then, for the sender to carry along.

``fieldfit fleet status mqtt://HOST/TOPIC/status`` reads it. It hangs on the loop, which has the two
things that nobody else knows: what the line counted, and whether it drifts.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from runtime.delivery.device_status import report
from runtime.delivery.identity import Identity
from runtime.delivery.status_document import Drift, clipped
from runtime.errors import FleetError
from runtime.line.inspection import Inspected
from runtime.line.outbox import Outbox
from runtime.line.verdict import Finding
from runtime.monitoring.drift import DriftReport
from runtime.sources.frame import Frame

EVERY_S = 900.0
"""A status is a few ten milliseconds of work and 2 KB."""


class Reporting:
    """Keeps the newest status of the device whose state folder is ``state`` in ``outbox``.

    ``drift`` is the report on the last window, ``counted`` what the line has counted; both are
    asked when a status is due. ``clock`` is monotonic.

    Raises FleetError without the library that signs, and for a key that is none.
    """

    def __init__(
        self,
        state: Path,
        outbox: Outbox,
        *,
        drift: Callable[[], DriftReport | None],
        counted: Callable[[], Mapping[str, int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state, self._outbox = state, outbox
        self._identity = Identity.open(state)
        self._drift, self._counted, self._clock = drift, counted, clock
        self._drifted = False
        self._at = float("-inf")

    def judged(self, frame: Frame, inspected: Inspected, said: Finding) -> None:
        """One verdict is no reason for a status."""

    def tick(self) -> None:
        """Put a new status into the outbox if it is time for one, or if drift came or went.

        Raises FleetError if the outbox refused it.
        """
        now, window = self._clock(), self._drift()
        drifted = window is not None and window.drifted
        if now < self._at and drifted == self._drifted:
            return
        self._at, self._drifted = now + EVERY_S, drifted
        document = report(
            self._state,
            self._identity,
            counters=self._counted(),
            drift=_in_short(window) if window else None,
        )
        if refused := self._outbox.put_status(document):
            raise FleetError(f"the status was not kept: {refused.reason}")


def _in_short(window: DriftReport) -> Drift:
    return Drift(
        p_value=window.tests[0].p_value,
        threshold=window.threshold,
        window=window.window,
        sentence=clipped(window.sentence),
    )
