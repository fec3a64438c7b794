"""How a range is chosen from what was observed: pure functions, one for each method.

They do not know images, and the graph only where it bounds a tensor. Every method reads the same
histogram, so that once a tensor has been observed all of them are free.
"""

from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from calibration.graph import RANGE_PRESERVING_OPS, Graph
from calibration.observer import BINS, Histogram, Observer
from calibration.table import TensorRange

Method: TypeAlias = Literal["minmax", "percentile", "entropy", "mse"]
Grid: TypeAlias = Literal["symmetric", "asymmetric"]

METHODS: tuple[Method, ...] = ("minmax", "percentile", "entropy", "mse")
"""MinMax first: it stays unless another is better."""

LEVELS = 128
"""Of int8 on one side of zero, which entropy calibration fits the histogram to."""

_ENTROPY_STEP = 16
"""Bins between two thresholds that entropy calibration tries: under a hundredth of the range."""

_CANDIDATES = 160
"""Ends that ``mse`` tries on either side, each 3 % from the next: near its least, the error
changes by far less."""

_SMALLEST_END = 64
"""Bins. A range of fewer would have bins wider than its steps."""

_BOUNDED_OPS = {
    "Sigmoid": "from 0 to 1",
    "HardSigmoid": "from 0 to 1",
    "Softmax": "from 0 to 1",
    "Tanh": "from -1 to 1",
}

_AVERAGES = frozenset(["AveragePool", "GlobalAveragePool", "ReduceMean", "Concat", "Relu"])
"""Operators whose outputs cannot leave the range of their inputs, with 0."""


def choose_range(
    observer: Observer, method: Method, *, percent: float = 99.99, reason: str = ""
) -> TensorRange:
    """The range that ``method`` chooses; ``percent`` is for ``percentile``.

    Every method but ``minmax`` needs a histogram: ValueError if there is none.
    """
    low, high = {
        "minmax": lambda: (observer.low, observer.high),
        "percentile": lambda: percentile(observer, percent),
        "entropy": lambda: entropy(observer),
        "mse": lambda: mse(observer),
    }[method]()
    return TensorRange(
        clipped=0.0 if method == "minmax" else outside(observer, low, high),
        observed=(observer.low, observer.high),
        chosen=(low, high),
        method=method,
        reason=reason,
        channel_means=observer.channel_means,
    )


def percentile(observer: Observer, percent: float) -> tuple[float, float]:
    """The range that holds ``percent`` of the observed values, rounded outward to whole bins.

    What lies outside is shared equally between both tails, or is the upper tail alone if no value
    is negative: the zeros that a Relu leaves must stay exact. (The usual remedy for outliers; see
    Wu et al. 2020, arXiv:2004.09602, section 4.)
    """
    counts, edges = observer.histogram.counts, observer.histogram.edges
    total = int(counts.sum())
    cut = (1.0 - percent / 100.0) * total
    lower = cut / 2.0 if observer.low < 0.0 else 0.0
    first = int(np.searchsorted(np.cumsum(counts), lower, side="right"))
    last = BINS - 1 - int(np.searchsorted(np.cumsum(counts[::-1]), cut - lower, side="right"))
    return (
        max(observer.low, float(edges[min(first, BINS - 1)])),
        min(observer.high, float(edges[max(last, 0) + 1])),
    )


def entropy(observer: Observer) -> tuple[float, float]:
    """The range whose 128 levels keep most of what the histogram tells: least KL divergence.

    The threshold is one of magnitude, as symmetric int8 has it. The bin at zero counts like its
    neighbour, because the zeros that a Relu leaves are exact in any range. (Migacz, "8-bit
    inference with TensorRT", GTC 2017; the bin at zero as in NVIDIA's ModelOpt.)
    """
    magnitudes = _magnitudes(observer.histogram)
    magnitudes[0] = magnitudes[1]
    used = int(np.flatnonzero(magnitudes).max(initial=0)) + 1
    if used <= LEVELS:
        return observer.low, observer.high
    # Counted down from the whole range: of equal divergences the widest range is taken.
    tried = range(used, LEVELS, -_ENTROPY_STEP)
    threshold = min(tried, key=lambda end: divergence(magnitudes, end)) * observer.histogram.width
    return max(observer.low, -threshold), min(observer.high, threshold)


def _magnitudes(histogram: Histogram) -> npt.NDArray[np.float64]:
    """Counts of ``|x|`` ``[BINS / 2]``."""
    counts = histogram.counts.astype(np.float64)
    return np.asarray(counts[BINS // 2 :] + counts[: BINS // 2][::-1])


def divergence(magnitudes: npt.NDArray[np.float64], end: int) -> float:
    """``KL(P || Q)`` in nats if a histogram is cut off at bin ``end``, more than LEVELS.

    P has what lies beyond in its last bin. Q is the same bins without that, averaged within each
    of LEVELS levels over the bins that are not empty. Infinite if Q is empty where P is not.
    """
    kept = magnitudes[:end]
    reference = kept.copy()
    reference[-1] += magnitudes[end:].sum()
    starts = -(-np.arange(LEVELS) * end // LEVELS)
    level = np.repeat(np.arange(LEVELS), np.diff(starts, append=end))
    filled = np.add.reduceat((kept > 0).astype(np.float64), starts)
    means = np.add.reduceat(kept, starts) / np.maximum(filled, 1.0)
    quantized = np.where(kept > 0, means[level], 0.0)
    there = reference > 0
    if (quantized[there] == 0).any():
        return float("inf")
    p, q = reference[there] / reference.sum(), quantized[there] / quantized.sum()
    return float(np.sum(p * np.log(p / q)))


def mse(
    observer: Observer, grids: tuple[Grid, ...] = ("symmetric", "asymmetric")
) -> tuple[float, float]:
    """The range with the least expected squared error, summed over ``grids``.

    One table serves both dialects, so both grids count. (Banner et al. 2019, arXiv:1810.05723,
    with the measured distribution instead of a fitted one; Nagel et al. 2021, arXiv:2106.08295,
    section 3.1.)
    """
    lows, highs = _ends(observer, -1.0), _ends(observer, 1.0)
    low, high = (ends.reshape(-1) for ends in np.meshgrid(lows, highs, indexing="ij"))
    errors = sum(squared_error(observer.histogram, low, high, grid) for grid in grids)
    best = int(np.argmin(errors))
    return float(low[best]), float(high[best])


def _ends(observer: Observer, sign: float) -> npt.NDArray[np.float64]:
    """Candidates for one end of a range, the observed extreme first."""
    extreme, width = (observer.high if sign > 0 else observer.low), observer.histogram.width
    bins = int(extreme * sign / width)
    if bins <= _SMALLEST_END:
        return np.array([extreme])
    inner = np.unique(np.geomspace(_SMALLEST_END, bins, _CANDIDATES).astype(np.int64))
    return np.concatenate([[extreme], sign * inner[::-1] * width])


def squared_error(
    histogram: Histogram,
    low: npt.NDArray[np.float64],
    high: npt.NDArray[np.float64],
    grid: Grid,
) -> npt.NDArray[np.float64]:
    """Mean squared error of 8-bit values over ``[low, high]``, for each pair ``[R]`` of ends.

    ``symmetric`` is int8, 127 steps to the larger end; ``asymmetric`` uint8, 255 steps over the
    range and 0. A value within half a step of 0 becomes 0, any other is off by a step's uniform
    error, step² / 12, and one outside by its distance from the end.
    """
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    if grid == "symmetric":
        high = np.maximum(-low, high)
        low = -high
    step = np.where(high > low, (high - low) / (254 if grid == "symmetric" else 255), 1.0)
    edges = histogram.edges
    centers, counts = (edges[1:] + edges[:-1]) / 2, histogram.counts
    moments = [np.concatenate([[0.0], np.cumsum(counts * centers**k)]) for k in range(3)]

    def within(
        power: int, start: npt.NDArray[np.float64] | float, end: npt.NDArray[np.float64] | float
    ) -> npt.NDArray[np.float64]:
        below = [np.interp(place, edges, moments[power]) for place in (start, end)]
        return np.asarray(below[1] - below[0])

    def beyond(
        place: npt.NDArray[np.float64],
        start: npt.NDArray[np.float64] | float,
        end: npt.NDArray[np.float64] | float,
    ) -> npt.NDArray[np.float64]:
        zero, one, two = (within(power, start, end) for power in range(3))
        return two - 2 * place * one + place**2 * zero

    near = np.maximum(-step / 2, low), np.minimum(step / 2, high)
    rounded = (within(0, low, high) - within(0, *near)) * step**2 / 12
    error = within(2, *near) + rounded + beyond(low, edges[0], low) + beyond(high, high, edges[-1])
    return np.asarray(error / counts.sum())


def outside(observer: Observer, low: float, high: float) -> float:
    """Share of the observed values outside ``[low, high]``, ends of bins or of all values."""
    counts, edges = observer.histogram.counts, observer.histogram.edges
    below = counts[edges[1:] <= low].sum() if low > observer.low else 0
    above = counts[edges[:-1] >= high].sum() if high < observer.high else 0
    return float((below + above) / counts.sum())


def bound(graph: Graph, tensor: str) -> str:
    """Why ``tensor`` cannot grow without end, whatever the image; empty if nothing bounds it."""
    node = graph.producer(tensor)
    if node is None:
        return ""
    if tensor == graph.preprocessing().output:
        return "pixels"
    if node.op_type in _BOUNDED_OPS:
        return f"{node.op_type} {_BOUNDED_OPS[node.op_type]}"
    if node.op_type == "Clip":
        ends = [graph.constant(name) for name in node.input[1:] if name]
        if len(ends) == 2 and all(end is not None and np.isfinite(end).all() for end in ends):
            low, high = (float(end.reshape(())) for end in ends if end is not None)
            return f"Clip from {low:g} to {high:g}"
    if node.op_type in RANGE_PRESERVING_OPS | _AVERAGES | {"Clip"}:
        reasons = [bound(graph, source) for source in graph.data_inputs(node)]
        return f"{node.op_type} of {reasons[0]}" if reasons and all(reasons) else ""
    return ""
