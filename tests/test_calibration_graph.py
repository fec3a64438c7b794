"""What the calibration room reads off a float graph, and the graphs that it refuses."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from calibration.graph import Graph, channel_axis, check_input, check_names
from runtime.errors import ExportError
from runtime.preprocess import InputSpec
from tests.calibration_graphs import SIZE, Network, small_cnn


@pytest.mark.parametrize(("mean", "std"), [(128, 128.0), (0, 255.0), (127, 50.0), (255, 1.0)])
def test_the_preprocessing_is_found_with_its_mean_and_scale(mean: int, std: float) -> None:
    graph = Graph(small_cnn(mean=mean, std=std))
    found = graph.preprocessing()
    assert (found.image, found.output, found.mean) == ("image", "normal", mean)
    assert found.scale == pytest.approx(1 / std)
    assert len(found.nodes) == 4
    size = (SIZE, SIZE)
    check_input(graph, InputSpec(size=size, channels=1, mean=mean, std=std))
    with pytest.raises(ExportError, match=f"expected a graph with mean {mean} and std 77"):
        check_input(graph, InputSpec(size=size, channels=1, mean=mean, std=77))


def test_the_batch_size_may_be_read_from_the_image() -> None:
    model = small_cnn()
    model.graph.node.insert(0, helper.make_node("Shape", ["image"], ["shape"], "Shape_image"))
    assert Graph(model).preprocessing().mean == 128


def test_a_mean_of_zero_needs_no_add() -> None:
    model = small_cnn()
    add = next(node for node in model.graph.node if node.op_type == "Add")
    reader = next(node for node in model.graph.node if "normal" in node.input)
    reader.input[0] = add.input[0]
    model.graph.node.remove(add)
    found = Graph(model).preprocessing()
    assert (found.mean, found.output) == (0, "scaled")


def test_only_what_is_quantized_is_observed() -> None:
    network = Network()
    before = network.conv(8)
    clipped = network.relu6()
    swish_input = network.conv(8)
    swish = network.activate("HardSwish")
    network.conv(8)
    observed = Graph(network.finish()).observable()
    assert before not in observed, "a Clip at zero cuts it off"
    assert {"normal", clipped, swish_input, swish, "features"} <= set(observed)
    assert not {"cast", "planes", "scaled", "logits"} & set(observed)


def test_linear_layers_are_found_with_their_axis_and_bias() -> None:
    network = Network()
    network.conv(8)
    network.node("Transpose", [network.tensor], network.next(), perm=[0, 2, 3, 1])
    network.matmul(24)
    network.matmul(8, bias=True)
    network.node("Transpose", [network.tensor], network.next(), perm=[0, 3, 1, 2])
    network.flatten()
    network.gemm(16)
    network.gemm(12, bias=False, transposed=False)
    graph = Graph(network.finish())
    conv, plain, biased, transposed, other, head = graph.layers()
    assert [layer.op_type for layer in (conv, plain, head)] == ["Conv", "MatMul", "Gemm"]
    assert [layer.axis for layer in (conv, plain, biased, transposed, other)] == [0, 1, 1, 0, 1]
    assert [layer.out_channels for layer in graph.layers()] == [8, 24, 8, 16, 12, 3]
    assert [layer.in_channels for layer in graph.layers()] == [1, 8, 24, 8, 16, 12]
    assert biased.rows.shape == (8, 24)
    assert [layer.bias is None for layer in (plain, other)] == [True, True]
    assert [layer.bias is None for layer in (biased, transposed)] == [False, False]
    assert graph.nodes[biased.bias_add].output == [biased.output]
    assert [found.name for found in graph.convs()] == [conv.name]
    assert [channel_axis(layer.op_type) for layer in (conv, plain, head)] == [1, -1, -1]
    shapes = [graph.shape(layer.output) for layer in graph.layers()]
    for layer, shape in zip(graph.layers(), shapes, strict=True):
        assert shape is not None
        assert shape[channel_axis(layer.op_type)] == layer.out_channels


@pytest.mark.parametrize(
    "damage",
    [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}],
)
def test_a_gemm_that_is_no_plain_layer_is_none(damage: dict[str, float]) -> None:
    model = small_cnn()
    (gemm,) = (node for node in model.graph.node if node.op_type == "Gemm")
    if damage:
        gemm.attribute.extend(helper.make_attribute(*item) for item in damage.items())
    assert Graph(model).layer(gemm) is None


def test_products_of_computed_matrices_are_no_layers_but_attention() -> None:
    network = Network()
    network.conv(8)
    network.attention()
    graph = Graph(network.finish())
    assert [layer.op_type for layer in graph.layers()] == ["Conv", *["MatMul"] * 3, "Gemm"]
    (name,) = graph.attention()
    assert graph.nodes[name].op_type == "Softmax"
    assert Graph(small_cnn()).attention() == ()


def _external(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL


def _quantized(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("QuantizeLinear", ["logits", "s"], ["q"], "q"))


def _old_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 12


def _nameless(model: onnx.ModelProto) -> None:
    model.graph.node[5].name = ""


def _same_name(model: onnx.ModelProto) -> None:
    model.graph.node[5].name = model.graph.node[6].name


def _branches(model: onnx.ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node[5].attribute.append(helper.make_attribute("then_branch", body))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_external, "external data; save the model with its weights inside"),
        (_quantized, r"quantized already \(QuantizeLinear\); start from fp32.onnx"),
        (_old_opset, "expected opset 13 or newer, got 12"),
        (_nameless, "name of its own, got 1 without one"),
        (_same_name, "2 times"),
        (_branches, "branches cannot be quantized"),
    ],
)
def test_graphs_that_cannot_be_quantized_are_refused(damage, message: str) -> None:  # type: ignore[no-untyped-def]
    model = small_cnn()
    damage(model)
    with pytest.raises(ExportError, match=message):
        Graph(model)


def _float_image(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def _no_transpose(model: onnx.ModelProto) -> None:
    model.graph.node[1].op_type = "Identity"


def _other_transpose(model: onnx.ModelProto) -> None:
    model.graph.node[1].attribute[0].ints[:] = [0, 3, 2, 1]


def _scale_per_channel(model: onnx.ModelProto) -> None:
    values = np.ones((1, 3, 1, 1), np.float32)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "factor"))


def _broken_mean(model: onnx.ModelProto) -> None:
    model.graph.initializer[1].CopyFrom(
        numpy_helper.from_array(np.array(-0.97, np.float32), "shift")
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_float_image, "expected one uint8 input"),
        (_no_transpose, "Transpose is missing: 'cast' goes to Identity"),
        (_other_transpose, "expected Transpose with perm 0, 3, 1, 2"),
        (_scale_per_channel, "expected one scalar for all channels"),
        (_broken_mean, "whole level in 0..255, the graph subtracts 124.16"),
    ],
)
def test_other_preprocessing_is_refused(damage, message: str) -> None:  # type: ignore[no-untyped-def]
    model = small_cnn()
    damage(model)
    with pytest.raises(ExportError, match=message):
        Graph(model).preprocessing()


def test_a_wrong_node_name_is_answered_with_the_nearest() -> None:
    graph = Graph(small_cnn())
    with pytest.raises(ExportError, match=r"no node 'Conv_t44'; did you mean 'Conv_t4'\?"):
        check_names(graph, ["Conv_t44"])
