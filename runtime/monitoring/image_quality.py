"""Whether a frame looks as frames of this field do: light, sharpness, lost blocks, a frozen camera.

It measures pixels against limits that were learned from the field's images at export; it knows no
model and no label. NumPy alone, well under a millisecond for 224 x 224 pixels.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating]

STATISTICS = (
    "brightness", "contrast", "dark", "bright", "sharpness", "noise", "flat", "lines",
)  # fmt: skip
"""What is measured, in the order of ``measure``."""


class Flag(NamedTuple):
    """One thing that was noticed on a frame."""

    word: str
    """For programs and metrics, e.g. ``blurred``."""
    sentence: str
    """For people, with the value and the limit that it broke."""
    value: float
    limit: float
    alarms: bool
    """Whether the frame is too far from what was learned to act on its answer."""


class Limits(NamedTuple):
    """What one statistic may be; beyond the inner two it is noticed, beyond the outer it alarms."""

    alarm_below: float
    low: float
    high: float
    alarm_above: float


def measure(image: UInt8) -> npt.NDArray[np.float64]:
    """The STATISTICS ``[8]`` of ``image``, uint8 ``[H, W, C]`` as the model sees it."""
    raise NotImplementedError


def limits_of(samples: Floats) -> dict[str, Limits]:
    """The limits by name, from ``samples [N, 8]`` of images of the field that are in order."""
    raise NotImplementedError


def look(image: UInt8, before: UInt8 | None, limits: Mapping[str, Limits]) -> tuple[Flag, ...]:
    """What is wrong with ``image``, uint8 ``[H, W, C]``, worst first; empty if nothing is.

    ``before`` is the frame before it from the same camera. If it is the same, ``frozen`` is
    noticed; after how many of them it alarms is ``Watch``'s to count.
    """
    raise NotImplementedError


class Watch:
    """Looks at the frames of several cameras, and counts how long one has been frozen.

    From the ``frozen_after``-th repeat of a picture on ``frozen`` alarms; 0 for sources, such as
    files, that may well bring the same picture twice: then it never does.
    """

    def __init__(self, limits: Mapping[str, Limits], *, frozen_after: int = 3) -> None:
        raise NotImplementedError

    def look(self, source: str, image: UInt8) -> tuple[Flag, ...]:
        """What is wrong with the next ``image`` of ``source``; it is kept, not copied."""
        raise NotImplementedError

    def forget(self, source: str) -> None:
        """``source`` gave no image: its next one follows none."""
        raise NotImplementedError
