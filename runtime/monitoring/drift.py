"""Drift: do the last N answers look as if they came from where the reference came from?

Kolmogorov and Smirnov's test of two samples on each class's softmax output and on projected
features, corrected by Bonferroni (Rabanser, Günnemann and Lipton, "Failing Loudly", NeurIPS 2019).
It knows no image and no bundle.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.monitoring.kolmogorov_smirnov import p_value, steps_apart
from runtime.monitoring.reference import Reference

Floats = npt.NDArray[np.floating]
Float32 = npt.NDArray[np.float32]

WINDOW = 200
"""Answers that are tested together."""

ALPHA = 1e-3
"""Share of windows without drift that may be called drifted."""

SHOWN = 10
"""Statistics in a report, at most: those that moved most."""


class Moved(NamedTuple):
    """The test of one statistic in one window."""

    of: str
    """``score of LABEL``, ``feature N`` or ``other features``."""
    distance: float
    """Kolmogorov's: the largest difference of the two distribution functions, 0 to 1."""
    p_value: float
    before: float
    """Median in the reference."""
    now: float
    """Median in the window."""


class DriftReport(NamedTuple):
    """One whole window."""

    window: int
    """Answers that it is of."""
    alpha: float
    """Share of windows without drift that are called drifted, at most."""
    threshold: float
    """``alpha`` over the number of tests: the smallest p must be below it."""
    tests: tuple[Moved, ...]
    """The one that moved most first."""
    drifted: bool
    sentence: str


class Drift:
    """Collects answers, and compares each ``window`` of them with ``reference``.

    Windows do not overlap. It serves one thread.
    """

    def __init__(self, reference: Reference, *, window: int = WINDOW, alpha: float = ALPHA) -> None:
        self._project = reference.projection
        self._classes = _tested_classes(len(reference.labels))
        rest = reference.features.shape[1] - 1
        self._names = (
            *(f"score of {label}" for label in reference.labels[self._classes]),
            *(f"feature {number}" for number in range(1, rest + 1)),
            "other features",
        )
        scores = reference.probabilities[:, self._classes]
        self._reference = np.sort(np.column_stack([scores, reference.features]), axis=0)
        self._window, self._alpha = window, alpha
        self._probabilities: list[Floats] = []
        self._features: list[Floats] = []

    @property
    def collected(self) -> int:
        """Answers in the window that is not full yet."""
        return len(self._probabilities)

    def observe(self, probabilities: Floats, features: Floats) -> DriftReport | None:
        """Add one answer: ``probabilities [K]`` after temperature scaling and ``features [D]``.

        Returns the report when a window is full, None before.
        """
        self._probabilities.append(np.asarray(probabilities))
        self._features.append(features)
        if len(self._probabilities) < self._window:
            return None
        scores = np.stack(self._probabilities)[:, self._classes].astype(np.float32)
        projected = self._project(np.stack(self._features))
        self._probabilities, self._features = [], []
        return self._compare(np.sort(np.column_stack([scores, projected]), axis=0))

    def _compare(self, values: Float32) -> DriftReport:
        """``values [window, tests]``, each column sorted."""
        steps = [steps_apart(*pair) for pair in zip(self._reference.T, values.T, strict=True)]
        most = sorted(range(len(steps)), key=lambda index: -steps[index])[:SHOWN]
        tests = tuple(self._moved(index, steps[index], values[:, index]) for index in most)
        threshold = self._alpha / len(steps)
        drifted = tests[0].p_value < threshold
        return DriftReport(
            self._window, self._alpha, threshold, tests, drifted,
            _sentence(tests[0], self._window, threshold, drifted=drifted),
        )  # fmt: skip

    def _moved(self, index: int, steps: int, now: Float32) -> Moved:
        before = self._reference[:, index]
        return Moved(
            self._names[index], steps / (len(before) * len(now)),
            p_value(steps, len(before), len(now)),
            float(np.median(before)), float(np.median(now)),
        )  # fmt: skip


def _tested_classes(count: int) -> slice:
    """Of two classes one says it all: the other's score is one minus it."""
    return slice(0, 1 if count == 2 else count)


def _sentence(moved: Moved, window: int, threshold: float, *, drifted: bool) -> str:
    what = f"{moved.of}, median {moved.now:.3g} in {window} answers, {moved.before:.3g} at export"
    if drifted:
        return f"drift: {what} (p {moved.p_value:.1g}, below {threshold:.1g})"
    return f"no drift; moved most: {what} (p {moved.p_value:.2g}, drift is below {threshold:.1g})"
