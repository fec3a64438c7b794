"""A typed FP16 graph from an FP32 one: it computes in half, its inputs and outputs do not change.

TensorRT 11 has no FP16 flag: the types in the file are what runs. It does not know a model or a
precision ladder; it works on any graph of standard operators, plain or with Q/DQ.

What stays float32, and why:

* the normalisation right after the uint8 input. In half it costs 9 dB of SQNR on real cells,
  because the first BatchNorm amplifies small differences between channels;
* nodes named in ``keep_float32``, and operators that ONNX does not define for float16;
* ``roi`` and ``scales`` of Resize, which TensorRT reads at build time.

A Q/DQ scale never becomes zero: dead channels of real models have scales below half's smallest
number, and a division by zero would turn them into NaN.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from runtime.errors import ExportError

FLOAT16_MAX = 65504.0
FLOAT16_TINY = 6e-8
"""Rounds to 2**-24, the smallest positive half."""

_NORMALISATION = {"Cast", "Transpose", "Mul", "Add", "Sub", "Div"}
_QDQ = {"QuantizeLinear", "DequantizeLinear"}


class Overflow(NamedTuple):
    """A weight or an activation that half cannot hold."""

    tensor: str
    largest: float
    """Largest magnitude of its elements."""

    def __str__(self) -> str:
        return f"{self.tensor} reaches {self.largest:g}, half ends at {FLOAT16_MAX:g}"


def to_float16(model: onnx.ModelProto, keep_float32: Collection[str] = ()) -> onnx.ModelProto:
    """A copy of ``model`` that computes in float16, with the same inputs and outputs.

    ``keep_float32`` are names of nodes that stay as they are. Weights beyond ±65504 are clipped
    there (see overflows), Q/DQ scales are at least 2**-24.

    Raises ExportError for a name that no node has, for control flow, for Q/DQ below opset 19, and
    if the result is not a valid graph.
    """
    model = _constants_as_initializers(model)
    keep = set(keep_float32)
    unknown = keep - {node.name for node in model.graph.node}
    if unknown:
        raise ExportError(f"float16: no node is called {', '.join(sorted(unknown))}")
    try:
        converted = _Conversion(model, keep).run()
        onnx.checker.check_model(converted, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"float16: the graph is not valid: {error}") from error
    return converted


def overflows(model: onnx.ModelProto) -> list[Overflow]:
    """Float32 initializers with elements beyond ±65504, which to_float16 would clip.

    Bounds of Clip do not count: a bound that half cannot reach stays without effect.
    """
    bounds = {name for n in model.graph.node if n.op_type == "Clip" for name in n.input[1:]}
    result = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in bounds:
            largest = float(np.max(np.abs(numpy_helper.to_array(tensor)), initial=0.0))
            if not largest <= FLOAT16_MAX:  # NaN counts too
                result.append(Overflow(tensor.name, largest))
    return result


def activation_overflows(ranges: Mapping[str, tuple[float, float]]) -> list[Overflow]:
    """Activations beyond ±65504, by the smallest and largest value that each was seen to hold.

    What does not fit becomes infinite, and soon NaN. A CPU does not show it: onnxruntime computes
    neighbouring float16 operators in float32 and rounds only where they end, so that a graph can
    be right there and broken on a GPU. So ask before judging by answers.
    """
    return [
        Overflow(name, max(abs(low), abs(high)))
        for name, (low, high) in ranges.items()
        if not max(abs(low), abs(high)) <= FLOAT16_MAX  # NaN counts too
    ]


def activation_ranges(
    model: onnx.ModelProto, images: npt.NDArray[np.uint8]
) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of every float32 activation of ``model``, in the nodes' order.

    ``images`` uint8 ``[N, H, W, C]`` run one at a time, so that memory holds the activations of
    one. NaN where a tensor holds one.
    """
    ranges: dict[str, tuple[float, float]] = {}
    for values in _activations(model, images, TensorProto.FLOAT):
        for name, value in values.items():
            low, high = ranges.get(name, (np.inf, -np.inf))
            ranges[name] = float(np.minimum(low, value.min())), float(np.maximum(high, value.max()))
    return ranges


def first_not_finite(model: onnx.ModelProto, images: npt.NDArray[np.uint8]) -> str:
    """The first activation of ``model`` that is infinite or NaN, in words; empty if none is.

    First by the order of nodes, on the first of ``images`` uint8 ``[N, H, W, C]`` that has one.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    for values in _activations(model, images, TensorProto.FLOAT, TensorProto.FLOAT16):
        for name, value in values.items():
            if not np.isfinite(value).all():
                word = "NaN" if np.isnan(value).any() else "infinite"
                node = makers[name]
                return f"{name} is {word} first, the output of {node.op_type} {node.name}"
    return ""


def _activations(
    model: onnx.ModelProto, images: npt.NDArray[np.uint8], *types: int
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Of each image every activation of these element types, in the nodes' order."""
    known = _element_types(model)
    names = [n for node in model.graph.node for n in node.output if n and known[n] in types]
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    watched.graph.output.extend(helper.make_tensor_value_info(n, known[n], None) for n in names)
    options = onnxruntime.SessionOptions()
    # Every tensor as the graph says it: nothing fused, nothing kept in float32 between nodes.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (source,) = session.get_inputs()
    for index in range(len(images)):
        feed = {source.name: np.ascontiguousarray(images[index : index + 1])}
        yield dict(zip(names, session.run(names, feed), strict=True))


def normalisation_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The chain of Cast, Transpose, Mul and Add right after the first input."""
    reached = {model.graph.input[0].name}
    nodes = []
    for node in model.graph.node:
        if node.op_type in _NORMALISATION and reached & set(node.input):
            reached |= set(node.output)
            nodes.append(node)
    return nodes


class _Conversion:
    """One walk over the nodes; knows under which name each tensor exists in which type."""

    def __init__(self, model: onnx.ModelProto, keep: set[str]) -> None:
        self.model = model
        self.keep = keep
        self.opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        self.types = _element_types(model)
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = [value.name for value in model.graph.output]
        self.half: dict[str, str] = {}
        self.single: dict[str, str] = {name: name for name in self.initializers}
        self.single |= {value.name: value.name for value in model.graph.input}
        self.nodes: list[onnx.NodeProto] = []

    def run(self) -> onnx.ModelProto:
        normalisation = {node.output[0] for node in normalisation_nodes(self.model)}
        for node in self.model.graph.node:
            self._refuse(node)
            kept = node.output[0] in normalisation or node.name in self.keep
            if kept or self._only_single(node):
                self._emit_single(node)
            else:
                self._emit_half(node)
        for name in self.outputs:
            if name in self.half and name not in self.single:
                self._cast(self.half[name], name, TensorProto.FLOAT)
        return self._assemble()

    def _refuse(self, node: onnx.NodeProto) -> None:
        if any(a.type in (a.GRAPH, a.GRAPHS) for a in node.attribute):
            raise ExportError(
                f"float16: expected a plain graph, got control flow in {node.op_type} "
                f"{node.name}; export the model without it"
            )
        if node.op_type in _QDQ and self.opset < 19:
            raise ExportError(
                f"float16: Q/DQ with half scales needs opset 19, got {self.opset}; export the "
                "model with opset 20"
            )

    def _only_single(self, node: onnx.NodeProto) -> bool:
        """Whether ONNX or the node's own attributes leave it no choice but float32."""
        if node.op_type == "Cast":
            return False
        if not onnx.defs.has(node.op_type, self.opset, node.domain):
            return True
        if any(map(self._is_float, node.output)) and not any(map(self._is_float, node.input)):
            return True  # an attribute says the type, as in ConstantOfShape
        schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
        parameters = [*zip(node.input, _spread(schema.inputs), strict=False)]
        parameters += [*zip(node.output, _spread(schema.outputs), strict=False)]
        return any(
            self._is_float(name) and "tensor(float16)" not in formal.types
            for name, formal in parameters
            if formal.type_str != "tensor(float)"
        )

    def _emit_single(self, node: onnx.NodeProto) -> None:
        copy = _copy(node)
        for index, name in enumerate(node.input):
            if self._is_float(name):
                copy.input[index] = self._as_single(name)
        self.single |= {name: name for name in node.output}
        self.nodes.append(copy)

    def _emit_half(self, node: onnx.NodeProto) -> None:
        copy = _copy(node)
        schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
        for index, (name, formal) in enumerate(
            zip(node.input, _spread(schema.inputs), strict=False)
        ):
            if not self._is_float(name):
                continue
            if formal.type_str == "tensor(float)" or (node.op_type == "Resize" and index in (1, 2)):
                copy.input[index] = self._as_single(name)
            elif node.op_type in _QDQ and index == 1:
                copy.input[index] = self._as_scale(name)
            else:
                copy.input[index] = self._as_half(name)
        for index, name in enumerate(node.output):
            if self._is_float(name):
                copy.output[index] = f"{name}_float16" if name in self.outputs else name
                self.half[name] = copy.output[index]
            else:
                self.single[name] = name
        if node.op_type == "Cast" and self._is_float(node.output[0]):
            del copy.attribute[:]
            copy.attribute.append(helper.make_attribute("to", TensorProto.FLOAT16))
        self.nodes.append(copy)

    def _as_half(self, name: str) -> str:
        if name not in self.half:
            self.half[name] = f"{name}_float16"
            if name in self.initializers:
                self._half_initializer(name, self.half[name], smallest=0.0)
            else:
                self._cast(self.single[name], self.half[name], TensorProto.FLOAT16)
        return self.half[name]

    def _as_scale(self, name: str) -> str:
        if name not in self.initializers:
            return self._as_half(name)
        scale = f"{name}_float16_scale"
        if scale not in self.initializers:
            self._half_initializer(name, scale, smallest=FLOAT16_TINY)
        return scale

    def _as_single(self, name: str) -> str:
        if name not in self.single:
            # An output's own name is free until now: the cast that it needs anyway takes it.
            self.single[name] = name if name in self.outputs else f"{name}_float32"
            self._cast(self.half[name], self.single[name], TensorProto.FLOAT)
        return self.single[name]

    def _half_initializer(self, name: str, new: str, *, smallest: float) -> None:
        values = numpy_helper.to_array(self.initializers[name])
        self.initializers[new] = numpy_helper.from_array(_half(values, smallest), new)

    def _cast(self, source: str, target: str, to: int) -> None:
        self.nodes.append(helper.make_node("Cast", [source], [target], f"{target}_cast", to=to))

    def _is_float(self, name: str) -> bool:
        return bool(name) and self.types.get(name) == TensorProto.FLOAT

    def _assemble(self) -> onnx.ModelProto:
        result = onnx.ModelProto()
        result.CopyFrom(self.model)
        graph = result.graph
        used = {name for node in self.nodes for name in node.input}
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(t for name, t in self.initializers.items() if name in used)
        return result


def _half(values: npt.NDArray[np.float32], smallest: float) -> npt.NDArray[np.float16]:
    clipped = np.clip(values, -FLOAT16_MAX, FLOAT16_MAX)
    if smallest:
        clipped = np.maximum(clipped, np.float32(smallest))
    return clipped.astype(np.float16)


def _constants_as_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` in which every Constant node is an initializer: one rule for both."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    nodes = []
    for node in result.graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            tensor = result.graph.initializer.add()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
        else:
            nodes.append(_copy(node))
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def _element_types(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        types[value.name] = value.type.tensor_type.elem_type
    untyped = {name for n in graph.node for name in n.output if name and not types.get(name)}
    if untyped:
        raise ExportError(
            f"float16: the types of {', '.join(sorted(untyped))} are unknown; use operators that "
            "ONNX defines"
        )
    return types


def _spread(parameters: Iterable[Any]) -> Iterator[Any]:
    """The formal parameters, the last one again and again if it is variadic."""
    for formal in parameters:
        yield formal
        while formal.option == onnx.defs.OpSchema.FormalParameterOption.Variadic:
            yield formal


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy
