"""Sequential bias correction: what quantizing shifts in a layer's mean output, its bias takes back.

It does not know the dialect: it compares the graph that will be deployed with the float graph.

Rounded weights and rounded inputs move the mean of what a layer makes, and later layers add to it.
Layer by layer in graph order, with everything before quantized and corrected already, the mean
difference per output channel goes into the bias. Both graphs must see the same images: correcting
layers independently, or on different images, makes a network worse than leaving it alone.
(Nagel et al. 2019, arXiv:1906.04721, appendix D; Finkelstein et al. 2019, arXiv:1906.03193.)
"""

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt
import onnx

from calibration.executor import Array, Executor, groups
from calibration.graph import Graph, channel_axis
from calibration.quantize import Emitted, Float32
from runtime.preprocess import UInt8

Float64 = npt.NDArray[np.float64]


def output_means(
    graph: onnx.ModelProto, layers: Collection[str], images: UInt8
) -> dict[str, Float64]:
    """Mean output ``[O]`` of each of ``layers`` in ``graph`` over ``images`` ``[N, H, W, C]``.

    What the layer itself makes is meant, bias included, before any activation. Layers without
    a place for a bias are left out.
    """
    stops = _outputs(Graph(graph), graph, layers)
    totals: dict[str, Float64] = {}

    def visit(tensor: str, live: dict[str, Array]) -> None:
        layer, axis = stops[tensor]
        values = live[tensor]
        totals[layer] = totals.get(layer, 0.0) + _mean(values, axis) * len(values)

    executor = Executor(graph, stops=stops)
    for group in groups(images):
        executor.run({graph.graph.input[0].name: group}, visit)
    return {layer: total / len(images) for layer, total in totals.items()}


def correct_biases(
    graph: onnx.ModelProto, emitted: Emitted, expected: Mapping[str, Float64], images: UInt8
) -> dict[str, Float32]:
    """The biases ``[O]`` with which ``emitted`` keeps the mean outputs of ``graph``, by layer.

    ``emitted`` was written with the biases of ``graph`` (``correct_bias=False``); ``expected`` is
    ``output_means`` of ``graph`` on the same ``images``, ``[N, H, W, C]``. One pass: a layer is
    corrected as the pass comes to it, so later layers see what was corrected. All images are in
    memory at once, with the widest tensor of the network.
    """
    index = Graph(graph)
    stops = _outputs(index, emitted.model, emitted.quantized)
    before = {layer.name: layer.bias for layer in index.layers()}
    biases: dict[str, Float32] = {}

    def visit(tensor: str, live: dict[str, Array]) -> None:
        layer, axis = stops[tensor]
        values, bias = live[tensor], before[layer]
        shift = expected[layer] - _mean(values, axis)
        np.moveaxis(values, axis, -1)[...] += shift.astype(np.float32)
        biases[layer] = np.asarray(shift if bias is None else bias + shift, dtype=np.float32)

    Executor(emitted.model, stops=stops).run({emitted.model.graph.input[0].name: images}, visit)
    return biases


def _outputs(
    graph: Graph, model: onnx.ModelProto, layers: Collection[str]
) -> dict[str, tuple[str, int]]:
    """What ``layers`` make in ``model``, a form of ``graph``: tensor -> layer, axis of channels."""
    made = {tensor for node in model.graph.node for tensor in node.output}
    stops = {}
    for layer in graph.layers():
        if layer.name in layers and (layer.op_type != "MatMul" or layer.bias is not None):
            # A form that absorbs the activation calls the layer's output by what was behind it.
            output = layer.output if layer.output in made else graph.behind(layer.output)
            stops[output] = (layer.name, channel_axis(layer.op_type))
    return stops


def _mean(values: Array, axis: int) -> Float64:
    """Mean of ``values`` ``[N, ...]`` for each entry of ``axis``."""
    channels_first = np.moveaxis(values, axis, 1)
    per_image = channels_first.reshape(*channels_first.shape[:2], -1).mean(axis=2)
    return np.asarray(per_image.mean(axis=0, dtype=np.float64))
