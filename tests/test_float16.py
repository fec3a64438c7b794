"""The FP16 pass: small graphs for each rule, checked by onnx and compared by onnxruntime."""

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.onnx_pb import ModelProto, NodeProto

from export.float16 import (
    activation_overflows,
    activation_ranges,
    first_not_finite,
    normalisation_nodes,
    overflows,
    to_float16,
)
from runtime.errors import ExportError
from runtime.metrics import sqnr_db

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
Constants = dict[str, npt.NDArray[np.float32] | npt.NDArray[np.int8] | npt.NDArray[np.int64]]


def graph(
    nodes: list[NodeProto],
    inputs: dict[str, tuple[int, list[int | str]]],
    outputs: dict[str, tuple[int, list[int | str]]],
    constants: Constants,
    *,
    opset: int = 20,
) -> ModelProto:
    for index, node in enumerate(nodes):
        node.name = f"node{index}_{node.op_type}"
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info(name, *value) for name, value in inputs.items()],
            [helper.make_tensor_value_info(name, *value) for name, value in outputs.items()],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def classifier(*, quantized: bool = False, scale: float = 0.02) -> ModelProto:
    """Bytes in, a residual block, logits and features out; Q/DQ around the first Conv if asked."""
    random = np.random.default_rng(0)
    node = helper.make_node
    nodes = [
        node("Cast", ["image"], ["float"], to=FLOAT),
        node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        node("Mul", ["planes", "inverse_std"], ["scaled"]),
        node("Add", ["scaled", "shift"], ["normalised"]),
    ]
    constants: Constants = {
        "inverse_std": np.array(1 / 128, np.float32),
        "shift": np.array(-1, np.float32),
        "b0": random.normal(size=8).astype(np.float32),
        "w1": random.normal(size=(8, 8, 1, 1)).astype(np.float32),
        "low": np.array(0, np.float32),
        "high": np.array(6, np.float32),
        "fc": random.normal(size=(4, 8)).astype(np.float32),
        "fc_bias": random.normal(size=4).astype(np.float32),
    }
    source, weight = "normalised", "w0"
    if quantized:
        nodes += [
            node("QuantizeLinear", ["normalised", "s", "z"], ["q"]),
            node("DequantizeLinear", ["q", "s", "z"], ["dq"]),
            node("DequantizeLinear", ["w0_q", "w0_s", "w0_z"], ["w0"], axis=0),
        ]
        source = "dq"
        constants |= {
            "s": np.array(scale, np.float32),
            "z": np.array(0, np.int8),
            "w0_q": random.integers(-127, 128, (8, 3, 3, 3), dtype=np.int8),
            # The last channel is dead: its scale is below half's smallest number.
            "w0_s": np.array([0.003] * 7 + [8.7e-10], np.float32),
            "w0_z": np.zeros(8, np.int8),
        }
    else:
        constants["w0"] = (random.normal(size=(8, 3, 3, 3)) / 4).astype(np.float32)
    nodes += [
        node("Conv", [source, weight, "b0"], ["c0"], pads=[1, 1, 1, 1]),
        node("Clip", ["c0", "low", "high"], ["r0"]),
        node("Conv", ["r0", "w1"], ["c1"]),
        node("Add", ["c1", "r0"], ["sum"]),
        node("GlobalAveragePool", ["sum"], ["pooled"]),
        node("Flatten", ["pooled"], ["features"]),
        node("Gemm", ["features", "fc", "fc_bias"], ["logits"], transB=1),
    ]
    return graph(
        nodes,
        {"image": (TensorProto.UINT8, ["N", 8, 8, 3])},
        {"features": (FLOAT, ["N", 8]), "logits": (FLOAT, ["N", 4])},
        constants,
    )


def run(model: ModelProto) -> list[npt.NDArray[np.float32]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # Its bias quantization underflows with half scales, and would be blamed on the pass.
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, disabled_optimizers=["WeightBiasQuantization"]
    )
    images = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    return list(session.run(["logits", "features"], {"image": images}))


def types(model: ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    known = {value.name: value.type.tensor_type.elem_type for value in values}
    return known | {tensor.name: tensor.data_type for tensor in inferred.initializer}


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "qdq"])
def test_it_computes_in_half_and_agrees(quantized: bool) -> None:
    model = classifier(quantized=quantized)
    half = to_float16(model)
    kinds = types(half)
    for node in half.graph.node:
        if node.op_type in ("Conv", "Gemm", "Clip", "GlobalAveragePool"):
            assert {kinds[name] for name in [*node.input, *node.output]} == {HALF}, node.name
    for expected, got in zip(run(model), run(half), strict=True):
        assert got.dtype == np.float32
        assert sqnr_db(expected, got) > 50


def test_inputs_outputs_and_the_original_do_not_change() -> None:
    model = classifier()
    before = model.SerializeToString()
    half = to_float16(model)
    assert model.SerializeToString() == before
    assert list(half.graph.input) == list(model.graph.input)
    assert list(half.graph.output) == list(model.graph.output)
    assert to_float16(model).SerializeToString() == half.SerializeToString()


def test_the_normalisation_stays_in_float32() -> None:
    model = classifier()
    names = [node.name for node in normalisation_nodes(model)]
    assert names == ["node0_Cast", "node1_Transpose", "node2_Mul", "node3_Add"]
    kinds = types(to_float16(model))
    assert {kinds[name] for name in ("float", "planes", "scaled", "normalised")} == {FLOAT}


def test_an_output_that_is_used_inside_is_used_in_half() -> None:
    half = to_float16(classifier())
    gemm = next(node for node in half.graph.node if node.op_type == "Gemm")
    pooled = next(node for node in half.graph.node if node.op_type == "Flatten")
    assert gemm.input[0] == pooled.output[0] != "features"


def test_named_nodes_stay_in_float32() -> None:
    model = classifier()
    first = next(node.name for node in model.graph.node if node.op_type == "Conv")
    half = to_float16(model, keep_float32=[first])
    kept = next(node for node in half.graph.node if node.name == first)
    kinds = types(half)
    assert {kinds[name] for name in [*kept.input, *kept.output]} == {FLOAT}
    with pytest.raises(ExportError, match="no node is called stem"):
        to_float16(model, keep_float32=["stem"])


def test_an_output_made_in_float32_needs_no_cast() -> None:
    model = classifier()
    last = model.graph.node[-1].name
    half = to_float16(model, keep_float32=[last])
    assert half.graph.node[-1].op_type == "Gemm"
    assert sqnr_db(run(model)[0], run(half)[0]) > 50


def test_a_scale_never_becomes_zero() -> None:
    half = to_float16(classifier(quantized=True))
    kinds = ("QuantizeLinear", "DequantizeLinear")
    scales = {node.input[1] for node in half.graph.node if node.op_type in kinds}
    values = {t.name: numpy_helper.to_array(t) for t in half.graph.initializer}
    assert len(scales) == 2
    for name in scales:
        assert values[name].dtype == np.float16
        assert values[name].min() >= 2.0**-24
    assert np.isfinite(run(half)[0]).all()


def test_weights_beyond_half_are_reported_and_clipped() -> None:
    model = classifier()
    model.graph.initializer[2].CopyFrom(
        numpy_helper.from_array(np.array([1e6] + [-1e5] * 7, np.float32), "b0")
    )
    high = next(t for t in model.graph.initializer if t.name == "high")
    high.CopyFrom(numpy_helper.from_array(np.array(3.4e38, np.float32), "high"))
    (overflow,) = overflows(model)  # a bound of Clip that cannot be reached is no overflow
    assert str(overflow) == "b0 reaches 1e+06, half ends at 65504"
    half = to_float16(model)
    values = {t.name: numpy_helper.to_array(t) for t in half.graph.initializer}
    assert values["b0_float16"].tolist() == [65504] + [-65504] * 7
    assert overflows(classifier()) == []


def large_inside() -> ModelProto:
    """A convolution's output goes far beyond half and comes back before anybody looks."""
    random = np.random.default_rng(0)
    node = helper.make_node
    nodes = [
        node("Cast", ["image"], ["float"], to=FLOAT),
        node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        node("Conv", ["planes", "up"], ["big"]),
        node("Conv", ["big", "down"], ["small"]),
        node("GlobalAveragePool", ["small"], ["pooled"]),
        node("Flatten", ["pooled"], ["features"]),
        node("Gemm", ["features", "fc"], ["logits"], transB=1),
    ]
    constants: Constants = {
        "up": (random.normal(size=(8, 3, 1, 1)) * 1e3).astype(np.float32),
        "down": (random.normal(size=(8, 8, 1, 1)) * 1e-4).astype(np.float32),
        "fc": random.normal(size=(4, 8)).astype(np.float32),
    }
    return graph(
        nodes,
        {"image": (TensorProto.UINT8, ["N", 8, 8, 3])},
        {"features": (FLOAT, ["N", 8]), "logits": (FLOAT, ["N", 4])},
        constants,
    )


IMAGES = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)


def test_an_activation_that_overflows_is_named_though_a_cpu_hides_it() -> None:
    model = large_inside()
    half = to_float16(model)
    assert overflows(model) == []
    assert sqnr_db(run(model)[0], run(half)[0]) > 50, "the CPU keeps it in float32 between nodes"
    (overflow,) = activation_overflows(activation_ranges(model, IMAGES))
    assert overflow.tensor == "big"
    assert overflow.largest > 65504
    assert first_not_finite(half, IMAGES) == "big is infinite first, the output of Conv node2_Conv"
    assert first_not_finite(model, IMAGES) == ""


def test_ranges_are_those_of_every_activation_over_all_images() -> None:
    ranges = activation_ranges(classifier(), IMAGES)
    pixels = IMAGES.astype(np.float32)
    assert ranges["float"] == (pixels.min(), pixels.max())
    assert ranges["normalised"] == pytest.approx((pixels.min() / 128 - 1, pixels.max() / 128 - 1))
    logits = run(classifier())[0]
    assert ranges["logits"] == pytest.approx((logits.min(), logits.max()), rel=1e-4)
    assert next(iter(ranges)) == "float"
    assert activation_overflows(ranges) == []
    assert [str(o) for o in activation_overflows({"a": (-7e4, 1.0), "b": (np.nan, np.nan)})] == [
        "a reaches 70000, half ends at 65504",
        "b reaches nan, half ends at 65504",
    ]


def test_a_weight_that_is_no_number_is_found_where_it_first_shows() -> None:
    model = classifier()
    weight = next(t for t in model.graph.initializer if t.name == "w1")
    values = numpy_helper.to_array(weight).copy()
    values[0, 0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, "w1"))
    words = first_not_finite(model, IMAGES)
    assert words == "c1 is NaN first, the output of Conv node6_Conv"
    assert "c1" in {o.tensor for o in activation_overflows(activation_ranges(model, IMAGES))}


def test_constant_nodes_and_resize_scales() -> None:
    node = helper.make_node
    nodes = [
        node("Constant", [], ["scales"], value_floats=[1.0, 1.0, 2.0, 2.0]),
        node(
            "Constant", [], ["two"], value=numpy_helper.from_array(np.array(2, np.float32), "two")
        ),
        node("Mul", ["x", "two"], ["first"]),
        node("Relu", ["first"], ["positive"]),
        node("Resize", ["positive", "", "scales"], ["larger"], mode="nearest"),
        node("Sqrt", ["larger"], ["y"]),
    ]
    shape: list[int | str] = [1, 1, 4, 4]
    model = graph(nodes, {"x": (FLOAT, shape)}, {"y": (FLOAT, [1, 1, 8, 8])}, {})
    half = to_float16(model)
    resize = next(n for n in half.graph.node if n.op_type == "Resize")
    kinds = types(half)
    assert kinds[resize.input[0]] == kinds[resize.output[0]] == HALF
    assert kinds[resize.input[2]] == FLOAT


def test_an_operator_without_half_stays_in_float32() -> None:
    node = helper.make_node
    nodes = [
        node("Relu", ["boxes"], ["b"]),
        node("Relu", ["scores"], ["s"]),
        node("NonMaxSuppression", ["b", "s"], ["kept"]),
    ]
    model = graph(
        nodes,
        {"boxes": (FLOAT, [1, 5, 4]), "scores": (FLOAT, [1, 1, 5])},
        {"kept": (TensorProto.INT64, ["K", 3])},
        {},
    )
    half = to_float16(model)
    kinds = types(half)
    suppression = half.graph.node[-1]
    assert {kinds[name] for name in suppression.input} == {FLOAT}
    assert HALF in kinds.values()


def test_qdq_below_opset_19_is_refused() -> None:
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])]
    constants: Constants = {"s": np.array(0.1, np.float32), "z": np.array(0, np.int8)}
    model = graph(
        nodes, {"x": (FLOAT, [1, 4])}, {"y": (TensorProto.INT8, [1, 4])}, constants, opset=17
    )
    with pytest.raises(ExportError, match="needs opset 19, got 17; export the model with opset 20"):
        to_float16(model)


def test_control_flow_is_refused() -> None:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["r"])],
        "branch",
        [],
        [helper.make_tensor_value_info("r", FLOAT, [1])],
    )
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)]
    model = graph(nodes, {"x": (FLOAT, [1]), "c": (TensorProto.BOOL, [1])}, {"y": (FLOAT, [1])}, {})
    with pytest.raises(ExportError, match="control flow in If node0_If"):
        to_float16(model)
