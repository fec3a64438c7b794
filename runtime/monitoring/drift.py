"""Drift: do the last N answers look as if they came from where the reference came from?

Kolmogorov-Smirnov's two-sample test on each class's softmax output and on projected features,
corrected by Bonferroni (Rabanser, Günnemann and Lipton, "Failing Loudly", NeurIPS 2019). It knows
no image and no bundle.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.monitoring.reference import Reference

Floats = npt.NDArray[np.floating]

WINDOW = 200
"""Answers that are tested together."""

ALPHA = 1e-3
"""Share of windows without drift that may be called drifted."""


class Moved(NamedTuple):
    """The test of one statistic in one window."""

    of: str
    """``score of LABEL``, or ``feature N``."""
    distance: float
    """Kolmogorov-Smirnov: the largest difference of the two distributions, 0 to 1."""
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
    """``alpha`` over the number of tests: what the smallest p is held against."""
    tests: tuple[Moved, ...]
    """The one that moved most first."""
    drifted: bool
    sentence: str


class Drift:
    """Collects answers, and compares each ``window`` of them with ``reference``.

    Windows do not overlap. It serves one thread.
    """

    def __init__(self, reference: Reference, *, window: int = WINDOW, alpha: float = ALPHA) -> None:
        raise NotImplementedError

    def observe(self, probabilities: Floats, features: Floats) -> DriftReport | None:
        """Add one answer: ``probabilities [K]`` after temperature scaling and ``features [D]``.

        Returns the report when a window is full, None before.
        """
        raise NotImplementedError
