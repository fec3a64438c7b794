"""What both dialects share: the arithmetic of scales, and writing a graph node by node.

It does not know where Quantize and Dequantize nodes belong; that is what the dialects differ in.

A real value ``x`` becomes the integer ``q = saturate(round(x / scale) + zero_point)``, rounding
halves to even, as ONNX QuantizeLinear does. (Jacob et al. 2018, arXiv:1712.05877.)
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from calibration.graph import Graph, Layer

Float32 = npt.NDArray[np.float32]

SMALLEST_SCALE = np.float32(2.0**-40)
"""Products of three scales stay normal float32 numbers above this."""

LARGEST_BIAS = 2.0**30
"""Integer biases keep this far below int32's end, so that the accumulator cannot overflow:
255 · 127 · K adds less than 2**30 for up to 33,000 products per output."""


@dataclasses.dataclass(frozen=True)
class Emitted:
    """A quantized graph and what became of its layers."""

    model: onnx.ModelProto
    quantized: tuple[str, ...]
    """Names of the layers that are meant to run in INT8, in graph order."""
    kept_float: Mapping[str, str]
    """Names of the nodes that stay float though they cost time, with the reason."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What was learned about single layers on calibration images, by the layers' names.

    It replaces what a dialect would do by itself: round to nearest, with scales that reach the
    largest weight, and take the mean effect of that out of the bias.
    """

    scales: Mapping[str, Float32] = dataclasses.field(default_factory=dict)
    """Weight scales ``[O]``, one for each place on the layer's ``axis``."""
    weights: Mapping[str, npt.NDArray[np.int8]] = dataclasses.field(default_factory=dict)
    """Quantized weights in the layer's own shape, in steps of its scales."""
    biases: Mapping[str, Float32] = dataclasses.field(default_factory=dict)
    """Biases ``[O]``, corrected already."""

    def scales_of(self, layer: Layer) -> Float32:
        """The weight scales ``[O]`` of ``layer``."""
        return self.scales.get(layer.name, weight_scales(layer.weight, layer.axis))

    def weight_of(self, layer: Layer, scales: Float32) -> npt.NDArray[np.int8]:
        """The weights of ``layer`` in steps of ``scales`` ``[O]``."""
        rounded = quantize_weight(layer.weight, scales, layer.axis)
        return self.weights.get(layer.name, rounded)

    def bias_of(
        self,
        layer: Layer,
        weight: npt.NDArray[np.int8],
        scales: Float32,
        means: npt.NDArray[np.float64] | None,
    ) -> Float32 | None:
        """The bias ``[O]`` of ``layer`` with these weights, None if it has none.

        ``means`` ``[I]`` of its input correct it; None leaves it as it is. A MatMul without a bias
        gets none: an Add behind it costs more than the correction gives.
        """
        if layer.name in self.biases:
            return self.biases[layer.name]
        if means is None or (layer.op_type == "MatMul" and layer.bias is None):
            return layer.bias
        return corrected_bias(layer, weight, scales, means)


NOT_TUNED = Tuned()


@dataclasses.dataclass(frozen=True)
class Scale:
    """How one activation tensor is quantized."""

    scale: np.float32
    zero_point: np.int8 | np.uint8


def symmetric(low: float, high: float) -> Scale:
    """int8 with zero point 0 and 127 steps to the larger magnitude."""
    return Scale(_scale(max(abs(low), abs(high)), 127), np.int8(0))


def asymmetric(low: float, high: float) -> Scale:
    """uint8 with 255 steps over the range, widened to contain 0, which stays exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = _scale(high - low, 255)
    return Scale(scale, np.uint8(np.clip(np.rint(-low / scale), 0, 255)))


def _scale(width: float, steps: int) -> np.float32:
    # A tensor that was always 0 may have any scale; 1 cannot overflow what is computed from it.
    return np.float32(max(width / steps, float(SMALLEST_SCALE)) if width > 0.0 else 1.0)


def weight_scales(weight: Float32, axis: int = 0) -> Float32:
    """Symmetric int8 scales ``[O]``, one per output channel, which are on ``axis`` of ``weight``.

    A channel of zeros takes the largest scale of the others: its weights are exact under any.
    """
    rows = np.moveaxis(weight, axis, 0)
    largest = np.abs(rows.reshape(len(rows), -1)).max(axis=1)
    scales = np.maximum(largest / np.float32(127), SMALLEST_SCALE).astype(np.float32)
    dead = largest == 0.0
    scales[dead] = 1.0 if dead.all() else scales[~dead].max()
    return np.asarray(scales)


def room_for_bias(scales: Float32, bias: Float32, input_scale: np.float32) -> Float32:
    """``scales`` ``[O]``, raised where ``bias / (input_scale * scale)`` would not fit int32.

    Only channels whose weights vanish beside their bias are touched.
    """
    needed = np.abs(bias.astype(np.float64)) / (float(input_scale) * LARGEST_BIAS)
    return np.maximum(scales, needed.astype(np.float32))


def quantize_weight(weight: Float32, scales: Float32, axis: int = 0) -> npt.NDArray[np.int8]:
    """``weight`` in int8, -127 to 127; ``scales`` ``[O]`` belong to its ``axis``."""
    steps = weight / _along(scales, axis, weight.ndim)
    return np.asarray(np.clip(np.rint(steps), -127, 127), dtype=np.int8)


def _along(scales: npt.NDArray[Any], axis: int, ndim: int) -> npt.NDArray[Any]:
    shape = [1] * ndim
    shape[axis] = -1
    return scales.reshape(shape)


def corrected_bias(
    layer: Layer, quantized: npt.NDArray[np.int8], scales: Float32, means: npt.NDArray[np.float64]
) -> Float32:
    """The bias ``[O]`` of ``layer``, less what rounding its weights adds to the mean output.

    ``means`` ``[I]`` are the float graph's mean inputs. Each layer answers for its own weights
    only, so the corrections need no order and cannot add up. (Nagel et al. 2019,
    arXiv:1906.04721, section 4.2, with measured instead of modelled means.)
    """
    weight = quantized * _along(scales.astype(np.float64), layer.axis, quantized.ndim)
    error = np.moveaxis(weight - layer.weight, layer.axis, 0)
    # [groups, O / groups, I / groups]: summed over the kernel, since the mean is everywhere.
    per_input = error.reshape(*error.shape[:2], -1).sum(axis=2)
    per_input = per_input.reshape(layer.groups, layer.out_channels // layer.groups, -1)
    shift = np.einsum("goi,gi->go", per_input, means.reshape(layer.groups, -1)).reshape(-1)
    bias = np.zeros(layer.out_channels) if layer.bias is None else layer.bias
    return np.asarray(bias - shift, dtype=np.float32)


def quantize_bias(bias: Float32, scales: Float32) -> npt.NDArray[np.int32]:
    """``bias`` ``[O]`` in int32 steps of ``scales`` ``[O]``, the accumulator's unit."""
    steps = np.rint(bias.astype(np.float64) / scales.astype(np.float64))
    return np.clip(steps, -LARGEST_BIAS, LARGEST_BIAS).astype(np.int32)


class Writer:
    """Writes a new graph beside the old one, which stays as it is."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        model = graph.model.graph
        self._taken = set(graph.nodes) | {t for node in model.node for t in node.output}
        self._taken |= {t.name for t in [*model.initializer, *model.input]}

    def name(self, base: str) -> str:
        """``base``, with a number if a tensor or node is called so already."""
        name, number = base, 1
        while name in self._taken:
            number += 1
            name = f"{base}_{number}"
        self._taken.add(name)
        return name

    def copy(
        self, node: onnx.NodeProto, inputs: Sequence[str], outputs: Sequence[str] | None = None
    ) -> None:
        """Write ``node`` with other ``inputs`` and ``outputs``."""
        written = onnx.NodeProto()
        written.CopyFrom(node)
        del written.input[:]
        written.input.extend(inputs)
        if outputs is not None:
            del written.output[:]
            written.output.extend(outputs)
        self._nodes.append(written)

    def layer(
        self,
        node: onnx.NodeProto,
        layer: Layer,
        inputs: Sequence[str],
        bias: str | None,
        output: str,
    ) -> None:
        """Write ``node`` as ``layer`` of ``inputs``: data, weights. A MatMul's bias is an Add."""
        if bias is None or node.op_type != "MatMul":
            self.copy(node, [*inputs, *([] if bias is None else [bias])], [output])
            return
        product = node.output[0] if layer.bias_add else self.name(f"{output}_product")
        self.copy(node, inputs, [product])
        self.node("Add", [product, bias], output)

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        """Write a new node, named after its output."""
        name = self.name(f"{output}_{op}")
        self._nodes.append(helper.make_node(op, inputs, [output], name, **attributes))

    def constant(self, base: str, value: npt.NDArray[Any]) -> str:
        """Store ``value`` and return its name.

        A scalar stays one: with a scale of shape ``[1]`` onnxruntime does not fuse Add and Mul.
        """
        name = self.name(base)
        self._initializers[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    def quantize(self, tensor: str, scale: Scale) -> str:
        """Write a QuantizeLinear on ``tensor``; return the integer tensor."""
        quantized = self.name(f"{tensor}_quantized")
        self.node("QuantizeLinear", [tensor, *self._scale(tensor, scale)], quantized)
        return quantized

    def dequantize(
        self, quantized: str, scale: Scale, base: str, *, axis: int = 1, repeat: int = 0
    ) -> str:
        """Write a DequantizeLinear; return its float tensor, called ``base``.

        ``repeat`` writes the one scale that many times, as if each entry of ``axis`` had its own.
        """
        output = self.name(base)
        inputs = [quantized, *self._scale(output, scale, repeat)]
        self.node("DequantizeLinear", inputs, output, **({"axis": axis} if repeat else {}))
        return output

    def _scale(self, base: str, scale: Scale, repeat: int = 0) -> list[str]:
        shape = [repeat] if repeat else []
        return [
            self.constant(f"{base}_scale", np.full(shape, scale.scale)),
            self.constant(f"{base}_zero_point", np.full(shape, scale.zero_point)),
        ]

    def constant_dequantize(
        self, base: str, value: npt.NDArray[Any], scales: Float32, axis: int = 0
    ) -> str:
        """Store an integer ``value`` and write its DequantizeLinear with ``scales`` on ``axis``."""
        output = self.name(f"{base}_dequantized")
        inputs = [
            self.constant(f"{base}_quantized", value),
            self.constant(f"{base}_scale", scales),
            self.constant(f"{base}_zero_point", np.zeros(len(scales), dtype=value.dtype)),
        ]
        self.node("DequantizeLinear", inputs, output, axis=axis)
        return output

    def model(self) -> onnx.ModelProto:
        """The new model: inputs, outputs, metadata and the initializers still used, checked."""
        model = onnx.ModelProto()
        model.CopyFrom(self._graph.model)
        del model.graph.node[:], model.graph.value_info[:]
        model.graph.node.extend(_needed(self._nodes, self._graph.outputs))
        used = {tensor for node in model.graph.node for tensor in node.input}
        kept = [t for t in model.graph.initializer if t.name in used]
        kept += [t for t in self._initializers.values() if t.name in used]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        onnx.checker.check_model(model, full_check=True)
        return model


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Collection[str]) -> list[onnx.NodeProto]:
    """``nodes`` without those that no output depends on."""
    wanted = set(outputs)
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]
