"""Write ``int8.onnx``: explicit Quantize-Dequantize nodes where NVIDIA's placement rules want them.

It does not know how ranges were measured, and onnxruntime runs what it writes correctly but slowly
(that is what the other dialect is for). The rules, as TensorRT's guide "Working with Quantized
Types" and ModelOpt's source have them:

- int8, symmetric, zero point 0; weights per output channel; the bias stays float.
- Quantize what goes *into* a convolution or matrix product, never what comes out; nothing between
  a convolution and its activation. Quantize the input of a MaxPool that feeds a convolution.
- Of a residual Add quantize only the shortcut, so that Conv + Add + activation is one kernel.
- Leave float what gains nothing: narrow layers, matrix-vector products such as the classifier,
  normalisation and softmax, attention.
"""

from collections.abc import Collection, Mapping

import onnx

from calibration.graph import (
    ATTENTION,
    LINEAR_OPS,
    Conv,
    Graph,
    Layer,
    Preprocessing,
    check_names,
)
from calibration.quantize import (
    NOT_TUNED,
    Emitted,
    Scale,
    Tuned,
    Writer,
    symmetric,
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
    """``graph`` with the layers that TensorRT should run in INT8 quantized.

    ``float_nodes`` names nodes that stay float; ``correct_bias`` takes the mean effect of rounding
    the weights back out of the biases, where ``tuned`` does not say better. ``graph`` is not
    changed.

    Raises ExportError if the graph is not what export writes, or the table is another graph's.
    """
    index = Graph(graph)
    check_names(index, float_nodes)
    table.check_graph(graph)
    first = index.preprocessing()
    layers, kept_float = choose(index, first, float_nodes)
    pools = _pools(index, layers, float_nodes)
    shortcuts = _shortcuts(index, layers, float_nodes)
    read_quantized: dict[str, set[str]] = {}
    for name, tensor in [
        *((layer.name, layer.input) for layer in layers.values()),
        *pools.items(),
        *shortcuts.items(),
    ]:
        read_quantized.setdefault(name, set()).add(tensor)

    writer = Writer(index)
    dequantized: dict[str, str] = {}
    vanished = {layer.bias_add for layer in layers.values()}
    for node in graph.graph.node:
        if node.name in vanished:
            continue
        wanted = read_quantized.get(node.name, set())
        for tensor in node.input:
            if tensor in wanted and tensor not in dequantized:
                scale = _scale(index, first, table, tensor, pools)
                quantized = writer.quantize(tensor, scale)
                dequantized[tensor] = writer.dequantize(quantized, scale, f"{tensor}_dequantized")
        inputs = [dequantized[t] if t in wanted else t for t in node.input]
        if node.name not in layers:
            writer.copy(node, inputs)
            continue
        layer = layers[node.name]
        means = table.channel_means(layer.input) if correct_bias else None
        scales = tuned.scales_of(layer)
        weight = tuned.weight_of(layer, scales)
        inputs[1] = writer.constant_dequantize(node.input[1], weight, scales, layer.axis)
        bias = tuned.bias_of(layer, weight, scales, means)
        constant = None if bias is None else writer.constant(f"{node.name}_bias", bias)
        writer.layer(node, layer, inputs[:2], constant, layer.output)
    return Emitted(writer.model(), tuple(layers), kept_float)


def choose(
    graph: Graph, first: Preprocessing, float_nodes: Collection[str] = ()
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers to quantize, by name, and the reason for every one that stays float."""
    layers: dict[str, Layer] = {}
    kept_float: dict[str, str] = {}
    attention = bool(graph.attention())
    for node in graph.nodes.values():
        if node.name in float_nodes:
            kept_float[node.name] = "asked for by float_nodes"
            continue
        if node.op_type not in LINEAR_OPS:
            continue
        layer = graph.layer(node)
        if attention:
            kept_float[node.name] = ATTENTION
        elif layer is None:
            kept_float[node.name] = f"{node.op_type}: its weights are not a plain constant"
        elif reason := _no_gain(graph, layer, stem=layer.input == first.output):
            kept_float[node.name] = reason
        else:
            layers[node.name] = layer
    return layers, kept_float


def _no_gain(graph: Graph, layer: Layer, *, stem: bool) -> str:
    """Why ``layer`` is not worth quantizing; empty if it is."""
    if graph.one_pixel(layer):
        return "one output pixel: a matrix-vector product"
    outputs = layer.out_channels
    if isinstance(layer, Conv) and layer.depthwise:
        if outputs % 8 or min(layer.kernel) < 3:
            size = "x".join(str(side) for side in layer.kernel)
            return f"depthwise {size} with {outputs} channels; INT8 wants 3x3 and multiples of 8"
        return ""
    if stem:
        return f"{outputs} output channels; INT8 wants multiples of 8" if outputs % 8 else ""
    narrow = min(layer.in_channels, outputs) // layer.groups
    if narrow < MIN_CHANNELS:
        return f"{narrow} channels per group; INT8 wants {MIN_CHANNELS} or more"
    return ""


def _pools(
    graph: Graph, layers: Mapping[str, Layer], float_nodes: Collection[str]
) -> dict[str, str]:
    """MaxPool nodes that feed a quantized layer, with the tensor they read."""
    inputs = {layer.input for layer in layers.values()}
    return {
        node.name: node.input[0]
        for node in graph.nodes.values()
        if node.op_type == "MaxPool" and node.name not in float_nodes and node.output[0] in inputs
    }


def _shortcuts(
    graph: Graph, layers: Mapping[str, Layer], float_nodes: Collection[str]
) -> dict[str, str]:
    """Residual Add nodes, with the input that is quantized: the one that is not fused.

    Fused is a quantized layer that feeds only the Add; of two the later in the graph.
    """
    order = {layer.output: position for position, layer in enumerate(layers.values())}
    result = {}
    for node in graph.nodes.values():
        inputs = graph.data_inputs(node)
        if node.op_type != "Add" or len(set(inputs)) != 2 or node.name in float_nodes:
            continue
        branches = {}
        for tensor in inputs:
            alone = len(graph.consumers(tensor)) == 1 and tensor not in graph.outputs
            if tensor in order and alone:
                branches[order[tensor]] = tensor
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
