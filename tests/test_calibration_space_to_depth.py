"""Folding pixels into channels moves bytes and weights and changes no sum."""

from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest

from calibration import check_kernels, onnxruntime_dialect
from calibration.graph import Graph
from calibration.space_to_depth import find_fold
from runtime.preprocess import UInt8
from tests.calibration_graphs import Network, draw_images, make_table


def stem(
    *, kernel: tuple[int, int] = (3, 3), stride: int = 2, pads: tuple[int, int, int, int],
    channels: int = 1,
) -> onnx.ModelProto:  # fmt: skip
    """A gray image, one strided convolution of any shape, and a little behind it."""
    network = Network(channels=channels)
    weight = network.random.normal(0, 0.4, (8, channels, *kernel)).astype(np.float32)
    network.conv(8, stride=stride, weight=weight)
    for attribute in network.nodes[-1].attribute:
        if attribute.name == "pads":
            attribute.ints[:] = pads
        if attribute.name == "kernel_shape":
            attribute.ints[:] = kernel
    network.activate("Relu")
    network.conv(8, kernel=1)
    network.activate("Relu")
    return network.finish()


def run(model: onnx.ModelProto, images: UInt8) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return np.asarray(session.run(["features"], {"image": images})[0])


@pytest.mark.parametrize(
    ("kernel", "pads"),
    [
        ((3, 3), (1, 1, 1, 1)),  # MobileNet, EfficientNet, RegNet
        ((3, 3), (0, 0, 1, 1)),  # TensorFlow's SAME
        ((3, 3), (0, 0, 0, 0)),
        ((7, 7), (3, 3, 3, 3)),  # ResNet
        ((5, 3), (2, 1, 2, 1)),
        ((2, 2), (0, 0, 0, 0)),
        ((4, 4), (1, 1, 1, 1)),
    ],
)
def test_the_folded_convolution_is_the_same_bit_by_bit(
    kernel: tuple[int, int], pads: tuple[int, int, int, int]
) -> None:
    model = stem(kernel=kernel, pads=pads)
    table, images = make_table(model, draw_images(24)), draw_images(16, seed=99)
    folded = onnxruntime_dialect.emit(model, table)
    with mock.patch.object(onnxruntime_dialect, "find_fold", return_value=None):
        plain = onnxruntime_dialect.emit(model, table)
    assert "image_blocks" in {t for node in folded.model.graph.node for t in node.output}
    assert "image_blocks" not in {t for node in plain.model.graph.node for t in node.output}
    np.testing.assert_array_equal(run(folded.model, images), run(plain.model, images))
    assert check_kernels(folded)["QLinearConv"] == 2


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 1, "pads": (1, 1, 1, 1)},
        {"channels": 3, "pads": (1, 1, 1, 1)},
    ],
)
def test_other_first_convolutions_are_left_alone(options: dict[str, object]) -> None:
    model = stem(**options)  # type: ignore[arg-type]
    graph = Graph(model)
    convolutions = frozenset(node.name for node in model.graph.node if node.op_type == "Conv")
    assert find_fold(graph, convolutions) is None


def test_a_float_first_convolution_is_left_alone() -> None:
    model = stem(pads=(1, 1, 1, 1))
    first = next(node.name for node in model.graph.node if node.op_type == "Conv")
    table, images = make_table(model, draw_images(24)), draw_images(8, seed=99)
    emitted = onnxruntime_dialect.emit(model, table, float_nodes=[first])
    assert first in emitted.kept_float
    assert np.isfinite(run(emitted.model, images)).all()
