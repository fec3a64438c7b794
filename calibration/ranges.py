"""Measure ranges: run the float graph over images and watch its tensors.

It does not know which images are good nor what a range is used for. One batch is in memory, and
of each tensor what an Observer remembers.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from calibration.graph import Graph, channel_axis
from calibration.methods import choose_range
from calibration.observer import Observer
from calibration.table import TensorRange
from runtime.errors import DataError
from runtime.preprocess import UInt8
from runtime.recipe import CalibrationSettings

Track: TypeAlias = Callable[[Iterable[UInt8]], Iterable[UInt8]]
"""Passes batches through, for example to move a progress bar."""


def measure(
    model: onnx.ModelProto,
    batches: Iterable[UInt8],
    settings: CalibrationSettings,
    *,
    tensors: Sequence[str] | None = None,
    track: Track | None = None,
) -> dict[str, TensorRange]:
    """The range of each of ``tensors`` over ``batches`` of uint8 images ``[N, H, W, C]``.

    ``tensors`` defaults to all that a dialect may quantize. One pass, one batch in memory. Method
    ``auto`` is MinMax here: there are no other images to compare methods on.

    Raises ExportError if an activation is not finite, DataError if there is no image or what is
    passed is none of the graph's size.
    """
    graph = Graph(model)
    names = graph.observable() if tensors is None else tensors
    method = "minmax" if settings.method == "auto" else settings.method
    observers = observe(
        graph, names, batches if track is None else track(batches), histogram=method != "minmax"
    )
    return {
        name: choose_range(observer, method, percent=settings.percentile)
        for name, observer in observers.items()
    }


def observe(
    graph: Graph, tensors: Sequence[str], batches: Iterable[UInt8], *, histogram: bool = True
) -> dict[str, Observer]:
    """Watch ``tensors`` while the graph runs over ``batches`` of uint8 images ``[N, H, W, C]``.

    Raises as measure does.
    """
    axes = {layer.input: channel_axis(layer.op_type) for layer in graph.layers()}
    observers = {
        name: Observer(name, histogram=histogram, channels=axes.get(name)) for name in tensors
    }
    seen = 0
    for count, values in _run(graph, tensors, batches):
        for observer, value in zip(observers.values(), values, strict=True):
            observer.add(value)
        seen += count
    if not seen:
        raise DataError("expected calibration images, got none")
    return observers


def shares_outside(
    graph: Graph, ranges: Mapping[str, tuple[float, float]], batches: Iterable[UInt8]
) -> dict[str, float]:
    """Share of each tensor's values, 0 to 1, that its range does not hold on ``batches``.

    Every range holds 0, as on the integers' grid. Raises as measure does, but for no image.
    """
    outside, all_values = dict.fromkeys(ranges, 0), dict.fromkeys(ranges, 0)
    for _, values in _run(graph, list(ranges), batches):
        for (name, (low, high)), value in zip(ranges.items(), values, strict=True):
            outside[name] += _count_outside(value, min(low, 0.0), max(high, 0.0))
            all_values[name] += value.size
    return {name: outside[name] / max(all_values[name], 1) for name in ranges}


def _count_outside(values: npt.NDArray[np.float32], low: float, high: float) -> int:
    below = np.count_nonzero(values < low) if values.min() < low else 0
    above = np.count_nonzero(values > high) if values.max() > high else 0
    return int(below + above)


def _run(
    graph: Graph, tensors: Sequence[str], batches: Iterable[UInt8]
) -> Iterator[tuple[int, list[npt.NDArray[np.float32]]]]:
    """The number of images in each batch, and the values of ``tensors`` on it."""
    image = graph.preprocessing().image
    shape = (graph.shape(image) or (None,) * 4)[1:]
    session = _session(graph.model, tensors)
    for batch in batches:
        _refuse(batch, shape)
        yield len(batch), session.run(list(tensors), {image: batch})


def _refuse(batch: UInt8, shape: Sequence[int | None]) -> None:
    """Raise DataError for what is no batch of images ``shape`` ``[H, W, C]``."""
    fits = len(batch.shape) == 4 and all(
        side in (None, got) for side, got in zip(shape, batch.shape[1:], strict=True)
    )
    if batch.dtype == np.uint8 and fits:
        return
    expected = ", ".join("?" if side is None else str(side) for side in shape)
    raise DataError(
        f"expected calibration images uint8 [N, {expected}], got {batch.dtype} "
        f"{list(batch.shape)}; pass pictures of the field as runtime.preprocess.preprocess "
        "returns them: the graph normalises by itself, and noise calibrates nothing"
    )


def _session(model: onnx.ModelProto, tensors: Sequence[str]) -> onnxruntime.InferenceSession:
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    present = {output.name for output in opened.graph.output}
    opened.graph.output.extend(
        onnx.ValueInfoProto(name=tensor) for tensor in tensors if tensor not in present
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Its arena grows by doubling, now and then once more: 330 or 400 MB for the same work.
    options.enable_cpu_mem_arena = False
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        opened.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
