"""Quantize one layer at a time and see what it costs: which layers should stay float, and why.

It does not know the dialects: it is given one, with its emitter. A rule of thumb such as "leave the
first and the last layer float" is wrong for every second model, so every model is measured.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx

from calibration.executor import Array, Executor
from calibration.graph import Graph
from calibration.price import Price, multiplications
from calibration.quantize import NOT_TUNED, Emitted, Tuned
from calibration.table import Table
from runtime.metrics import sqnr_db
from runtime.preprocess import UInt8

SCAN_IMAGES = 64
"""Images that show which layers make the error; more cost time and change no order."""

MIN_ERROR_SHARE = 0.05
"""Layers that make less than this of the error that is left are not worth float kernels."""

MAX_RUN = 6
"""Neighbours that are looked at together: two blocks of a network for small devices."""

LEAST_PRICE = 0.002
"""What costs less than this share of the time is as good as free."""


SENSITIVITY = "sensitivity.json"
"""Beside the table: what ``scan`` found, by form."""


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
    sensitivities: Sequence[LayerSensitivity], price: Price, budget: float
) -> dict[str, str]:
    """The layers to leave float for ``budget``, a share of the form's time, each with the reason.

    Step by step that run of up to MAX_RUN neighbours whose errors are the most for what it adds to
    the price, as long as it makes MIN_ERROR_SHARE of the error that is left or more. Neighbours,
    because layers that are float together need no conversion between them: a layer alone may cost
    more than a whole run.
    """
    found = {layer.name: layer for layer in sensitivities}
    runs = _runs([name for name in price.layers if name in found])
    chosen: dict[str, str] = {}
    while True:
        left = sum(layer.error_share for layer in sensitivities if layer.name not in chosen)
        spent, best, most = price.share(chosen), None, 0.0
        for run in runs:
            gain = sum(found[name].error_share for name in run if name not in chosen)
            if gain <= 0.0 or gain < MIN_ERROR_SHARE * left:
                continue
            total = price.share([*chosen, *run])
            worth = gain / max(total - spent, LEAST_PRICE)
            if total <= budget and worth > most:
                best, most = run, worth
        if best is None:
            return chosen
        for name in best:
            chosen.setdefault(name, f"float, alone or with its neighbours: {found[name].measured}")


def _runs(layers: Sequence[str]) -> list[tuple[str, ...]]:
    """All runs of neighbours, short ones first."""
    return [
        tuple(layers[start : start + length])
        for length in range(1, MAX_RUN + 1)
        for start in range(len(layers) - length + 1)
    ]
