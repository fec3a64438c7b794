"""Whether the line still sees what its bundle was made for: each image, and each window of answers.

The measures are those of ``runtime.monitoring``; this follows the bundle that answers, since each
brings a reference of its own. A bundle without one is inspected with all the same: only a frozen
camera is noticed then, and that is said.
"""

import logging
from collections.abc import Set

import numpy as np
import numpy.typing as npt

from runtime.bundle import Bundle
from runtime.errors import BundleError
from runtime.line.inspection import Inspected
from runtime.line.verdict import Finding
from runtime.monitoring.drift import WINDOW, Drift, DriftReport
from runtime.monitoring.image_quality import Flag, Watch
from runtime.monitoring.reference import read_reference
from runtime.sources.frame import Frame

_log = logging.getLogger(__name__)

_NEVER = 0


class Health:
    """Checks images and collects answers. It hangs on the loop, and serves one thread.

    ``files`` are the names of sources that may well bring the same picture twice.
    """

    def __init__(self, bundle: Bundle, *, files: Set[str] = frozenset()) -> None:
        self._files = files
        self.report: DriftReport | None = None
        """Of the last whole window of the bundle that answers."""
        self._follow(bundle)

    @property
    def knows(self) -> bool:
        """Whether the bundle has a reference to compare with."""
        return self._drift is not None

    def drifts(self) -> bool:
        """Whether the last window drifted."""
        return self.report is not None and self.report.drifted

    def look(self, source: str, image: npt.NDArray[np.uint8], bundle: Bundle) -> tuple[Flag, ...]:
        """What is wrong with ``image``, uint8 [H, W, C], the next one of ``source``."""
        if bundle is not self._bundle:
            self._follow(bundle)
        return self._watch(source).look(source, image)

    def forget(self, source: str) -> None:
        """``source`` gave no image."""
        self._watch(source).forget(source)

    @property
    def fill(self) -> float:
        """How full the window is, 0 to 1."""
        return self._drift.collected / WINDOW if self._drift else 0.0

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

    def _watch(self, source: str) -> Watch:
        return self._of_files if source in self._files else self._of_cameras

    def _follow(self, bundle: Bundle) -> None:
        self._bundle, self.report = bundle, None
        which = f"{bundle.manifest.name} {bundle.manifest.version}"
        reference = None
        try:
            reference = read_reference(bundle)
            if reference is None:
                _log.warning("%s: has no reference: light and drift are not checked", which)
        except BundleError as error:
            _log.warning("light and drift are not checked: %s", error)
        limits = reference.limits if reference else {}
        self._of_files, self._of_cameras = Watch(limits, frozen_after=_NEVER), Watch(limits)
        self._drift = Drift(reference) if reference else None
