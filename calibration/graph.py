"""Questions asked of a float ONNX graph before it is quantized: who makes what, who reads it.

It changes nothing, and does not know how either dialect answers.
"""

import collections
import dataclasses
import difflib
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from runtime.errors import ExportError
from runtime.preprocess import InputSpec

QUANTIZED_OPS = frozenset(
    [
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "QLinearConv",
        "QLinearMatMul",
        "ConvInteger",
        "MatMulInteger",
    ]
)

RANGE_PRESERVING_OPS = frozenset(
    ["MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Split", "Slice"]
)
"""Operators whose outputs are some of their input's values: one scale serves both sides."""

ARITHMETIC_OPS = frozenset(
    [
        "Add",
        "Mul",
        "Concat",
        "AveragePool",
        "GlobalAveragePool",
        "ReduceMean",
        "Sigmoid",
        "LeakyRelu",
        "HardSigmoid",
        "HardSwish",
    ]
)
"""Operators that engines compute on 8-bit values, each output with a scale of its own."""

LINEAR_OPS = frozenset(["Conv", "ConvTranspose", "Gemm", "MatMul"])
"""Operators with weights, whose precision decides speed and accuracy."""

_CHANNEL_AXES = {"Conv": 1, "Gemm": -1, "MatMul": -1}

ATTENTION = "an attention model: transformers gain from FP16, not from INT8"
"""Why the layers of a graph with attention stay float in both dialects."""

MIN_OPSET = 13
"""The first opset with per-channel DequantizeLinear."""


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The head of the graph that turns uint8 ``[N, H, W, C]`` into float ``[N, C, H, W]``."""

    image: str
    """The graph's uint8 input."""
    output: str
    """The normalised float32 tensor, ``(byte - mean) * scale``."""
    nodes: tuple[str, ...]
    """Names of the Cast, Transpose, Mul and Add."""
    scale: float
    """``1 / std``, in 1/levels."""
    mean: int
    """In 8-bit levels."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A Conv, Gemm or MatMul whose weights are constants."""

    name: str
    input: str
    output: str
    weight: npt.NDArray[np.float32]
    """In the node's own shape: Conv ``[O, I / groups, *kernel]``, MatMul and Gemm ``[I, O]``, Gemm
    with transB ``[O, I]``."""
    bias: npt.NDArray[np.float32] | None
    """``[O]``."""
    groups: int = 1
    axis: int = 0
    """Of the output channels in ``weight``."""
    op_type: str = "Conv"
    bias_add: str = ""
    """Name of the Add that brings the bias of a MatMul, which has none of its own; ``output`` is
    then what the Add makes."""

    @property
    def in_channels(self) -> int:
        return int(self.rows.shape[1]) * self.groups

    @property
    def out_channels(self) -> int:
        return int(self.weight.shape[self.axis])

    @property
    def rows(self) -> npt.NDArray[np.float32]:
        """The weights ``[O, I / groups, *kernel]``, a view."""
        return np.moveaxis(self.weight, self.axis, 0)


@dataclasses.dataclass(frozen=True)
class Conv(Layer):
    """A convolution whose weights are constants."""

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.in_channels

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.weight.shape[2:]


@dataclasses.dataclass(frozen=True)
class Clipping:
    """A Relu or Clip: ``output = min(max(input, low), high)``."""

    name: str
    output: str
    low: float
    high: float


class Graph:
    """A read-only index over a float model; tensors and nodes go by their names.

    Raises ExportError for what cannot be quantized here: a quantized model, external data,
    control flow, an opset before 13, nodes without a unique name.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        _refuse(model)
        self.model = model
        self.nodes: dict[str, onnx.NodeProto] = {node.name: node for node in model.graph.node}
        self.outputs = frozenset(output.name for output in model.graph.output)
        self._producers = {t: node for node in model.graph.node for t in node.output if t}
        self._consumers: dict[str, list[onnx.NodeProto]] = collections.defaultdict(list)
        for node in model.graph.node:
            for tensor in dict.fromkeys(node.input):
                self._consumers[tensor].append(node)
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._shapes, self._floats = _infer(model)

    def producer(self, tensor: str) -> onnx.NodeProto | None:
        """The node that makes ``tensor``; None for inputs and initializers."""
        return self._producers.get(tensor)

    def consumers(self, tensor: str) -> list[onnx.NodeProto]:
        """The nodes that read ``tensor``, in graph order, each once."""
        return self._consumers.get(tensor, [])

    def constant(self, tensor: str) -> npt.NDArray[Any] | None:
        """The value of an initializer or Constant; None if ``tensor`` is computed."""
        if tensor in self._initializers:
            return numpy_helper.to_array(self._initializers[tensor])
        node = self.producer(tensor)
        if node is not None and node.op_type == "Constant":
            value = attributes(node).get("value")
            return None if value is None else numpy_helper.to_array(value)
        return None

    def shape(self, tensor: str) -> tuple[int | None, ...] | None:
        """Inferred shape, None where a dimension (or all of it) is unknown."""
        return self._shapes.get(tensor)

    def data_inputs(self, node: onnx.NodeProto) -> list[str]:
        """The float tensors that ``node`` reads and that depend on the image."""
        return [t for t in node.input if t in self._floats and self.constant(t) is None]

    def data_outputs(self, node: onnx.NodeProto) -> list[str]:
        """The float tensors that ``node`` makes."""
        return [t for t in node.output if t in self._floats]

    def layers(self) -> list[Layer]:
        """All convolutions and matrix products with constant weights, in graph order."""
        return [layer for node in self.nodes.values() if (layer := self.layer(node))]

    def convs(self) -> list[Conv]:
        """All convolutions with constant weights, in graph order."""
        return [layer for layer in self.layers() if isinstance(layer, Conv)]

    def layer(self, node: onnx.NodeProto) -> Layer | None:
        """``node`` as a Layer; None if it is none or its weights are computed."""
        if node.op_type == "Conv":
            return self.conv(node)
        if node.op_type in ("Gemm", "MatMul"):
            return self._matrix_product(node)
        return None

    def conv(self, node: onnx.NodeProto) -> Conv | None:
        """``node`` as a Conv; None if it is none or its weights are computed."""
        if node.op_type != "Conv":
            return None
        weight, (bias, known) = self.constant(node.input[1]), self._bias(node)
        if weight is None or not known:
            return None
        groups = int(attributes(node).get("group", 1))
        return Conv(node.name, node.input[0], node.output[0], weight, bias, groups)

    def _bias(self, node: onnx.NodeProto) -> tuple[npt.NDArray[np.float32] | None, bool]:
        """The third input of ``node``, and whether it is absent or a constant."""
        if len(node.input) <= 2 or not node.input[2]:
            return None, True
        bias = self.constant(node.input[2])
        return bias, bias is not None

    def _matrix_product(self, node: onnx.NodeProto) -> Layer | None:
        weight, (bias, known) = self.constant(node.input[1]), self._bias(node)
        if self.constant(node.input[0]) is not None or weight is None or weight.ndim != 2:
            return None
        found = attributes(node)
        axis = 0 if found.get("transB", 0) else 1
        name, output = node.name, node.output[0]
        layer = Layer(name, node.input[0], output, weight, bias, axis=axis, op_type=node.op_type)
        if node.op_type == "MatMul":
            return self._with_bias_add(layer)
        plain = (
            not found.get("transA", 0) and found.get("alpha", 1.0) == found.get("beta", 1.0) == 1
        )
        if not plain or not known or (bias is not None and bias.size != layer.out_channels):
            return None
        return layer if bias is None else dataclasses.replace(layer, bias=bias.reshape(-1))

    def _with_bias_add(self, layer: Layer) -> Layer:
        readers = self.consumers(layer.output)
        if len(readers) != 1 or readers[0].op_type != "Add" or layer.output in self.outputs:
            return layer
        (node,) = readers
        (bias,) = [self.constant(t) for t in node.input if t != layer.output] or [None]
        if bias is None or bias.shape != (layer.out_channels,):
            return layer
        return dataclasses.replace(layer, bias=bias, output=node.output[0], bias_add=node.name)

    def behind(self, tensor: str) -> str:
        """The tensor to quantize for ``tensor``: that behind a Relu or Clip at zero, if any.

        Such an activation costs nothing: saturation with zero point 0 does the same.
        """
        clipping = self.clipping_after(tensor)
        if clipping is None or clipping.low != 0.0 or clipping.output in self.outputs:
            return tensor
        return clipping.output

    def clipping_after(self, tensor: str) -> Clipping | None:
        """The Relu or Clip that alone reads ``tensor``, if there is one."""
        readers = self.consumers(tensor)
        if len(readers) != 1 or tensor in self.outputs:
            return None
        (node,) = readers
        if node.op_type == "Relu":
            return Clipping(node.name, node.output[0], 0.0, float("inf"))
        if node.op_type == "Clip" and node.input[0] == tensor:
            low = self._bound(node, 1, -float("inf"))
            high = self._bound(node, 2, float("inf"))
            if low is not None and high is not None:
                return Clipping(node.name, node.output[0], low, high)
        return None

    def _bound(self, node: onnx.NodeProto, index: int, missing: float) -> float | None:
        if len(node.input) <= index or not node.input[index]:
            return missing
        value = self.constant(node.input[index])
        return None if value is None else float(value.reshape(()))

    def is_global_average(self, node: onnx.NodeProto) -> bool:
        """Whether ``node`` averages ``[N, C, H, W]`` to ``[N, C, 1, 1]``."""
        if node.op_type == "GlobalAveragePool":
            return True
        if node.op_type != "ReduceMean" or attributes(node).get("keepdims", 1) != 1:
            return False
        shape = self.shape(node.input[0])
        axes = self.constant(node.input[1]) if len(node.input) > 1 else None
        if shape is None or len(shape) != 4 or axes is None:
            return False
        return sorted(int(axis) % 4 for axis in axes.reshape(-1)) == [2, 3]

    def one_pixel(self, layer: Layer) -> bool:
        """Whether ``layer`` makes one value per channel, as a classifier or a gate does."""
        shape = self.shape(layer.output)
        if shape is None or len(shape) < 2:
            return False
        sides = shape[2:] if isinstance(layer, Conv) else shape[1:-1]
        return all(side == 1 for side in sides)

    def attention(self) -> tuple[str, ...]:
        """Names of the Softmax nodes whose result is multiplied with another computed tensor."""
        return tuple(
            node.name
            for node in self.nodes.values()
            if node.op_type == "Softmax"
            and any(
                reader.op_type == "MatMul" and len(self.data_inputs(reader)) == 2
                for reader in self._readers_behind_shapes(node.output[0])
            )
        )

    def _readers_behind_shapes(self, tensor: str) -> list[onnx.NodeProto]:
        """The nodes that read ``tensor``, or what only moves its values."""
        found = []
        for node in self.consumers(tensor):
            if node.op_type in RANGE_PRESERVING_OPS and node.op_type != "MaxPool":
                for output in node.output:
                    found += self._readers_behind_shapes(output)
            else:
                found.append(node)
        return found

    def preprocessing(self) -> Preprocessing:
        """The nodes between the uint8 image and the first layer.

        Raises ExportError unless they are Cast, Transpose(0, 3, 1, 2), Mul and Add by scalars.
        """
        image, tensor, names = self._image(), "", []
        tensor = image
        scale, bias = 1.0, 0.0
        for op in ("Cast", "Transpose", "Mul", "Add"):
            # The batch size may be read from the image as well.
            readers = [node for node in self.consumers(tensor) if node.op_type != "Shape"]
            if len(readers) != 1 or readers[0].op_type != op:
                if op == "Add":  # a mean of 0 needs none
                    break
                got = ", ".join(node.op_type for node in readers) or "nothing"
                raise ExportError(
                    f"expected the graph to begin with Cast, Transpose, Mul and Add, but {op} is "
                    f"missing: {tensor!r} goes to {got}; export the model with `python -m export`"
                )
            node = readers[0]
            if op == "Transpose" and list(attributes(node).get("perm", [])) != [0, 3, 1, 2]:
                raise ExportError(f"node {node.name!r}: expected Transpose with perm 0, 3, 1, 2")
            if op in ("Mul", "Add"):
                factor = self._scalar(node, tensor)
                if factor is None and op == "Add":  # not a constant: the first residual
                    break
                if factor is None:
                    raise ExportError(
                        f"node {node.name!r}: expected one scalar for all channels; "
                        "INT8 takes the raw byte as the quantized value"
                    )
                scale, bias = (factor, bias) if op == "Mul" else (scale, factor)
            names.append(node.name)
            tensor = node.output[0]
        mean = -bias / scale
        if abs(mean - round(mean)) > 1e-3 or not 0 <= round(mean) <= 255:
            raise ExportError(
                f"expected a mean that is a whole level in 0..255, the graph subtracts {mean:g}; "
                "set [input] mean to a whole number"
            )
        return Preprocessing(image, tensor, tuple(names), scale, round(mean))

    def _image(self) -> str:
        inputs = [i for i in self.model.graph.input if i.name not in self._initializers]
        if len(inputs) != 1 or inputs[0].type.tensor_type.elem_type != onnx.TensorProto.UINT8:
            got = ", ".join(i.name for i in inputs) or "none"
            raise ExportError(f"expected one uint8 input [N, H, W, C], the graph has {got}")
        return str(inputs[0].name)

    def _scalar(self, node: onnx.NodeProto, tensor: str) -> float | None:
        others = [self.constant(t) for t in node.input if t != tensor]
        if len(others) != 1 or others[0] is None or others[0].size != 1:
            return None
        return float(others[0].reshape(()))

    def observable(self) -> tuple[str, ...]:
        """Every tensor that either dialect may quantize.

        What a Relu or Clip at zero cuts off is left out: only the result is ever quantized.
        """
        wanted: dict[str, None] = {}
        layers = {layer.name: layer for layer in self.layers()}
        skipped = {*self.preprocessing().nodes, *(layer.bias_add for layer in layers.values())}
        before_layer = self._before_layer(layers)
        for node in self.model.graph.node:
            if node.name in layers:
                layer = layers[node.name]
                wanted[layer.input] = None
                if layer.output not in self.outputs:
                    wanted[self.behind(layer.output)] = None
            elif (
                node.name not in skipped
                and node.op_type in RANGE_PRESERVING_OPS | ARITHMETIC_OPS
                and before_layer.intersection(node.output)
            ):
                wanted.update(dict.fromkeys(self.data_inputs(node)))
                wanted.update((self.behind(tensor), None) for tensor in self.data_outputs(node))
        return tuple(wanted)

    def _before_layer(self, layers: Collection[str]) -> set[str]:
        """The tensors that some layer depends on."""
        result: set[str] = set()
        for node in reversed(self.model.graph.node):
            if node.name in layers or result.intersection(node.output):
                result.update(node.input)
        return result


def channel_axis(op_type: str) -> int:
    """The axis of channels in what a layer of this type reads and makes: Conv 1, others the last.

    Raises KeyError for what is no layer.
    """
    return _CHANNEL_AXES[op_type]


def check_input(graph: Graph, spec: InputSpec) -> None:
    """Raise ExportError unless the graph takes and normalises images as ``spec`` says."""
    preprocessing = graph.preprocessing()
    shape = (graph.shape(preprocessing.image) or ())[1:]
    if len(shape) != 3 or any(g not in (None, e) for g, e in zip(shape, spec.shape, strict=True)):
        raise ExportError(
            f"expected images {list(spec.shape)}, got {list(shape)} in the graph; "
            "export it again with this recipe"
        )
    expected, got = (spec.mean, 1.0 / spec.std), (preprocessing.mean, preprocessing.scale)
    if expected[0] != got[0] or abs(expected[1] - got[1]) > 1e-6 * expected[1]:
        raise ExportError(
            f"expected a graph with mean {spec.mean} and std {spec.std:g}, got mean {got[0]} and "
            f"std {1.0 / got[1]:g}; export it again with this recipe"
        )


def check_names(graph: Graph, names: Collection[str]) -> None:
    """Raise ExportError if ``names`` holds what is not a node of ``graph``."""
    for name in sorted(set(names) - set(graph.nodes)):
        close = difflib.get_close_matches(name, graph.nodes, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ExportError(f"float_nodes: the graph has no node {name!r}{hint}")


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The node's attributes by name."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _refuse(model: onnx.ModelProto) -> None:
    quantized = sorted({n.op_type for n in model.graph.node if n.op_type in QUANTIZED_OPS})
    quantized += sorted({n.op_type for n in model.graph.node if n.op_type.startswith("QLinear")})
    if quantized:
        raise ExportError(
            f"expected a float model, got one that is quantized already ({quantized[0]}); "
            "start from fp32.onnx"
        )
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ExportError(
                f"expected a single file, but {tensor.name!r} is external data; "
                "save the model with its weights inside"
            )
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < MIN_OPSET:
        raise ExportError(f"expected opset {MIN_OPSET} or newer, got {opset}; export with opset 20")
    for node in model.graph.node:
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            raise ExportError(f"node {node.name!r}: {node.op_type} branches cannot be quantized")
    _refuse_names(node.name for node in model.graph.node)


def _refuse_names(names: Iterable[str]) -> None:
    for name, times in collections.Counter(names).items():
        if not name or times > 1:
            found = f"{name!r} {times} times" if name else f"{times} without one"
            raise ExportError(f"expected every node to have a name of its own, got {found}")


def _infer(model: onnx.ModelProto) -> tuple[dict[str, tuple[int | None, ...]], frozenset[str]]:
    """Shapes, and which tensors are float32."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, tuple[int | None, ...]] = {}
    floats = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    for info in [*inferred.value_info, *inferred.input, *inferred.output]:
        tensor = info.type.tensor_type
        if tensor.elem_type == onnx.TensorProto.FLOAT:
            floats.add(info.name)
        if tensor.HasField("shape"):
            shapes[info.name] = tuple(
                d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim
            )
    return shapes, frozenset(floats)
