"""Running a graph in pieces gives what running it whole gives, and a visitor can step in."""

import numpy as np
import onnx
import onnxruntime
import pytest

from calibration import onnxruntime_dialect, tensorrt_dialect
from calibration.executor import Array, Executor, run_exactly
from tests.calibration_graphs import Network, draw_images, make_table, small_cnn


def reference(model: onnx.ModelProto, images: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return np.asarray(session.run(["logits"], {"image": images})[0])


def quantized(dialect: str) -> onnx.ModelProto:
    model = small_cnn()
    table = make_table(model, draw_images(16))
    emit = tensorrt_dialect.emit if dialect == "tensorrt" else onnxruntime_dialect.emit
    return emit(model, table).model


@pytest.mark.parametrize("dialect", ["float", "tensorrt", "onnxruntime"])
def test_pieces_compute_what_the_whole_computes(dialect: str) -> None:
    model = small_cnn() if dialect == "float" else quantized(dialect)
    images = draw_images(11, seed=1)
    expected = reference(model, images)
    np.testing.assert_allclose(run_exactly(model, images), expected, rtol=1e-6)
    stops = [node.output[0] for node in model.graph.node if node.op_type == "Conv"]
    visited: list[str] = []
    pieces = Executor(model, stops=stops)
    got = pieces.run({"image": images}, lambda stop, _: visited.append(stop))["logits"]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert visited == stops


def test_every_tensor_may_be_a_stop() -> None:
    model = quantized("onnxruntime")
    images = draw_images(5)
    stops = [tensor for node in model.graph.node for tensor in node.output]
    got = Executor(model, stops=stops).run({"image": images})["logits"]
    np.testing.assert_allclose(got, reference(model, images), rtol=1e-6)


def test_a_visitor_may_replace_what_it_is_shown() -> None:
    network = Network()
    network.conv(8, stride=2)
    stop = network.activate("Relu")
    model = network.finish()
    seen = []

    def visit(name: str, live: dict[str, Array]) -> None:
        seen.append(live[name].copy())
        live[name] = np.zeros_like(live[name])

    got = Executor(model, stops=[stop]).run({"image": draw_images(6)}, visit)["logits"]
    assert seen[0].shape == (6, 8, 8, 8)
    assert seen[0].max() > 0
    np.testing.assert_array_equal(got, np.zeros_like(got), "the head has no bias")


def test_only_what_is_read_later_is_kept() -> None:
    model = small_cnn()
    convs = [node.output[0] for node in model.graph.node if node.op_type == "Conv"]
    alive: dict[str, set[str]] = {}
    values = {"image": draw_images(4)}
    executor = Executor(model, stops=convs)
    executor.run(values, lambda stop, live: alive.update({stop: set(live)}))
    assert alive[convs[0]] == {convs[0]}
    residual = alive[convs[1]]  # the depthwise convolution of the block, and the shortcut
    assert len(residual) == 2
    assert set(values) == {"logits"}


def test_a_run_can_begin_in_the_middle() -> None:
    model = small_cnn()
    images = draw_images(4)
    middle = next(node.output[0] for node in model.graph.node if node.op_type == "MaxPool")
    shown: dict[str, Array] = {}
    whole = Executor(model, stops=[middle])
    expected = whole.run({"image": images}, lambda stop, live: shown.update(live))["logits"]
    got = Executor(model, given=[middle]).run({middle: shown[middle]})["logits"]
    np.testing.assert_array_equal(got, expected)


def test_shapes_read_from_the_image_do_not_get_a_row_per_image() -> None:
    network = Network()
    before = network.conv(8, stride=2)
    network.node("Shape", ["image"], "shape", start=0, end=1)
    rest = network.constant("rest", np.array([8, 8, 8], np.int64))
    target = network.node("Concat", ["shape", rest], "target", axis=0)
    network.node("Reshape", [before, target], "reshaped")
    network.conv(8)
    model = network.finish()
    stops = [node.output[0] for node in model.graph.node if node.op_type == "Conv"]
    images = draw_images(7)
    got = Executor(model, stops=stops).run({"image": images})["logits"]
    np.testing.assert_allclose(got, reference(model, images), rtol=1e-6)


def test_a_node_may_make_two_stops() -> None:
    network = Network()
    network.conv(16, stride=2)
    network.shuffle()
    model = network.finish()
    (split,) = (node for node in model.graph.node if node.op_type == "Split")
    visited: list[str] = []
    executor = Executor(model, stops=split.output)
    executor.run({"image": draw_images(3)}, lambda stop, _: visited.append(stop))
    assert visited == list(split.output)
