"""Whether the line still sees what its bundle was made for: each image, and each window of answers.

The measures are those of ``runtime.monitoring``; this follows the bundle that answers, since each
brings a reference of its own. A bundle without one is inspected with all the same: nothing is
checked then, and that is said.
"""

import logging
from collections.abc import Set

import numpy as np
import numpy.typing as npt

from runtime.bundle import Bundle
from runtime.errors import BundleError
from runtime.line.inspection import Inspected
from runtime.line.verdict import Finding
from runtime.monitoring.drift import Drift, DriftReport
from runtime.monitoring.image_quality import Flag, Watch
from runtime.monitoring.reference import Reference, read_reference
from runtime.sources.frame import Frame

_log = logging.getLogger(__name__)

_FROZEN_AFTER = 3
"""Repeats of a picture from a camera, whose noise makes each one new."""


class Health:
    """Checks images and collects answers. It hangs on the loop, and serves one thread.

    ``files`` are the names of sources that may well bring the same picture twice.
    """

    def __init__(self, files: Set[str] = frozenset()) -> None:
        self._files = files
        self._bundle: Bundle | None = None
        self._reference: Reference | None = None
        self._watches: dict[str, Watch] = {}
        self._drift: Drift | None = None
        self.report: DriftReport | None = None
        """Of the last whole window of the bundle that answers."""

    @property
    def knows(self) -> bool:
        """Whether the bundle has a reference to compare with."""
        return self._reference is not None

    def drifts(self) -> bool:
        """Whether the last window drifted."""
        return self.report is not None and self.report.drifted

    def look(self, source: str, image: npt.NDArray[np.uint8], bundle: Bundle) -> tuple[Flag, ...]:
        """What is wrong with ``image``, uint8 [H, W, C], the next one of ``source``."""
        if bundle is not self._bundle:
            self._follow(bundle)
        if self._reference is None:
            return ()
        if source not in self._watches:
            after = 0 if source in self._files else _FROZEN_AFTER
            self._watches[source] = Watch(self._reference.limits, frozen_after=after)
        return self._watches[source].look(source, image)

    def forget(self, source: str) -> None:
        """``source`` gave no image."""
        if source in self._watches:
            self._watches[source].forget(source)

    def judged(self, frame: Frame, inspected: Inspected, said: Finding) -> None:
        """Add an answer to the window of drift."""
        seen = inspected.seen
        if self._drift is None or seen is None:
            return
        probabilities = np.array([*seen.answer.probabilities.values()])
        if report := self._drift.observe(probabilities, seen.features):
            if report.drifted or self.drifts():
                _log.warning("%s", report.sentence)
            self.report = report

    def tick(self) -> None:
        """There is nothing to do between frames."""

    def _follow(self, bundle: Bundle) -> None:
        self._bundle, self._watches, self.report = bundle, {}, None
        which = f"{bundle.manifest.name} {bundle.manifest.version}"
        try:
            self._reference = read_reference(bundle)
            if self._reference is None:
                _log.warning("%s: has no reference: images and drift are not checked", which)
        except BundleError as error:
            self._reference = None
            _log.warning("images and drift are not checked: %s", error)
        self._drift = Drift(self._reference) if self._reference else None
