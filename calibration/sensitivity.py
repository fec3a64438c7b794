"""Quantize one layer at a time and see what it costs: which layers should stay float, and why.

It does not know the dialects: it is given one, with its emitter. A rule of thumb such as "leave the
first and the last layer float" is wrong for every second model, so every model is measured.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx

from calibration.executor import Array, Executor
from calibration.graph import Graph, channel_axis
from calibration.quantize import NOT_TUNED, Emitted, Tuned
from calibration.table import Table
from runtime.metrics import sqnr_db
from runtime.preprocess import UInt8

MIN_ERROR_SHARE = 0.05
"""A layer that makes less of the error than this is not worth a float kernel."""

MAX_COMPUTE_SHARE = 0.025
"""Share of the multiplications that may stay float from the beginning."""


class Emit(Protocol):
    """A dialect's ``emit``."""

    def __call__(
        self,
        graph: onnx.ModelProto,
        table: Table,
        *,
        float_nodes: Collection[str] = (),
        correct_bias: bool = True,
        tuned: Tuned = NOT_TUNED,
    ) -> Emitted: ...


@dataclasses.dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one layer, and nothing else, does to the answers."""

    name: str
    sqnr_db: float
    """Of the logits."""
    flips: int
    """Images that change their class."""
    images: int
    error_share: float
    """Of the squared errors of all layers that were tried, summed."""
    compute_share: float
    """Of the graph's multiplications."""

    @property
    def error_per_compute(self) -> float:
        """What is gained by a float kernel, against what it costs."""
        return self.error_share / max(self.compute_share, 1e-6)

    @property
    def measured(self) -> str:
        """The figures as half a sentence."""
        return (
            f"{self.error_share:.1%} of the error ({self.sqnr_db:.1f} dB alone, "
            f"{self.flips} of {self.images} images change class) for {self.compute_share:.1%} of "
            "the multiplications"
        )


def scan(
    graph: onnx.ModelProto,
    table: Table,
    emit: Emit,
    images: UInt8,
    *,
    layers: Sequence[str] | None = None,
    tuned: Tuned = NOT_TUNED,
    progress: Callable[[float], None] | None = None,
) -> tuple[LayerSensitivity, ...]:
    """Each of ``layers`` (default: all that ``emit`` quantizes) alone in INT8, worst first.

    ``images`` are uint8 ``[N, H, W, C]``. ``tuned`` may hold scales and weights; its biases answer
    for errors of layers before, which are float here, so they are not used. ``progress`` gets the
    share that is done.

    The float graph runs once. Where it comes to a layer, all that follows runs with that layer
    quantized, on the tensors that are there: half a pass for each layer, and no memory beyond that
    of one pass.
    """
    index = Graph(graph)
    if layers is None:
        layers = emit(graph, table).quantized
    image = index.preprocessing().image
    names = [layer.name for layer in index.layers()]
    without_biases = Tuned(tuned.scales, tuned.weights)
    by_input: dict[str, list[str]] = {}
    for layer in index.layers():
        if layer.name in layers:
            by_input.setdefault(layer.input, []).append(layer.name)
    logits: dict[str, Array] = {}

    def visit(tensor: str, live: dict[str, Array]) -> None:
        for layer in by_input[tensor]:
            others = [name for name in names if name != layer]
            model = emit(graph, table, float_nodes=others, tuned=without_biases).model
            # What is before the layer means the same in both graphs; one may begin with the bytes.
            given = {**live, image: images}
            logits[layer] = Executor(model, given=given).run(given)["logits"]
            if progress is not None:
                progress(len(logits) / len(layers))

    executor = Executor(graph, stops=by_input)
    reference = executor.run({image: images}, visit)["logits"]
    return _compare(reference, logits, multiplications(index))


def multiplications(graph: Graph) -> dict[str, int]:
    """Multiplications per image of every layer whose output has a known shape."""
    counts = {}
    for layer in graph.layers():
        shape = graph.shape(layer.output)
        if shape is None:
            continue
        axis = channel_axis(layer.op_type) % len(shape)
        places = [side or 1 for at, side in enumerate(shape) if at not in (0, axis)]
        counts[layer.name] = layer.weight.size * math.prod(places)
    return counts


def _compare(
    reference: Array, logits: Mapping[str, Array], multiplications: Mapping[str, int]
) -> tuple[LayerSensitivity, ...]:
    errors = {name: float((_centred(got - reference) ** 2).sum()) for name, got in logits.items()}
    all_errors = sum(errors.values()) or 1.0
    all_products = sum(multiplications.values()) or 1
    return tuple(
        LayerSensitivity(
            name=name,
            sqnr_db=sqnr_db(reference, got),
            flips=int((got.argmax(axis=1) != reference.argmax(axis=1)).sum()),
            images=len(reference),
            error_share=errors[name] / all_errors,
            compute_share=multiplications.get(name, 0) / all_products,
        )
        for name, got in sorted(logits.items(), key=lambda item: -errors[item[0]])
    )


def _centred(logits: Array) -> npt.NDArray[np.float64]:
    exact = logits.astype(np.float64)
    return np.asarray(exact - exact.mean(axis=1, keepdims=True))


def choose_float(
    sensitivities: Sequence[LayerSensitivity],
    *,
    min_error_share: float = MIN_ERROR_SHARE,
    max_compute_share: float = MAX_COMPUTE_SHARE,
) -> dict[str, str]:
    """The layers to leave float before anything else is tried, each with the reason.

    Those that make ``min_error_share`` of the error or more, the most error per multiplication
    first, as long as all of them together are ``max_compute_share`` of the multiplications or less.
    """
    chosen: dict[str, str] = {}
    compute = 0.0
    for layer in sorted(sensitivities, key=lambda layer: -layer.error_per_compute):
        affordable = compute + layer.compute_share <= max_compute_share
        if layer.error_share >= min_error_share and affordable:
            chosen[layer.name] = f"float, for it makes {layer.measured}"
            compute += layer.compute_share
    return chosen


def next_float(
    sensitivities: Sequence[LayerSensitivity], count: int, *, kept: Collection[str] = ()
) -> dict[str, str]:
    """The ``count`` layers to leave float next, besides ``kept``, each with the reason.

    The most error per multiplication first.
    """
    left = [layer for layer in sensitivities if layer.name not in kept]
    left.sort(key=lambda layer: -layer.error_per_compute)
    return {layer.name: f"float next: {layer.measured}" for layer in left[:count]}
