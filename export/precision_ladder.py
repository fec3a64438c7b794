"""The precision ladder of an INT8 form: which graphs are tried, in what order, and why each.

Post-training quantization first, with those layers float of which measurement says that they cost
accuracy and gain no speed; then ever more layers float; then weights that were taught to be
rounded. A rung is made only when it is asked for. It does not know what a form must prove
(export/gate), nor how it is run.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx

from calibration import Calibration, onnxruntime_dialect, tensorrt_dialect
from calibration.graph import Graph
from calibration.price import Price
from calibration.quantize import Emitted
from calibration.sensitivity import SCAN_IMAGES, Emit, LayerSensitivity, choose_float, scan
from calibration.table import Table
from calibration.tune import Learned, learn, tune
from runtime.errors import ExportError
from runtime.preprocess import InputSpec, preprocess_batch
from train import console

UInt8 = npt.NDArray[np.uint8]

BUDGETS = 0.1, 0.2, 0.35, 0.5
"""Rung by rung, the share of its time that a form may lose to layers that stay float, as
calibration/price estimates it; beyond the last there is hardly anything left of INT8's gain."""

LEARN_IMAGES = 48
"""Calibration images that biases are corrected on: 32 to 64 are plenty."""

EMITTERS: dict[str, Emit] = {
    "int8": tensorrt_dialect.emit,
    "int8-fp16": tensorrt_dialect.emit,
    # Whether the classifier stays float is measured like any other layer.
    "int8-cpu": functools.partial(onnxruntime_dialect.emit, classifier=True),
}


class Material(NamedTuple):
    """What rungs are made of; images are uint8 ``[N, H, W, C]`` of the field's training split."""

    graph: onnx.ModelProto
    table: Table
    images: UInt8
    """Some of those that were calibrated on."""
    many: UInt8
    """All of those and further ones, to choose weights on."""
    held_out: UInt8
    """Those that calibration did not see. They decide what is kept of a tuning."""


class Rung(NamedTuple):
    """One graph to judge."""

    name: str
    emitted: Emitted
    kept_float: Mapping[str, str]
    """Layers that stay float on purpose, with the reason."""
    reason: str
    """What was tried for it, and kept or reverted."""


Teach = Callable[[Emitted], Material | None]
"""Material of a network whose weights were taught to be rounded as in this graph; None if that
brought nothing."""


def material_of(graph: onnx.ModelProto, calibration: Calibration, spec: InputSpec) -> Material:
    """What the rungs of ``graph`` are made of; without held-out images those it saw have to do."""
    chosen = [image.path for image in calibration.choice.chosen]
    many = chosen + [example.path for example in calibration.further]
    held_out = [example.path for example in calibration.held_out] or chosen[:LEARN_IMAGES]
    images = (preprocess_batch(paths, spec) for paths in (chosen[:LEARN_IMAGES], many, held_out))
    return Material(graph, calibration.table, *images)


class PrecisionLadder:
    """The rungs of every INT8 form of one graph; what forms share is measured once."""

    def __init__(self, material: Material, teach: Teach) -> None:
        self.material, self._teach = material, teach
        self._sensitivities: dict[Emit, tuple[LayerSensitivity, ...]] = {}
        self._learned: Learned | None = None

    def rungs(self, form: str) -> Iterator[Rung]:
        """The graphs of ``form``, fastest first.

        Raises ExportError if the network has no layer that INT8 would make faster.
        """
        emit = EMITTERS[form]
        _check_worthwhile(emit(self.material.graph, self.material.table))
        sensitivities = self.sensitivities(form)
        price = Price(Graph(self.material.graph), [layer.name for layer in sensitivities])
        rungs: list[Rung] = []
        for budget in BUDGETS:
            kept = choose_float(sensitivities, price, budget)
            if rungs and kept.keys() == rungs[-1].kept_float.keys():
                continue
            kind = f"{len(kept)} layers float" if rungs else "post-training"
            rungs.append(self._tuned(form, kind, kept))
            yield rungs[-1]
        taught = self._teach(rungs[0].emitted)
        if taught is not None:
            above = PrecisionLadder(taught, self._teach)
            yield above._tuned(form, "quantization-aware", rungs[0].kept_float)

    def sensitivities(self, form: str) -> tuple[LayerSensitivity, ...]:
        """Every layer alone in INT8, worst first."""
        emit, material = EMITTERS[form], self.material
        if emit not in self._sensitivities:
            with console.fraction(f"{form}: one layer at a time") as report:
                self._sensitivities[emit] = scan(
                    material.graph, material.table, emit, material.held_out[:SCAN_IMAGES],
                    progress=lambda share: report(share, ""),
                )  # fmt: skip
        return self._sensitivities[emit]

    def _tuned(self, form: str, name: str, kept_float: Mapping[str, str]) -> Rung:
        material = self.material
        with console.fraction(f"{form}, {name}") as report:
            if self._learned is None:
                self._learned = learn(
                    material.graph, material.images, many=material.many, progress=report
                )
            result = tune(
                material.graph, material.table, EMITTERS[form], material.images, material.held_out,
                float_nodes=tuple(kept_float), learned=self._learned, progress=report,
            )  # fmt: skip
        return Rung(name, result.emitted, kept_float, result.reason)


def _check_worthwhile(emitted: Emitted) -> None:
    if not emitted.quantized:
        reasons = Counter(emitted.kept_float.values()).most_common(1)
        why = f": {reasons[0][0]}" if reasons else ""
        raise ExportError(f"no layer is left to quantize{why}; fp16 is the form for this network")
