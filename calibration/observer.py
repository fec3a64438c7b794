"""What is remembered of one tensor: its extremes, a histogram, the means of its channels.

It does not know the graph nor what a range is used for. Memory does not grow with the number of
values: a histogram has a fixed number of bins, and its range doubles whenever a value falls
outside.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from runtime.errors import ExportError

BINS = 8192
"""Half of them for either sign, half of those at least in use: 2048 or more for what one side
holds, as entropy calibration wants. A multiple of 4, so that doubling merges whole pairs."""

_FIRST_LIMIT = 2.0**-16

_CHUNK = 2**16
"""Values counted at a time: temporaries of this size stay in the processor's cache."""


@dataclasses.dataclass
class Histogram:
    """Counts over ``[-limit, limit]`` in BINS equal bins; ``limit`` is a power of two."""

    limit: float = _FIRST_LIMIT
    counts: npt.NDArray[np.int64] = dataclasses.field(
        default_factory=lambda: np.zeros(BINS, dtype=np.int64)
    )

    def add(self, values: npt.NDArray[np.float32], largest: float) -> None:
        """Count ``values``, finite and none above ``largest`` in magnitude."""
        while largest > self.limit:
            self._double()
        flat = values.reshape(-1)
        places = np.empty(min(_CHUNK, flat.size), dtype=np.float32)
        bins = np.empty(len(places), dtype=np.intp)
        # A power of two scales float32 exactly, and whole numbers this small are exact as well.
        factor, middle = np.float32(BINS / 2 / self.limit), np.float32(BINS // 2)
        for start in range(0, flat.size, _CHUNK):
            part = flat[start : start + _CHUNK]
            place, index = places[: len(part)], bins[: len(part)]
            np.multiply(part, factor, out=place)
            np.floor(place, out=place)
            np.add(place, middle, out=place)
            index[...] = place
            found = np.bincount(index, minlength=BINS + 1)
            self.counts += found[:BINS]
            self.counts[-1] += found[BINS]  # the top edge belongs to the last bin

    def _double(self) -> None:
        merged = self.counts.reshape(-1, 2).sum(axis=1)
        self.counts = np.zeros_like(self.counts)
        self.counts[BINS // 4 : BINS - BINS // 4] = merged
        self.limit *= 2.0

    @property
    def width(self) -> float:
        """Of one bin."""
        return 2.0 * self.limit / BINS

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """Borders of the bins ``[BINS + 1]``."""
        return np.linspace(-self.limit, self.limit, BINS + 1)


class Observer:
    """Watches one tensor, batch by batch."""

    def __init__(self, tensor: str, *, histogram: bool = True, channels: int | None = None) -> None:
        """``channels`` is the axis whose means are wanted, None for none."""
        self.tensor = tensor
        self.images = 0
        self.channels = channels
        self.channel_sums = None if channels is None else np.zeros(())
        self.low = float("inf")
        self.high = -float("inf")
        self._histogram = Histogram() if histogram else None

    @property
    def histogram(self) -> Histogram:
        """Raises ValueError if none was asked for."""
        if self._histogram is None:
            raise ValueError(f"tensor {self.tensor!r} was observed without a histogram")
        return self._histogram

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Watch one batch of the tensor, of any shape.

        Raises ExportError if a value is NaN or infinite.
        """
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            bad = "NaN" if np.isnan(values).any() else "infinity"
            raise ExportError(
                f"tensor {self.tensor!r} holds {bad} on a calibration image; "
                "expected finite values: the weights are damaged or training diverged"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self._histogram is not None:
            self._histogram.add(values, max(-low, high))
        self.images += len(values)
        if self.channels is not None:
            by_channel = np.moveaxis(values, self.channels, 1)
            per_image = by_channel.reshape(*by_channel.shape[:2], -1).mean(axis=2)
            self.channel_sums = self.channel_sums + per_image.sum(axis=0, dtype=np.float64)

    @property
    def channel_means(self) -> tuple[float, ...]:
        """Mean of each channel ``[C]``, empty if not asked for; six digits are plenty."""
        if self.channel_sums is None:
            return ()
        return tuple(float(f"{value:.6g}") for value in self.channel_sums / self.images)
