"""Measure ranges: run the float graph over the images once and watch its tensors.

It does not know which images are good nor what a range is used for. Memory does not grow with the
number of images: a tensor keeps its extremes and, where the method needs one, a histogram of fixed
size whose range doubles whenever a value falls outside.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from calibration.graph import Graph, channel_axis
from calibration.table import TensorRange
from runtime.errors import DataError, ExportError
from runtime.preprocess import UInt8
from runtime.recipe import CalibrationSettings

Track: TypeAlias = Callable[[Iterable[UInt8]], Iterable[UInt8]]
"""Passes batches through, for example to move a progress bar."""

BINS = 4096
"""Even and a multiple of 4, so that doubling the range merges whole pairs of bins."""

_FIRST_LIMIT = 2.0**-16


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
        # A power of two scales float32 exactly; the top edge belongs to the last bin.
        index = (values.reshape(-1) * np.float32(BINS / 2 / self.limit)).astype(np.float64)
        bins = np.minimum(np.floor(index).astype(np.int64) + BINS // 2, BINS - 1)
        self.counts += np.bincount(bins, minlength=BINS)

    def _double(self) -> None:
        merged = self.counts.reshape(-1, 2).sum(axis=1)
        self.counts = np.zeros_like(self.counts)
        self.counts[BINS // 4 : BINS - BINS // 4] = merged
        self.limit *= 2.0

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """Borders of the bins ``[BINS + 1]``."""
        return np.linspace(-self.limit, self.limit, BINS + 1)


class Observer:
    """What is remembered of one tensor."""

    def __init__(self, tensor: str, *, histogram: bool, channels: int | None) -> None:
        """``channels`` is the axis whose means are wanted, None for none."""
        self.tensor = tensor
        self.images = 0
        self.channels = channels
        self.channel_sums = None if channels is None else np.zeros(())
        self.low = float("inf")
        self.high = -float("inf")
        self.histogram = Histogram() if histogram else None

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
        if self.histogram is not None:
            self.histogram.add(values, max(-low, high))
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


def minmax(observer: Observer) -> TensorRange:
    """The whole observed range."""
    observed = (observer.low, observer.high)
    return TensorRange(observed=observed, chosen=observed, channel_means=observer.channel_means)


def percentile(observer: Observer, percent: float) -> TensorRange:
    """The range that holds ``percent`` of the observed values, rounded outward to whole bins.

    What lies outside is shared equally between both tails, or is the upper tail alone if no value
    is negative: the zeros that a Relu leaves must stay exact.
    """
    histogram = observer.histogram
    assert histogram is not None, "percentile needs a histogram"
    counts, edges = histogram.counts, histogram.edges
    total = int(counts.sum())
    outside = (1.0 - percent / 100.0) * total
    lower = outside / 2.0 if observer.low < 0.0 else 0.0
    from_below = np.cumsum(counts)
    from_above = np.cumsum(counts[::-1])
    first = int(np.searchsorted(from_below, lower, side="right"))
    last = BINS - 1 - int(np.searchsorted(from_above, outside - lower, side="right"))
    low = max(observer.low, float(edges[min(first, BINS - 1)]))
    high = min(observer.high, float(edges[max(last, 0) + 1]))
    inside = int(counts[first : last + 1].sum())
    return TensorRange(
        observed=(observer.low, observer.high),
        chosen=(low, high),
        clipped=(total - inside) / total,
        channel_means=observer.channel_means,
    )


def measure(
    model: onnx.ModelProto,
    batches: Iterable[UInt8],
    settings: CalibrationSettings,
    *,
    tensors: Sequence[str] | None = None,
    track: Track | None = None,
) -> dict[str, TensorRange]:
    """The range of each of ``tensors`` over ``batches`` of uint8 images ``[N, H, W, C]``.

    ``tensors`` defaults to all that a dialect may quantize. One pass, one batch in memory.

    Raises ExportError if an activation is not finite, DataError if there is no image.
    """
    graph = Graph(model)
    names = list(graph.observable() if tensors is None else tensors)
    observers = observe(
        graph, names, batches if track is None else track(batches), settings.method != "minmax"
    )
    if settings.method == "percentile":
        return {name: percentile(observers[name], settings.percentile) for name in names}
    return {name: minmax(observers[name]) for name in names}


def observe(
    graph: Graph, tensors: Sequence[str], batches: Iterable[UInt8], histogram: bool
) -> Mapping[str, Observer]:
    """Watch ``tensors`` while the graph runs over ``batches``."""
    image = graph.preprocessing().image
    session = _session(graph.model, tensors)
    axes = {layer.input: channel_axis(layer.op_type) for layer in graph.layers()}
    observers = {
        name: Observer(name, histogram=histogram, channels=axes.get(name)) for name in tensors
    }
    seen = 0
    for batch in batches:
        values = session.run(list(tensors), {image: batch})
        for observer, value in zip(observers.values(), values, strict=True):
            observer.add(value)
        seen += len(batch)
    if not seen:
        raise DataError("expected calibration images, got none")
    return observers


def _session(model: onnx.ModelProto, tensors: Sequence[str]) -> onnxruntime.InferenceSession:
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    present = {output.name for output in opened.graph.output}
    opened.graph.output.extend(
        onnx.ValueInfoProto(name=tensor) for tensor in tensors if tensor not in present
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        opened.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
