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
- A matrix product writes floats unless something 8-bit reads them: its kernels may do either, so
  that a classifier can be quantized and still give float logits.

Written as Quantize-Dequantize pairs: standard ONNX that any runtime can check, and that
onnxruntime turns into QLinear operators when it opens the file. `calibration.kernels` proves it.
"""

import dataclasses
from collections.abc import Collection

import numpy as np
import onnx
from onnx import helper

from calibration.graph import (
    ARITHMETIC_OPS,
    ATTENTION,
    LINEAR_OPS,
    RANGE_PRESERVING_OPS,
    Conv,
    Graph,
    Layer,
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
    quantize_bias,
    room_for_bias,
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
    classifier: bool = False,
) -> Emitted:
    """``graph`` with its layers, and what lies between them, in 8-bit form.

    ``float_nodes`` names nodes that stay float; ``correct_bias`` takes the mean effect of rounding
    the weights back out of the biases, where ``tuned`` does not say better. ``classifier``
    quantizes the matrix products that make outputs of the model, too: they take little time and
    much of the error. ``graph`` is not changed.

    Raises ExportError if the graph is not what export writes, or the table is another graph's.
    """
    index = Graph(graph)
    check_names(index, float_nodes)
    table.check_graph(graph)
    plan = _plan(index, float_nodes, classifier=classifier)
    emitter = _Emitter(index, table, plan, correct_bias, tuned)
    for node in graph.graph.node:
        emitter.write(node)
    return Emitted(emitter.writer.model(), tuple(plan.layers), plan.kept_float)


@dataclasses.dataclass
class _Plan:
    """Which nodes and tensors are 8-bit."""

    layers: dict[str, Layer] = dataclasses.field(default_factory=dict)
    kept_float: dict[str, str] = dataclasses.field(default_factory=dict)
    followers: set[str] = dataclasses.field(default_factory=set)
    """Other operators computed on 8-bit values."""
    quantized: set[str] = dataclasses.field(default_factory=set)
    """Tensors that every reader reads dequantized."""
    absorbed: dict[str, str] = dataclasses.field(default_factory=dict)
    """Tensor before a Relu or Clip that vanishes -> tensor behind it."""
    vanished: set[str] = dataclasses.field(default_factory=set)
    """Nodes that are not written by themselves: preprocessing, absorbed activations, biases."""


def _plan(graph: Graph, float_nodes: Collection[str], *, classifier: bool) -> _Plan:
    plan = _Plan()
    first = graph.preprocessing()
    plan.vanished.update(first.nodes)
    plan.quantized.add(first.output)
    attention = bool(graph.attention())
    for node in graph.nodes.values():
        if node.op_type not in LINEAR_OPS:
            continue
        layer = graph.layer(node)
        if reason := _why_float(graph, node, layer, float_nodes, classifier):
            plan.kept_float[node.name] = reason
        elif attention:
            plan.kept_float[node.name] = ATTENTION
        else:
            assert layer is not None
            plan.layers[node.name] = layer
    useful, wanted = _useful(graph, plan, float_nodes)
    for layer in plan.layers.values():
        plan.quantized.add(layer.input)
        plan.vanished.add(layer.bias_add)
        if isinstance(layer, Conv) or _writes_8_bit(graph, layer, wanted):
            plan.quantized.add(_behind(graph, plan, layer.output))

    for node in graph.nodes.values():
        inputs = graph.data_inputs(node)
        if node.name not in useful or not plan.quantized.issuperset(inputs):
            continue
        plan.followers.add(node.name)
        for tensor in graph.data_outputs(node):
            keeps_scale = node.op_type in RANGE_PRESERVING_OPS
            plan.quantized.add(tensor if keeps_scale else _behind(graph, plan, tensor))
    plan.kept_float.update(_conversions(graph, plan, float_nodes))
    return plan


def _writes_8_bit(graph: Graph, layer: Layer, wanted: Collection[str]) -> bool:
    """Whether a matrix product writes 8-bit values: somebody wants them, or a Relu or Clip follows.

    Between a float product and a Relu or Clip onnxruntime fuses nothing into 8-bit kernels.
    """
    output = layer.output
    return (
        output in wanted
        or graph.behind(output) in wanted
        or graph.clipping_after(output) is not None
    )


def _conversions(graph: Graph, plan: _Plan, float_nodes: Collection[str]) -> dict[str, str]:
    """Other nodes that read or make 8-bit tensors but compute in float, with the reason."""
    result = {}
    done = {*plan.layers, *plan.kept_float, *plan.followers, *plan.vanished}
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
    graph: Graph,
    node: onnx.NodeProto,
    layer: Layer | None,
    float_nodes: Collection[str],
    classifier: bool,
) -> str:
    if node.name in float_nodes:
        return "asked for by float_nodes"
    if layer is None:
        return f"{node.op_type}: its weights are not a plain constant"
    if layer.output not in graph.outputs:
        return ""
    if isinstance(layer, Conv):
        return "it makes an output of the model, and those are float"
    return "" if classifier else "it makes an output of the model; quantized if asked for"


def _behind(graph: Graph, plan: _Plan, tensor: str) -> str:
    """The tensor that is quantized for ``tensor``; what lies between vanishes.

    Not for operators that keep their input's scale: its zero point need not be 0.
    """
    behind = graph.behind(tensor)
    if behind != tensor:
        plan.absorbed[tensor] = behind
        plan.vanished.update(node.name for node in graph.consumers(tensor))
    return behind


def _useful(graph: Graph, plan: _Plan, float_nodes: Collection[str]) -> tuple[set[str], set[str]]:
    """Operators whose 8-bit result would reach a quantized layer through 8-bit operators.

    And the tensors that those and the layers read. A residual Add of a quantized convolution is
    always one: in float both its inputs would have to be dequantized. Other operators, such as the
    last average pooling, lose nothing by computing in float.
    """
    wanted = {layer.input for layer in plan.layers.values()}
    made = {layer.output for layer in plan.layers.values() if isinstance(layer, Conv)}
    useful: set[str] = set()
    for node in reversed(graph.nodes.values()):
        outputs = graph.data_outputs(node)
        if (
            node.op_type in _FOLLOWERS
            and node.name not in float_nodes
            and _has_kernel(graph, node)
            and not graph.outputs.intersection(outputs)
            and (
                wanted.intersection([*outputs, *map(graph.behind, outputs)])
                or (node.op_type == "Add" and made.intersection(node.input))
            )
        ):
            useful.add(node.name)
            wanted.update(graph.data_inputs(node))
    return useful, wanted


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
        self.fold = find_fold(graph, frozenset(plan.layers))
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
        if node.name in plan.layers:
            self._write_layer(node, plan.layers[node.name])
            return
        inputs = [self.dequantized.get(tensor, tensor) for tensor in node.input]
        outputs = [plan.absorbed.get(tensor, tensor) for tensor in node.output]
        if node.op_type in LINEAR_OPS and node.input[0] in self.quantized:
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
            self._quantize(node, tensor)

    def _quantize(self, node: onnx.NodeProto, tensor: str) -> None:
        if tensor in self.plan.quantized:
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

    def _write_layer(self, node: onnx.NodeProto, layer: Layer) -> None:
        writer, tuned = self.writer, self.tuned
        output = self.plan.absorbed.get(layer.output, layer.output)
        means = self.table.channel_means(layer.input) if self.correct_bias else None
        unit = self.scales[layer.input].scale
        scales = tuned.scales_of(layer)
        if layer.bias is not None:
            scales = room_for_bias(scales, layer.bias, unit)
        weight = tuned.weight_of(layer, scales)
        bias = tuned.bias_of(layer, weight, scales, means)
        if self.fold is not None and self.fold.conv == layer.name:
            node, weight = self.fold.node(node), self.fold.weight(weight)
        if bias is not None and len(self.graph.shape(layer.input) or ()) == 2:
            node = _as_gemm(node)
        inputs = [
            self.dequantized[layer.input],
            writer.constant_dequantize(node.input[1], weight, scales, layer.axis),
        ]
        constant = None
        if bias is not None and node.op_type == "MatMul":
            constant = writer.constant(f"{layer.name}_bias", bias)
        elif bias is not None:
            steps = quantize_bias(bias, unit * scales)
            constant = writer.constant_dequantize(f"{layer.name}_bias", steps, unit * scales)
        writer.layer(node, layer, inputs, constant, output)
        self._quantize(node, output)

    def _scale(self, node: onnx.NodeProto, tensor: str) -> Scale:
        if node.name in self.plan.followers and node.op_type in RANGE_PRESERVING_OPS:
            (source,) = self.graph.data_inputs(node)
            return self.scales[source]
        return asymmetric(*self.table.range(tensor))


def _as_gemm(node: onnx.NodeProto) -> onnx.NodeProto:
    """A matrix product of two axes as Gemm, which has a bias.

    onnxruntime would make a Gemm of MatMul and Add by itself, too early to see that it is 8-bit.
    """
    if node.op_type == "Gemm":
        return node
    return helper.make_node("Gemm", node.input, node.output, name=node.name)
