"""Write ``int8.onnx``: explicit Quantize-Dequantize nodes where NVIDIA's placement rules want them.

It does not know how ranges were measured, and onnxruntime runs what it writes correctly but slowly
(that is what the other dialect is for). The rules, as TensorRT's guide "Working with Quantized
Types" and ModelOpt's source have them:

- int8, symmetric, zero point 0; weights per output channel; the bias stays float.
- Quantize what goes *into* a convolution, never what comes out; nothing between a convolution and
  its activation. Quantize the input of a MaxPool that feeds a convolution.
- Of a residual Add quantize only the shortcut, so that Conv + Add + activation is one kernel.
- Leave float what gains nothing: narrow convolutions, matrix-vector products, the classifier.
"""

from collections.abc import Collection, Mapping

import onnx

from calibration.graph import LINEAR_OPS, Conv, Graph, Preprocessing, check_names
from calibration.quantize import (
    NOT_TUNED,
    Emitted,
    Scale,
    Tuned,
    Writer,
    corrected_bias,
    quantize_weight,
    symmetric,
    weight_scales,
)
from calibration.table import Table

MIN_CHANNELS = 16
"""INT8 tensor cores read channels in groups; below this a float kernel is as fast."""


def emit(
    graph: onnx.ModelProto,
    table: Table,
    *,
    float_nodes: Collection[str] = (),
    correct_bias: bool = True,
    tuned: Tuned = NOT_TUNED,
) -> Emitted:
    """``graph`` with the convolutions that TensorRT should run in INT8 quantized.

    ``float_nodes`` names nodes that stay float; ``correct_bias`` takes the mean effect of rounding
    the weights back out of the biases, where ``tuned`` does not say better. ``graph`` is not
    changed.

    Raises ExportError if the graph is not what export writes, or the table is another graph's.
    """
    index = Graph(graph)
    check_names(index, float_nodes)
    table.check_graph(graph)
    first = index.preprocessing()
    convs, kept_float = choose(index, first, float_nodes)
    pools = _pools(index, convs, float_nodes)
    shortcuts = _shortcuts(index, convs, float_nodes)
    read_quantized: dict[str, set[str]] = {}
    for name, tensor in [
        *((conv.name, conv.input) for conv in convs.values()),
        *pools.items(),
        *shortcuts.items(),
    ]:
        read_quantized.setdefault(name, set()).add(tensor)

    writer = Writer(index)
    dequantized: dict[str, str] = {}
    for node in graph.graph.node:
        wanted = read_quantized.get(node.name, set())
        for tensor in node.input:
            if tensor in wanted and tensor not in dequantized:
                scale = _scale(index, first, table, tensor, pools)
                quantized = writer.quantize(tensor, scale)
                dequantized[tensor] = writer.dequantize(quantized, scale, f"{tensor}_dequantized")
        inputs = [dequantized[t] if t in wanted else t for t in node.input]
        if node.name in convs:
            conv = convs[node.name]
            scales = tuned.scales.get(conv.name, weight_scales(conv.weight))
            weight = tuned.weights.get(conv.name, quantize_weight(conv.weight, scales))
            inputs[1] = writer.constant_dequantize(node.input[1], weight, scales)
            if conv.name in tuned.biases:
                inputs[2:] = [writer.constant(f"{node.name}_bias", tuned.biases[conv.name])]
            elif correct_bias:
                bias = corrected_bias(conv, weight, scales, table.channel_means(conv.input))
                inputs[2:] = [writer.constant(f"{node.name}_bias", bias)]
        writer.copy(node, inputs)
    return Emitted(writer.model(), tuple(convs), kept_float)


def choose(
    graph: Graph, first: Preprocessing, float_nodes: Collection[str] = ()
) -> tuple[dict[str, Conv], dict[str, str]]:
    """The convolutions to quantize, by name, and the reason for every layer that stays float."""
    convs: dict[str, Conv] = {}
    kept_float: dict[str, str] = {}
    for node in graph.nodes.values():
        if node.name in float_nodes:
            kept_float[node.name] = "asked for by float_nodes"
            continue
        if node.op_type not in LINEAR_OPS:
            continue
        conv = graph.conv(node)
        if node.op_type in ("Gemm", "MatMul"):
            kept_float[node.name] = f"{node.op_type}: only convolutions are quantized"
        elif conv is None:
            kept_float[node.name] = f"{node.op_type}: its weights are not a plain constant"
        elif reason := _no_gain(graph, conv, stem=conv.input == first.output):
            kept_float[node.name] = reason
        else:
            convs[node.name] = conv
    return convs, kept_float


def _no_gain(graph: Graph, conv: Conv, *, stem: bool) -> str:
    """Why ``conv`` is not worth quantizing; empty if it is."""
    if graph.one_pixel(conv):
        return "one output pixel: a matrix-vector product"
    outputs = conv.out_channels
    if conv.depthwise:
        if outputs % 8 or min(conv.kernel) < 3:
            size = "x".join(str(side) for side in conv.kernel)
            return f"depthwise {size} with {outputs} channels; INT8 wants 3x3 and multiples of 8"
        return ""
    if stem:
        return f"{outputs} output channels; INT8 wants multiples of 8" if outputs % 8 else ""
    narrow = min(conv.weight.shape[1], outputs // conv.groups)
    if narrow < MIN_CHANNELS:
        return f"{narrow} channels per group; INT8 wants {MIN_CHANNELS} or more"
    return ""


def _pools(graph: Graph, convs: Mapping[str, Conv], float_nodes: Collection[str]) -> dict[str, str]:
    """MaxPool nodes that feed a quantized convolution, with the tensor they read."""
    inputs = {conv.input for conv in convs.values()}
    return {
        node.name: node.input[0]
        for node in graph.nodes.values()
        if node.op_type == "MaxPool" and node.name not in float_nodes and node.output[0] in inputs
    }


def _shortcuts(
    graph: Graph, convs: Mapping[str, Conv], float_nodes: Collection[str]
) -> dict[str, str]:
    """Residual Add nodes, with the input that is quantized: the one that is not fused.

    Fused is a quantized convolution that feeds only the Add; of two the later in the graph.
    """
    order = {name: position for position, name in enumerate(graph.nodes)}
    result = {}
    for node in graph.nodes.values():
        inputs = graph.data_inputs(node)
        if node.op_type != "Add" or len(set(inputs)) != 2 or node.name in float_nodes:
            continue
        branches = {}
        for tensor in inputs:
            producer = graph.producer(tensor)
            alone = len(graph.consumers(tensor)) == 1 and tensor not in graph.outputs
            if producer is not None and producer.name in convs and alone:
                branches[order[producer.name]] = tensor
        if branches:
            fused = branches[max(branches)]
            result[node.name] = next(tensor for tensor in inputs if tensor != fused)
    return result


def _scale(
    graph: Graph, first: Preprocessing, table: Table, tensor: str, pools: Mapping[str, str]
) -> Scale:
    if tensor == first.output:
        # Known without looking. With mean 128 one step is one level: the byte is exact.
        steps = max(first.mean / 128, (255 - first.mean) / 127, 1.0)
        return symmetric(0.0, 127 * steps * first.scale)
    producer = graph.producer(tensor)
    if producer is not None and producer.name in pools:
        tensor = pools[producer.name]  # a maximum of quantized values needs no new scale
    return symmetric(*table.range(tensor))
