"""Write ``int8-cpu.onnx``: a graph whose every quantized convolution onnxruntime fuses to one.

It does not know how ranges were measured, and TensorRT refuses what it writes (that is what the
other dialect is for). The form that onnxruntime's CPU kernels like, found by measuring:

- uint8 activations, int8 weights per output channel, int32 bias in the accumulator's unit.
- The image byte *is* the first quantized value (scale ``1/std``, zero point ``mean``), so Cast,
  Mul and Add vanish and no Quantize node comes before the first convolution.
- A gray image is folded into four channels where the first convolution allows it
  (`calibration.space_to_depth`), because the kernels want channels in fours.
- A Relu, or a Clip that begins at 0, vanishes too: with zero point 0 saturation does its work.
- Both sides of every quantized operator are quantized, because that is what is fused. Operators
  that onnxruntime has no 8-bit kernel for read the dequantized tensor and compute in float.

Written as Quantize-Dequantize pairs: standard ONNX that any runtime can check, and that
onnxruntime turns into QLinear operators when it opens the file. `calibration.kernels` proves it.
"""

import dataclasses
from collections.abc import Collection, Iterable

import numpy as np
import onnx
from onnx import helper

from calibration.graph import (
    ARITHMETIC_OPS,
    LINEAR_OPS,
    RANGE_PRESERVING_OPS,
    Conv,
    Graph,
    attributes,
    check_names,
)
from calibration.quantize import (
    NOT_TUNED,
    Emitted,
    Scale,
    Tuned,
    Writer,
    asymmetric,
    corrected_bias,
    quantize_bias,
    quantize_weight,
    room_for_bias,
    weight_scales,
)
from calibration.space_to_depth import find_fold
from calibration.table import Table

_FOLLOWERS = RANGE_PRESERVING_OPS | ARITHMETIC_OPS

_UNIT = Scale(np.float32(1 / 255), np.uint8(0))
"""Of values from 0 to 1."""


def emit(
    graph: onnx.ModelProto,
    table: Table,
    *,
    float_nodes: Collection[str] = (),
    correct_bias: bool = True,
    tuned: Tuned = NOT_TUNED,
) -> Emitted:
    """``graph`` with the convolutions, and what lies between them, in 8-bit form.

    ``float_nodes`` names nodes that stay float; ``correct_bias`` takes the mean effect of rounding
    the weights back out of the biases, where ``tuned`` does not say better. ``graph`` is not
    changed.

    Raises ExportError if the graph is not what export writes, or the table is another graph's.
    """
    index = Graph(graph)
    check_names(index, float_nodes)
    table.check_graph(graph)
    plan = _plan(index, float_nodes)
    emitter = _Emitter(index, table, plan, correct_bias, tuned)
    for node in graph.graph.node:
        emitter.write(node)
    return Emitted(emitter.writer.model(), tuple(plan.convs), plan.kept_float)


@dataclasses.dataclass
class _Plan:
    """Which nodes and tensors are 8-bit."""

    convs: dict[str, Conv] = dataclasses.field(default_factory=dict)
    kept_float: dict[str, str] = dataclasses.field(default_factory=dict)
    followers: set[str] = dataclasses.field(default_factory=set)
    """Other operators computed on 8-bit values."""
    quantized: set[str] = dataclasses.field(default_factory=set)
    """Tensors that every reader reads dequantized."""
    absorbed: dict[str, str] = dataclasses.field(default_factory=dict)
    """Tensor before a Relu or Clip that vanishes -> tensor behind it."""
    vanished: set[str] = dataclasses.field(default_factory=set)
    """Nodes that are not written: preprocessing and absorbed activations."""


def _plan(graph: Graph, float_nodes: Collection[str]) -> _Plan:
    plan = _Plan()
    first = graph.preprocessing()
    plan.vanished.update(first.nodes)
    plan.quantized.add(first.output)
    for node in graph.nodes.values():
        if node.op_type not in LINEAR_OPS:
            continue
        conv = graph.conv(node)
        if reason := _why_float(graph, node, conv, float_nodes):
            plan.kept_float[node.name] = reason
            continue
        assert conv is not None
        plan.convs[node.name] = conv
    for conv in plan.convs.values():
        plan.quantized.update((conv.input, _behind(graph, plan, conv.output)))

    useful = _useful(graph, plan, float_nodes)
    for node in graph.nodes.values():
        inputs = graph.data_inputs(node)
        if node.name not in useful or not plan.quantized.issuperset(inputs):
            continue
        plan.followers.add(node.name)
        for tensor in graph.data_outputs(node):
            plan.quantized.add(_behind(graph, plan, tensor))
    plan.kept_float.update(_conversions(graph, plan, float_nodes))
    return plan


def _conversions(graph: Graph, plan: _Plan, float_nodes: Collection[str]) -> dict[str, str]:
    """Other nodes that read or make 8-bit tensors but compute in float, with the reason."""
    result = {}
    done = {*plan.convs, *plan.kept_float, *plan.followers, *plan.vanished}
    for node in graph.nodes.values():
        tensors = [*graph.data_inputs(node), *graph.data_outputs(node)]
        if node.name in done or not plan.quantized.intersection(tensors):
            continue
        if node.name in float_nodes:
            result[node.name] = "asked for by float_nodes"
        elif node.op_type not in _FOLLOWERS or not _has_kernel(graph, node):
            result[node.name] = f"{node.op_type}: onnxruntime has no 8-bit kernel for it"
        else:
            result[node.name] = f"{node.op_type}: its neighbours are float"
    return result


def _why_float(
    graph: Graph, node: onnx.NodeProto, conv: Conv | None, float_nodes: Collection[str]
) -> str:
    if node.name in float_nodes:
        return "asked for by float_nodes"
    if node.op_type != "Conv":
        return f"{node.op_type}: only convolutions are quantized"
    if conv is None:
        return "its weights are not a plain constant"
    if conv.output in graph.outputs:
        return "it makes an output of the model, and those are float"
    return ""


def _behind(graph: Graph, plan: _Plan, tensor: str) -> str:
    """The tensor that is quantized for ``tensor``; what lies between vanishes."""
    behind = graph.behind(tensor)
    if behind != tensor:
        plan.absorbed[tensor] = behind
        plan.vanished.update(node.name for node in graph.consumers(tensor))
    return behind


def _useful(graph: Graph, plan: _Plan, float_nodes: Collection[str]) -> set[str]:
    """Operators whose 8-bit result would reach a quantized convolution through 8-bit operators.

    The others, such as the last average pooling, lose nothing by computing in float.
    """
    wanted = {conv.input for conv in plan.convs.values()}
    useful: set[str] = set()
    for node in reversed(graph.nodes.values()):
        outputs = graph.data_outputs(node)
        if (
            node.op_type in _FOLLOWERS
            and node.name not in float_nodes
            and _has_kernel(graph, node)
            and not graph.outputs.intersection(outputs)
            and wanted.intersection([*outputs, *map(graph.behind, outputs)])
        ):
            useful.add(node.name)
            wanted.update(graph.data_inputs(node))
    return useful


def _has_kernel(graph: Graph, node: onnx.NodeProto) -> bool:
    if node.op_type in ("Add", "Mul"):
        return len(graph.data_inputs(node)) == 2
    if node.op_type == "ReduceMean":
        return graph.is_global_average(node)
    if node.op_type == "MaxPool":
        return len(node.output) == 1
    if node.op_type in _GATES:
        slope, offset = _gate(node)
        return slope > 0.0 and offset > 0.0
    return True


_GATES = ("HardSigmoid", "HardSwish")


def _gate(node: onnx.NodeProto) -> tuple[float, float]:
    """Slope and offset of ``clip(slope * x + offset, 0, 1)`` in a HardSigmoid or HardSwish."""
    if node.op_type == "HardSwish":
        return 1.0 / 6.0, 0.5
    found = attributes(node)
    return float(found.get("alpha", 0.2)), float(found.get("beta", 0.5))


class _Emitter:
    def __init__(
        self, graph: Graph, table: Table, plan: _Plan, correct_bias: bool, tuned: Tuned
    ) -> None:
        self.graph, self.table, self.plan = graph, table, plan
        self.correct_bias, self.tuned = correct_bias, tuned
        self.writer = Writer(graph)
        self.scales: dict[str, Scale] = {}
        self.quantized: dict[str, str] = {}
        self.dequantized: dict[str, str] = {}
        self.fold = find_fold(graph, frozenset(plan.convs))
        self._image()

    def _image(self) -> None:
        first = self.graph.preprocessing()
        if self.fold is not None:
            planes = self.fold.write_planes(self.writer, first.image)
        else:
            planes = self.writer.name(f"{first.image}_planes")
            self.writer.node("Transpose", [first.image], planes, perm=[0, 3, 1, 2])
        self._set(first.output, planes, Scale(np.float32(first.scale), np.uint8(first.mean)))

    def _set(self, tensor: str, quantized: str, scale: Scale) -> None:
        """From here on ``tensor`` is read from ``quantized``."""
        self.quantized[tensor], self.scales[tensor] = quantized, scale
        self.dequantized[tensor] = self.writer.dequantize(quantized, scale, f"{tensor}_dequantized")

    def write(self, node: onnx.NodeProto) -> None:
        plan = self.plan
        if node.name in plan.vanished:
            return
        inputs = [self.dequantized.get(tensor, tensor) for tensor in node.input]
        outputs = [plan.absorbed.get(tensor, tensor) for tensor in node.output]
        if node.name in plan.convs:
            inputs[1:] = self._weights(plan.convs[node.name], list(node.input))
            if self.fold is not None and node.name == self.fold.conv:
                node = self.fold.node(node)
        elif node.op_type in LINEAR_OPS and node.input[0] in self.quantized:
            inputs[0] = self._protected(node)
        if node.name in plan.followers and node.op_type == "ReduceMean":
            node = helper.make_node("GlobalAveragePool", inputs[:1], outputs, name=node.name)
            inputs = inputs[:1]
        if node.name in plan.followers and node.op_type in _GATES:
            gate = self._write_gate(node, inputs[0])
            if node.op_type == "HardSigmoid":
                self._set(outputs[0], gate, _UNIT)
                return
            node = helper.make_node("Mul", [], [], name=node.name)
            inputs.append(self.writer.dequantize(gate, _UNIT, f"{outputs[0]}_gate"))
        self.writer.copy(node, inputs, outputs)
        for tensor in outputs:
            if tensor in plan.quantized:
                scale = self._scale(node, tensor)
                self._set(tensor, self.writer.quantize(tensor, scale), scale)

    def _protected(self, node: onnx.NodeProto) -> str:
        """The dequantized input of a linear ``node`` that is to stay float.

        Between a Dequantize and a Quantize onnxruntime would quantize its weights by itself, and
        per tensor (its WeightBiasQuantization pass). Only a Dequantize with one scale invites
        that: one that repeats it along an axis means the same and does not.
        """
        tensor = node.input[0]
        for axis, side in enumerate(self.graph.shape(tensor) or ()):
            if axis > 0 and side is not None and side > 1:
                base = f"{tensor}_for_{node.name}"
                quantized, scale = self.quantized[tensor], self.scales[tensor]
                return self.writer.dequantize(quantized, scale, base, axis=axis, repeat=side)
        return self.dequantized[tensor]

    def _write_gate(self, node: onnx.NodeProto, x: str) -> str:
        """Write ``clip(slope * x + offset, 0, 1)`` for ``x``; return it in uint8 of scale _UNIT.

        onnxruntime has no 8-bit kernel for it, but it has one for Add, and an Add saturates:
        ``x + offset / slope`` in uint8 over ``[0, 1 / slope]`` is the gate times ``1 / slope``.
        Reading those bytes with another scale is the multiplication.
        """
        slope, offset = _gate(node)
        writer, base = self.writer, node.output[0]
        shift = writer.dequantize(
            writer.constant(f"{base}_shift", np.asarray(np.uint8(255))),
            Scale(np.float32(offset / slope / 255), np.uint8(0)),
            f"{base}_shift_dequantized",
        )
        shifted = writer.name(f"{base}_shifted")
        writer.node("Add", [x, shift], shifted)
        return writer.quantize(shifted, Scale(np.float32(1 / slope / 255), np.uint8(0)))

    def _weights(self, conv: Conv, names: list[str]) -> Iterable[str]:
        input_scale = self.scales[conv.input].scale
        scales, bias = self.tuned.scales.get(conv.name, weight_scales(conv.weight)), conv.bias
        if bias is not None:
            scales = room_for_bias(scales, bias, input_scale)
        weight = self.tuned.weights.get(conv.name, quantize_weight(conv.weight, scales))
        fold = self.fold if self.fold is not None and self.fold.conv == conv.name else None
        written = weight if fold is None else fold.weight(weight)
        yield self.writer.constant_dequantize(names[1], written, scales)
        if conv.name in self.tuned.biases:
            bias = self.tuned.biases[conv.name]
        elif self.correct_bias:
            means = self.table.channel_means(conv.input)
            bias = corrected_bias(conv, weight, scales, means)
        if bias is not None:
            unit = input_scale * scales
            name = f"{conv.name}_bias"
            yield self.writer.constant_dequantize(name, quantize_bias(bias, unit), unit)

    def _scale(self, node: onnx.NodeProto, tensor: str) -> Scale:
        if node.name in self.plan.followers and node.op_type in RANGE_PRESERVING_OPS:
            (source,) = self.graph.data_inputs(node)
            return self.scales[source]
        return asymmetric(*self.table.range(tensor))
