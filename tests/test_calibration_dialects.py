"""Both INT8 forms: placed by their rules, exact in their arithmetic, true to the float graph."""

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from calibration import onnxruntime_dialect, tensorrt_dialect
from calibration.graph import ATTENTION, Conv, Graph, Layer
from calibration.kernels import check_kernels, count_kernels, optimized
from calibration.quantize import (
    LARGEST_BIAS,
    Emitted,
    Scale,
    Tuned,
    asymmetric,
    corrected_bias,
    quantize_bias,
    quantize_weight,
    room_for_bias,
    symmetric,
    weight_scales,
)
from calibration.table import Table
from runtime.errors import ExportError
from runtime.metrics import sqnr_db
from runtime.preprocess import UInt8
from tests.calibration_graphs import SIZE, Network, draw_images, make_table, small_cnn

Emit = Callable[..., Emitted]
BOTH = pytest.mark.parametrize(
    "emit",
    [
        pytest.param(tensorrt_dialect.emit, id="tensorrt"),
        pytest.param(onnxruntime_dialect.emit, id="onnxruntime"),
    ],
)


def run(
    model: onnx.ModelProto, images: UInt8, *, fused: bool = True, tensor: str = "features"
) -> npt.NDArray[Any]:
    """One tensor of ``model``; ``fused=False`` computes each Q/DQ node by itself."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    if tensor not in {output.name for output in opened.graph.output}:
        opened.graph.output.append(onnx.ValueInfoProto(name=tensor))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(opened.SerializeToString(), options)
    return np.asarray(session.run([tensor], {"image": images})[0])


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {tensor: node for node in model.graph.node for tensor in node.output}


def initializer(model: onnx.ModelProto, name: str) -> npt.NDArray[Any]:
    return next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name)


def family(name: str) -> onnx.ModelProto:
    """Small relatives of the networks that must pass."""
    if name == "everything":
        return small_cnn()
    network = Network(channels=3)
    network.conv(16, stride=2)
    if name == "resnet":
        network.activate("Relu")
        network.max_pool()
        before = network.tensor
        network.conv(16)
        network.activate("Relu")
        network.conv(16)
        network.node("Add", [network.tensor, before], network.next())
        before = network.activate("Relu")
        shortcut = network.conv(32, kernel=1, stride=2)
        network.tensor, network.channels = before, 16
        network.conv(32, stride=2)
        network.activate("Relu")
        network.conv(32)
        network.node("Add", [network.tensor, shortcut], network.next())
        network.activate("Relu")
        network.conv(32)
        network.activate("Relu")
    if name == "mobilenetv3":
        network.activate("HardSwish")
        network.squeeze_excite("HardSigmoid")
        network.conv(24, kernel=1, bias=False)
        network.depthwise()
        network.activate("HardSwish")
        network.conv(16, kernel=1)
        network.activate("LeakyRelu")
    if name == "shufflenet":
        network.activate("Relu")
        network.shuffle()
        network.conv(32, groups=2)
        network.activate("Relu")
        network.shuffle()
        network.conv(32, kernel=1)
        network.activate("Silu")
    if name == "convnext":
        network.transformer_block()
        network.transformer_block(bias=True)
        network.conv(32, kernel=1)
        network.activate("Gelu")
    if name == "mlp":
        network.activate("Relu")
        network.node("Transpose", [network.tensor], network.next(), perm=[0, 2, 3, 1])
        network.matmul(32)
        network.matmul(16, bias=True)
        network.activate("Relu")
        network.node("Transpose", [network.tensor], network.next(), perm=[0, 3, 1, 2])
        network.conv(32, kernel=1)
        network.activate("Relu")
        network.flatten()
        network.gemm(48)
        network.activate("Relu")
        network.gemm(32, bias=False, transposed=False)
        network.activate("Clip")
        network.matmul(40, bias=True)
        network.activate("Relu")
        network.matmul(24)
    return network.finish()


FAMILIES = ["everything", "resnet", "mobilenetv3", "shufflenet", "convnext", "mlp"]


def prepare(model: onnx.ModelProto) -> tuple[Table, UInt8]:
    """A table, and images that were not used for it."""
    channels = model.graph.input[0].type.tensor_type.shape.dim[3].dim_value
    table = make_table(model, draw_images(24, channels=channels))
    return table, draw_images(16, channels=channels, seed=99)


@BOTH
@pytest.mark.parametrize("name", FAMILIES)
def test_families_keep_their_meaning_and_their_contract(emit: Emit, name: str) -> None:
    model = family(name)
    before = model.SerializeToString(deterministic=True)
    table, images = prepare(model)
    emitted = emit(model, table)
    assert model.SerializeToString(deterministic=True) == before, "the input was changed"
    onnx.checker.check_model(emitted.model, full_check=True)
    assert emitted.model.graph.input == model.graph.input
    assert emitted.model.graph.output == model.graph.output
    assert emitted.model.metadata_props == model.metadata_props
    layers = {layer.name for layer in Graph(model).layers()}
    assert layers <= set(emitted.quantized) | set(emitted.kept_float)
    assert not set(emitted.quantized) & set(emitted.kept_float)
    assert emitted.quantized
    reference, least = run(model, images), 20 if name == "mlp" else 25
    assert sqnr_db(reference, run(emitted.model, images)) > least
    assert sqnr_db(reference, run(emitted.model, images, fused=False)) > least
    one = run(emitted.model, images[:1])
    np.testing.assert_allclose(one, run(emitted.model, images)[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_is_one_integer_kernel_on_onnxruntime(name: str, classifier: bool) -> None:
    model = family(name)
    emitted = onnxruntime_dialect.emit(model, prepare(model)[0], classifier=classifier)
    layers = Graph(model).layers()
    assert len(emitted.quantized) == len(layers) - (not classifier)
    counts = check_kernels(emitted)
    assert counts["QLinearConv"] == len(Graph(model).convs())
    assert not {"Conv", "FusedConv", "FusedGemm"} & set(counts)
    assert counts.get("Gemm", 0) == (not classifier)
    if name in ("convnext", "mlp"):  # the bias of a MatMul, LayerNorm and Gelu are float by nature
        return
    assert counts["DequantizeLinear"] <= 2, "only the last feature map is dequantized"
    assert counts.get("QuantizeLinear", 0) == classifier, "only the features are quantized again"
    assert not {"Cast", "HardSigmoid", "HardSwish", "Clip"} & set(counts)


def test_matrix_products_between_8_bit_layers_write_8_bit() -> None:
    model = family("mlp")
    emitted = onnxruntime_dialect.emit(model, prepare(model)[0], classifier=True)
    counts = check_kernels(emitted)
    assert counts["QLinearMatMul"] == 1
    assert counts["MatMulIntegerToFloat"] == 2, "one brings its bias in a float Add, one ends it"
    assert counts["QGemm"] == 4


@pytest.mark.parametrize("bias", [True, False])
def test_a_quantized_classifier_gives_float_logits(bias: bool) -> None:
    model = small_cnn()
    (gemm,) = (node for node in model.graph.node if node.op_type == "Gemm")
    if not bias:
        del gemm.input[2]
    table, images = prepare(model)
    emitted = onnxruntime_dialect.emit(model, table, classifier=True)
    assert emitted.quantized[-1] == gemm.name
    assert check_kernels(emitted)["QGemm"] == 1
    logits = run(emitted.model, images, tensor="logits")
    assert logits.dtype == np.float32
    assert sqnr_db(run(model, images, tensor="logits"), logits) > 20
    plain = onnxruntime_dialect.emit(model, table)
    reason = "it makes an output of the model; quantized if asked for"
    assert plain.kept_float[gemm.name] == reason
    emitted = onnxruntime_dialect.emit(model, table, classifier=True, float_nodes=[gemm.name])
    assert emitted.kept_float[gemm.name] == "asked for by float_nodes"


@BOTH
def test_attention_models_stay_float_with_the_reason(emit: Emit) -> None:
    network = Network(channels=3)
    network.conv(16, stride=2)
    network.attention()
    model = network.finish()
    table, images = prepare(model)
    emitted = emit(model, table)
    assert emitted.quantized == ()
    assert set(emitted.kept_float.values()) <= {
        ATTENTION,
        "MatMul: its weights are not a plain constant",
        "it makes an output of the model; quantized if asked for",
    }
    assert ATTENTION in emitted.kept_float.values()
    np.testing.assert_allclose(run(emitted.model, images), run(model, images), atol=1e-4)


def test_the_last_residual_add_is_an_integer_kernel_too() -> None:
    network = Network()
    network.conv(16)
    network.activate("Relu")
    network.residual()
    network.activate("Relu")
    model = network.finish()
    emitted = onnxruntime_dialect.emit(model, prepare(model)[0])
    counts = check_kernels(emitted)
    assert counts["QLinearAdd"] == counts["DequantizeLinear"] == 1
    assert not {"Add", "Relu"} & set(counts)


def test_a_conv_that_is_not_fused_is_named() -> None:
    model = small_cnn()
    emitted = onnxruntime_dialect.emit(model, prepare(model)[0])
    broken = onnx.ModelProto()
    broken.CopyFrom(emitted.model)
    conv = next(node for node in broken.graph.node if node.name == emitted.quantized[3])
    quantize = next(node for node in broken.graph.node if conv.output[0] in node.input)
    between = onnx.helper.make_node("Abs", [conv.output[0]], ["between"], "Abs_between")
    quantize.input[0] = "between"
    broken.graph.node.insert(list(broken.graph.node).index(quantize), between)
    wrong = Emitted(broken, emitted.quantized, emitted.kept_float)
    with pytest.raises(ExportError, match=rf"expected 10 .* got 9; still float: {conv.name}"):
        check_kernels(wrong)
    assert count_kernels(broken)["QLinearConv"] == 9


def test_a_model_that_onnxruntime_refuses_is_an_export_error() -> None:
    model = small_cnn()
    model.graph.node[5].op_type = "NoSuchOperator"
    with pytest.raises(ExportError, match=r"onnxruntime refuses the model: .*NoSuchOperator"):
        count_kernels(model)


def test_tensorrt_nodes_follow_nvidias_rules() -> None:
    model = family("resnet")
    emitted = tensorrt_dialect.emit(model, prepare(model)[0])
    graph, made_by = emitted.model.graph, producers(emitted.model)
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            zero_point = initializer(emitted.model, node.input[2])
            assert zero_point.dtype == np.int8
            assert zero_point.item() == 0
            source = made_by[node.input[0]]
            assert source.op_type not in ("Conv", "Gemm") or "Conv" in source.name
        if node.op_type in ("Relu", "Clip"):
            assert made_by[node.input[0]].op_type in ("Conv", "Add"), "nothing before activations"
    for name in emitted.quantized:
        conv = next(node for node in graph.node if node.name == name)
        data, weight = (made_by[tensor] for tensor in conv.input[:2])
        assert data.op_type == weight.op_type == "DequantizeLinear"
        assert made_by[data.input[0]].op_type == "QuantizeLinear"
        stored = initializer(emitted.model, weight.input[0])
        assert stored.dtype == np.int8
        assert initializer(emitted.model, weight.input[1]).shape == stored.shape[:1]
        assert initializer(emitted.model, conv.input[2]).dtype == np.float32
    adds = [node for node in graph.node if node.op_type == "Add" and "normal" not in node.output]
    assert len(adds) == 2
    for add in adds:
        kinds = sorted(made_by[tensor].op_type for tensor in add.input)
        assert kinds == ["Conv", "DequantizeLinear"], "only the shortcut is quantized"
    (pool,) = (node for node in graph.node if node.op_type == "MaxPool")
    assert made_by[pool.input[0]].op_type == "DequantizeLinear"
    assert all(made_by[output.name].op_type in ("Flatten", "Gemm") for output in graph.output)
    (gemm,) = (node for node in graph.node if node.op_type == "Gemm")
    assert gemm.input[0] == "features"


def test_a_max_pool_has_one_scale_on_both_sides() -> None:
    model = family("resnet")
    table, _ = prepare(model)
    for emit in (tensorrt_dialect.emit, onnxruntime_dialect.emit):
        emitted = emit(model, table).model
        made_by = producers(emitted)
        (pool,) = (node for node in emitted.graph.node if node.op_type == "MaxPool")
        (after,) = (
            node
            for node in emitted.graph.node
            if node.op_type == "QuantizeLinear" and node.input[0] == pool.output[0]
        )
        before = made_by[made_by[pool.input[0]].input[0]]
        scales = [initializer(emitted, node.input[1]) for node in (before, after)]
        assert scales[0] == scales[1]


@BOTH
def test_a_relu_behind_a_max_pool_still_cuts_off_what_is_negative(emit: Emit) -> None:
    network = Network()
    network.conv(16)
    network.max_pool()
    network.activate("Relu")
    network.conv(16)
    model = network.finish()
    table, images = prepare(model)
    assert sqnr_db(run(model, images), run(emit(model, table).model, images)) > 25


def test_the_byte_is_the_first_quantized_value() -> None:
    model = small_cnn(mean=128, std=128.0)
    table, images = prepare(model)
    emitted = tensorrt_dialect.emit(model, table).model
    quantized = run(emitted, images, tensor="normal_quantized")
    planes = images.transpose(0, 3, 1, 2).astype(np.int32)
    np.testing.assert_array_equal(quantized, planes - 128)
    assert quantized.dtype == np.int8
    emitted = onnxruntime_dialect.emit(model, table).model
    folded = run(emitted, images, tensor="image_planes")
    assert folded.dtype == np.uint8
    for channel in range(4):  # every second byte of every second row
        expected = planes[:, 0, channel // 2 :: 2, channel % 2 :: 2]
        np.testing.assert_array_equal(folded[:, channel], expected)
    first = [node.op_type for node in emitted.graph.node[:5]]
    assert first == ["Reshape", "Transpose", "Reshape", "Transpose", "DequantizeLinear"]


@BOTH
@pytest.mark.parametrize(("mean", "std"), [(0, 255.0), (127, 64.0), (255, 100.0)])
def test_other_whole_means_work(emit: Emit, mean: int, std: float) -> None:
    model = small_cnn(mean=mean, std=std)
    table, images = prepare(model)
    emitted = emit(model, table)
    assert sqnr_db(run(model, images), run(emitted.model, images)) > 25


def one_conv(**options: Any) -> onnx.ModelProto:
    """Stem and one more convolution, so that the second one's integers can be followed."""
    network = Network(channels=1, seed=5)
    network.conv(16, stride=2)
    network.relu6()
    network.conv(24, **options)
    network.relu6()
    network.conv(8, kernel=1)
    return network.finish()


def test_onnxruntime_arithmetic_is_exact_integer_arithmetic() -> None:
    """The whole second layer in int64 NumPy from the stored integers, byte for byte."""
    model = one_conv(kernel=3)
    table, images = prepare(model)
    emitted = onnxruntime_dialect.emit(model, table)
    made_by = producers(emitted.model)
    conv = next(node for node in emitted.model.graph.node if node.name == emitted.quantized[1])
    (after,) = (
        node
        for node in emitted.model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] == conv.output[0]
    )
    data, weight, bias = (made_by[tensor] for tensor in conv.input)
    value = {
        name: [initializer(emitted.model, tensor) for tensor in node.input[1:]]
        for name, node in {"x": data, "w": weight, "b": bias, "y": after}.items()
    }
    w = initializer(emitted.model, weight.input[0]).astype(np.int64)
    b = initializer(emitted.model, bias.input[0]).astype(np.int64)
    np.testing.assert_array_equal(value["b"][0], value["x"][0] * value["w"][0])

    x = run(emitted.model, images, tensor=data.input[0]).astype(np.int64) - int(value["x"][1])
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    total = np.einsum("nchwij,ocij->nohw", windows, w) + b.reshape(1, -1, 1, 1)
    factor = (value["x"][0] * value["w"][0] / value["y"][0]).astype(np.float32)
    scaled = total.astype(np.float32) * factor.reshape(1, -1, 1, 1)
    expected = np.clip(np.rint(scaled) + int(value["y"][1]), 0, 255)
    got = run(emitted.model, images, tensor=after.output[0])
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", ["QLinearMatMul", "QGemm", "MatMulIntegerToFloat"])
def test_matrix_products_are_exact_integer_arithmetic(kind: str) -> None:
    """A layer in int64 NumPy from the stored integers, byte for byte where it writes bytes."""
    network = Network(channels=1, seed=5)
    network.conv(16, stride=2)
    network.relu6()
    if kind == "QGemm":
        network.flatten()
        network.gemm(24)
    else:
        network.node("Transpose", [network.tensor], network.next(), perm=[0, 2, 3, 1])
        network.matmul(24)
    network.activate("Relu" if kind != "MatMulIntegerToFloat" else "Gelu")
    if kind == "QGemm":
        network.gemm(16)
    else:
        network.matmul(16)
        network.node("Transpose", [network.tensor], network.next(), perm=[0, 3, 1, 2])
    model = network.finish()
    table, images = prepare(model)
    emitted = onnxruntime_dialect.emit(model, table)
    assert check_kernels(emitted)[kind]
    made_by = producers(emitted.model)
    layer = next(node for node in emitted.model.graph.node if node.name == emitted.quantized[1])
    data, weight, *bias = (made_by[tensor] for tensor in layer.input)
    x_scale, x_zero, w, w_scale = (
        initializer(emitted.model, tensor) for tensor in (*data.input[1:], *weight.input[:2])
    )
    w = w.astype(np.int64)
    x = run(emitted.model, images, tensor=data.input[0]).astype(np.int64) - int(x_zero)
    total = x @ (w.T if layer.op_type == "Gemm" else w)
    if bias:
        total += initializer(emitted.model, bias[0].input[0])
    if kind == "MatMulIntegerToFloat":
        got = run(emitted.model, images, tensor=layer.output[0])
        np.testing.assert_array_equal(got, total.astype(np.float32) * (x_scale * w_scale))
        return
    (after,) = (node for node in emitted.model.graph.node if node.input[0] == layer.output[0])
    y_scale, y_zero = (initializer(emitted.model, tensor) for tensor in after.input[1:])
    scaled = total.astype(np.float32) * (x_scale * w_scale / y_scale).astype(np.float32)
    expected = np.clip(np.rint(scaled) + int(y_zero), 0, 255)
    np.testing.assert_array_equal(run(emitted.model, images, tensor=after.output[0]), expected)


def quantized_back(layer: Layer, tuned: Tuned) -> npt.NDArray[np.float32]:
    """The tuned weights of ``layer`` in its own shape, as floats."""
    shape = [1] * layer.weight.ndim
    shape[layer.axis] = -1
    return (tuned.weights[layer.name] * tuned.scales[layer.name].reshape(shape)).astype(np.float32)


@BOTH
def test_layers_take_tuned_weights_in_their_own_shape(emit: Emit) -> None:
    """With scales twice as large and other biases it is the float graph with those."""
    model = family("mlp")
    table, images = prepare(model)
    plain = emit(model, table, correct_bias=False)
    layers = {layer.name: layer for layer in Graph(model).layers()}
    scales = {n: 2 * weight_scales(layers[n].weight, layers[n].axis) for n in plain.quantized}
    tuned = Tuned(
        scales=scales,
        weights={n: quantize_weight(layers[n].weight, scales[n], layers[n].axis) for n in scales},
        biases={n: b + np.float32(0.05) for n in scales if (b := layers[n].bias) is not None},
    )
    emitted = emit(model, table, tuned=tuned)
    assert emitted.quantized == plain.quantized
    stored = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in emitted.model.graph.initializer
    }
    for name in plain.quantized:
        integers = [v for v in stored.values() if np.array_equal(v, tuned.weights[name])]
        assert len(integers) == 1, name
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for node in changed.graph.node:
        layer = layers.get(node.name)
        if layer is None or layer.name not in scales:
            continue
        values = {node.input[1]: quantized_back(layer, tuned)}
        adder = next((n for n in changed.graph.node if n.name == layer.bias_add), node)
        for tensor_name in adder.input:
            if tensor_name.endswith("_bias"):
                values[tensor_name] = tuned.biases[layer.name]
        for tensor in changed.graph.initializer:
            if tensor.name in values:
                tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    got, least = run(emitted.model, images), sqnr_db(run(model, images), run(plain.model, images))
    assert sqnr_db(run(changed, images), got) > max(least - 6, sqnr_db(run(model, images), got) + 3)
    if emit is onnxruntime_dialect.emit:
        check_kernels(emitted)


def test_weights_scales_and_biases_match_their_formulas() -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(6, 4, 3, 3)).astype(np.float32)
    scales = weight_scales(weight)
    np.testing.assert_allclose(scales, np.abs(weight).max(axis=(1, 2, 3)) / 127, rtol=1e-6)
    quantized = quantize_weight(weight, scales)
    error = np.abs(quantized * scales.reshape(-1, 1, 1, 1) - weight)
    assert (error <= scales.reshape(-1, 1, 1, 1) * 0.5001).all()
    assert np.abs(quantized).max() == 127
    assert symmetric(-2.0, 1.0) == Scale(np.float32(2 / 127), np.int8(0))
    assert asymmetric(0.0, 6.0) == Scale(np.float32(6 / 255), np.uint8(0))
    assert asymmetric(-1.0, 3.0).zero_point == 64
    assert asymmetric(2.0, 4.0) == Scale(np.float32(4 / 255), np.uint8(0)), "0 stays exact"
    assert asymmetric(0.0, 0.0).scale == symmetric(0.0, 0.0).scale == 1.0


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_bias_correction_takes_out_the_mean_effect_of_rounding(groups: int) -> None:
    random = np.random.default_rng(groups)
    weight = random.normal(size=(8, 8 // groups, 1, 1)).astype(np.float32)
    bias = random.normal(size=8).astype(np.float32)
    conv = Conv("c", "x", "y", weight, bias, groups)
    scales = weight_scales(weight) * 8  # coarse, so that there is something to correct
    quantized = quantize_weight(weight, scales)
    x = random.uniform(0, 4, (1000, 8))

    def apply(w: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[Any]:
        parts = np.split(x, groups, axis=1)
        rows = np.split(w[:, :, 0, 0], groups)
        made = [part @ row.T for part, row in zip(parts, rows, strict=True)]
        return np.asarray(np.concatenate(made, axis=1) + b)

    rounded = quantized * scales.reshape(-1, 1, 1, 1)
    exact = apply(weight, bias).mean(axis=0)
    corrected = corrected_bias(conv, quantized, scales, x.mean(axis=0))
    np.testing.assert_allclose(apply(rounded, corrected).mean(axis=0), exact, atol=1e-5)
    assert np.abs(apply(rounded, bias).mean(axis=0) - exact).max() > 0.01


def test_bias_correction_can_be_left_out() -> None:
    model = small_cnn()
    table, images = prepare(model)
    for emit in (tensorrt_dialect.emit, onnxruntime_dialect.emit):
        plain = run(emit(model, table, correct_bias=False).model, images)
        assert not np.array_equal(plain, run(emit(model, table).model, images))
        assert sqnr_db(run(model, images), plain) > 20


def test_vanishing_weights_do_not_overflow_the_bias() -> None:
    weight = np.full((4, 2, 1, 1), 0.5, np.float32)
    weight[1] = 0.0
    weight[2] = 1e-12
    weight[3] = 1e-30
    bias = np.array([3.0, -2.0, 5.0, 1000.0], np.float32)
    unit = np.float32(0.02)
    scales = room_for_bias(weight_scales(weight), bias, unit)
    stored = quantize_bias(bias, unit * scales)
    assert (np.abs(stored.astype(np.int64)) <= LARGEST_BIAS).all()
    np.testing.assert_allclose(stored * (unit * scales).astype(np.float64), bias, rtol=1e-3)
    assert scales[0] == pytest.approx(0.5 / 127), "healthy channels are not touched"


@BOTH
@pytest.mark.parametrize("damage", ["dead channel", "tiny channel", "dead layer", "huge bias"])
def test_sick_channels_do_no_harm(emit: Emit, damage: str) -> None:
    weight = np.random.default_rng(1).normal(0, 0.4, (24, 16, 3, 3)).astype(np.float32)
    if damage == "dead channel":
        weight[3] = 0.0
    if damage == "tiny channel":
        weight[3] *= 1e-10
    if damage == "dead layer":
        weight[:] = 0.0
    model = one_conv(weight=weight)
    if damage == "huge bias":
        (bias,) = (t for t in model.graph.initializer if t.name == "t6_bias")
        values = numpy_helper.to_array(bias).copy()
        values[3] = 4e4
        bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    table, images = prepare(model)
    emitted = emit(model, table)
    reference, got = run(model, images), run(emitted.model, images)
    assert np.isfinite(got).all()
    scale = np.abs(reference).max()
    assert np.abs(got - reference).max() < 0.05 * scale


@BOTH
def test_activations_that_were_always_zero_stay_so(emit: Emit) -> None:
    network = Network(channels=1)
    network.conv(16, weight=np.zeros((16, 1, 3, 3), np.float32), bias=False)
    network.activate("Relu")
    network.conv(16)
    model = network.finish()
    table, images = prepare(model)
    reference, got = run(model, images), run(emit(model, table).model, images)
    np.testing.assert_allclose(got, reference, atol=0.02)


@BOTH
def test_named_nodes_stay_float(emit: Emit) -> None:
    model = small_cnn()
    table, images = prepare(model)
    reference = run(model, images)
    everything = emit(model, table)
    for name in everything.quantized:
        emitted = emit(model, table, float_nodes=[name])
        assert set(emitted.quantized) == set(everything.quantized) - {name}
        assert emitted.kept_float[name] == "asked for by float_nodes"
        assert sqnr_db(reference, run(emitted.model, images)) > 25
        if emit is onnxruntime_dialect.emit:
            check_kernels(emitted)
    none = emit(model, table, float_nodes=[layer.name for layer in Graph(model).layers()])
    assert none.quantized == ()
    np.testing.assert_allclose(run(none.model, images), reference, rtol=1e-4, atol=1e-4)
    with pytest.raises(ExportError, match="float_nodes: the graph has no node 'stem'"):
        emit(model, table, float_nodes=["stem"])


def test_onnxruntime_does_not_quantize_float_weights_by_itself() -> None:
    """Its WeightBiasQuantization pass would, per tensor, for any conv between DQ and Q."""
    model = small_cnn()
    table, _ = prepare(model)
    for conv in Graph(model).convs():
        emitted = onnxruntime_dialect.emit(model, table, float_nodes=[conv.name])
        floats = [n for n in optimized(emitted.model).graph.node if n.op_type.endswith("Conv")]
        kinds = Counter(node.op_type for node in floats)
        assert kinds["QLinearConv"] == len(emitted.quantized)
        assert kinds["Conv"] + kinds["FusedConv"] == 1


@BOTH
def test_a_float_add_pool_or_activation_is_respected(emit: Emit) -> None:
    model = small_cnn()
    table, images = prepare(model)
    names = [
        node.name
        for node in model.graph.node
        if node.op_type in ("Add", "MaxPool", "Clip", "Mul", "ReduceMean", "Concat", "HardSwish")
        and node.name not in Graph(model).preprocessing().nodes
    ]
    emitted = emit(model, table, float_nodes=names)
    assert sqnr_db(run(model, images), run(emitted.model, images)) > 25


def test_float_nodes_between_8_bit_ones_are_listed() -> None:
    model = family("convnext")
    kept = onnxruntime_dialect.emit(model, prepare(model)[0]).kept_float
    by_op = {Graph(model).nodes[name].op_type: reason for name, reason in kept.items()}
    assert by_op["Gelu"] == "Gelu: onnxruntime has no 8-bit kernel for it"
    assert "MatMul" not in by_op
    assert by_op["Transpose"] == "Transpose: its neighbours are float"
    add = next(n.name for n in model.graph.node if n.op_type == "Add" and "normal" not in n.output)
    kept = onnxruntime_dialect.emit(model, prepare(model)[0], float_nodes=[add]).kept_float
    assert kept[add] == "asked for by float_nodes"


@BOTH
def test_another_graphs_table_is_refused(emit: Emit) -> None:
    table, _ = prepare(one_conv())
    with pytest.raises(ExportError, match="measured on another graph; calibrate again"):
        emit(small_cnn(), table)


def test_narrow_layers_stay_float_for_tensorrt_with_the_reason() -> None:
    network = Network(channels=3)
    network.conv(12)
    network.activate("Relu")
    network.conv(16)
    network.activate("Relu")
    network.conv(16, groups=4)
    network.activate("Relu")
    network.depthwise(kernel=1)
    network.depthwise()
    network.squeeze_excite()
    network.conv(32, kernel=1)
    model = network.finish()
    emitted = tensorrt_dialect.emit(model, prepare(model)[0])
    reasons = list(emitted.kept_float.values())
    assert reasons == [
        "12 output channels; INT8 wants multiples of 8",
        "12 channels per group; INT8 wants 16 or more",
        "4 channels per group; INT8 wants 16 or more",
        "depthwise 1x1 with 16 channels; INT8 wants 3x3 and multiples of 8",
        "one output pixel: a matrix-vector product",
        "one output pixel: a matrix-vector product",
        "one output pixel: a matrix-vector product",
    ]
    assert len(emitted.quantized) == 2


ACTIVATIONS = ("none", "Relu", "Clip", "HardSwish", "Silu", "LeakyRelu", "Gelu", "Elu")


@st.composite
def random_models(draw: st.DrawFn) -> onnx.ModelProto:
    """A stem and two to five blocks of any kind in any order."""
    network = Network(channels=draw(st.sampled_from([1, 3])), seed=draw(st.integers(0, 1000)))
    network.conv(draw(st.sampled_from([8, 16])), stride=draw(st.sampled_from([1, 2])))
    network.activate(draw(st.sampled_from(ACTIVATIONS)))
    blocks: Collection[str] = draw(
        st.lists(
            st.sampled_from(
                ["conv", "depthwise", "residual", "gate", "pool", "concat", "shuffle", "next"]
            ),
            min_size=2,
            max_size=5,
        )
    )
    for block in blocks:
        if block == "conv":
            bias = draw(st.booleans())
            network.conv(draw(st.sampled_from([8, 16, 24])), kernel=1, bias=bias)
            network.activate(draw(st.sampled_from(ACTIVATIONS)))
        if block == "depthwise":
            network.depthwise()
            network.activate(draw(st.sampled_from(ACTIVATIONS)))
        if block == "residual":
            network.residual(draw(st.sampled_from(["Relu", "Clip", "HardSwish"])))
            network.activate(draw(st.sampled_from(ACTIVATIONS)))
        if block == "gate":
            gate = draw(st.sampled_from(["Sigmoid", "HardSigmoid"]))
            network.squeeze_excite(gate, mean=draw(st.booleans()))
        if block == "pool" and network.side() >= 4:
            network.max_pool()
        if block == "concat" and network.channels <= 32:
            network.concat()
        if block == "shuffle":
            network.shuffle()
        if block == "next":
            network.transformer_block(bias=draw(st.booleans()))
    if draw(st.booleans()):
        network.flatten()
        for kind in draw(st.lists(st.sampled_from(["gemm", "matmul"]), min_size=1, max_size=2)):
            outputs, bias = draw(st.sampled_from([8, 16, 24])), draw(st.booleans())
            network.activate(draw(st.sampled_from(ACTIVATIONS)))
            if kind == "gemm":
                network.gemm(outputs, bias=bias, transposed=draw(st.booleans()))
            else:
                network.matmul(outputs, bias=bias)
    return network.finish()


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(random_models())
def test_random_graphs_keep_their_meaning(model: onnx.ModelProto) -> None:
    table, images = prepare(model)
    reference = run(model, images)
    for emit in (tensorrt_dialect.emit, onnxruntime_dialect.emit):
        emitted = emit(model, table)
        assert sqnr_db(reference, run(emitted.model, images)) > 18
    assert len(emitted.quantized) == len(Graph(model).layers()) - 1
    check_kernels(emitted)
    with_classifier = onnxruntime_dialect.emit(model, table, classifier=True)
    assert len(with_classifier.quantized) == len(Graph(model).layers())
    check_kernels(with_classifier)


def test_tensorrt_builds_every_intended_layer_in_int8() -> None:
    pytest.importorskip("tensorrt_rtx")
    from runtime.engines.tensorrt_build import build
    from runtime.engines.tensorrt_layers import node_precisions

    for name in FAMILIES:
        model = family(name)
        emitted = tensorrt_dialect.emit(model, prepare(model)[0])
        channels = model.graph.input[0].type.tensor_type.shape.dim[3].dim_value
        built = build(
            emitted.model.SerializeToString(),
            batch=(1, 1, 8),
            shape=(SIZE, SIZE, channels),
            target_sm=(8, 6),
        )
        precisions = node_precisions(built.layers, emitted.quantized)
        assert set(precisions.values()) == {"INT8"}, (name, precisions)
