"""The scan finds the layer that was damaged on purpose, and the policy leaves it float."""

import functools

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calibration import onnxruntime_dialect, tensorrt_dialect
from calibration.executor import run_exactly
from calibration.graph import Graph
from calibration.price import CONVERSION, Price, multiplications
from calibration.sensitivity import Emit, LayerSensitivity, choose_float, scan
from runtime.metrics import sqnr_db
from tests.calibration_graphs import Network, draw_images, make_table

CLASSIFIER = functools.partial(onnxruntime_dialect.emit, classifier=True)
ALL = pytest.mark.parametrize(
    "emit",
    [tensorrt_dialect.emit, onnxruntime_dialect.emit, CLASSIFIER],
    ids=["tensorrt", "onnxruntime", "classifier"],
)


def network_of_blocks() -> onnx.ModelProto:
    network = Network(seed=4)
    network.conv(16, stride=2)
    network.activate("Relu")
    for _ in range(2):
        network.residual("Relu")
    network.max_pool()
    network.conv(32, kernel=1)
    network.activate("Relu")
    return network.finish()


def damage(model: onnx.ModelProto, position: int) -> str:
    """Silence a channel and give it weights so large that all others round to nothing.

    The float graph hardly changes. Returns the name of the layer that reads the channel.
    """
    silent, reader = Graph(model).convs()[position - 1 : position + 1]
    for layer, index, value in ((silent, (0,), 0.0), (reader, (slice(None), 0), 60.0)):
        node = Graph(model).nodes[layer.name]
        for name in node.input[1:] if layer is silent else node.input[1:2]:
            (tensor,) = (t for t in model.graph.initializer if t.name == name)
            values = numpy_helper.to_array(tensor).copy()
            values[index] = value
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return reader.name


@ALL
def test_the_scan_is_each_layer_alone(emit: Emit) -> None:
    """Against the plain way: emit with all other layers float, run all of it."""
    model = network_of_blocks()
    images = draw_images(12, seed=5)
    table = make_table(model, draw_images(16))
    names = [layer.name for layer in Graph(model).layers()]
    found = scan(model, table, emit, images)
    assert sorted(layer.name for layer in found) == sorted(emit(model, table).quantized)
    reference = run_exactly(model, images)
    for layer in found:
        others = [name for name in names if name != layer.name]
        alone = run_exactly(emit(model, table, float_nodes=others).model, images)
        assert layer.sqnr_db == pytest.approx(sqnr_db(reference, alone), abs=0.01)
        assert layer.flips == (reference.argmax(axis=1) != alone.argmax(axis=1)).sum()
    assert [layer.error_share for layer in found] == sorted(
        (layer.error_share for layer in found), reverse=True
    )
    assert sum(layer.error_share for layer in found) == pytest.approx(1.0)


@ALL
@pytest.mark.parametrize("position", [2, 4])
def test_a_damaged_layer_is_found_and_left_float(emit: Emit, position: int) -> None:
    model = network_of_blocks()
    name = damage(model, position)
    table = make_table(model, draw_images(16))
    done: list[float] = []
    found = scan(model, table, emit, draw_images(12, seed=5), progress=done.append)
    assert found[0].name == name
    assert found[0].error_share > 0.5
    assert done[-1] == 1.0
    price = Price(Graph(model), [layer.name for layer in found])
    cost = min(price.share(run) for run in runs_with(name, price.layers))
    chosen = choose_float(found, price, cost + 0.001)
    assert name in chosen
    assert f"{found[0].error_share:.1%} of the error" in chosen[name]
    assert name not in choose_float(found, price, cost / 2)


def runs_with(name: str, layers: tuple[str, ...]) -> list[tuple[str, ...]]:
    """All runs of neighbours that hold ``name``."""
    at = layers.index(name)
    return [layers[i:j] for i in range(at + 1) for j in range(at + 1, len(layers) + 1)]


def test_some_layers_may_be_scanned_alone() -> None:
    model = network_of_blocks()
    table = make_table(model, draw_images(16))
    names = [layer.name for layer in Graph(model).convs()][1:3]
    found = scan(model, table, tensorrt_dialect.emit, draw_images(4), layers=names)
    assert {layer.name for layer in found} == set(names)


def test_multiplications_are_counted_from_shapes() -> None:
    network = Network(channels=3)
    network.conv(16, stride=2)
    network.activate("Relu")
    network.depthwise()
    model = network.finish(classes=5)
    counts = list(multiplications(Graph(model)).values())
    assert counts == [8 * 8 * 16 * 3 * 9, 8 * 8 * 16 * 9, 16 * 5]


def narrow_in_the_middle() -> onnx.ModelProto:
    """Layers of 16, 64, 64, 8 and 16 channels at 8 x 8: what lies between the wide ones is dear."""
    network = Network()
    network.conv(16, stride=2)
    for channels in (64, 64, 8, 16):
        network.activate("Relu")
        network.conv(channels, kernel=1)
    return network.finish()


def test_a_price_is_products_and_what_changes_form_at_the_ends_of_a_run() -> None:
    model = narrow_in_the_middle()
    graph = Graph(model)
    names = [layer.name for layer in graph.convs()]
    price, products = Price(graph, names), multiplications(graph)
    every = sum(products.values())
    pixels = 8 * 8
    for kept, values in (
        ([0], 16),  # the image becomes float in either form, at the same cost
        ([1], 16 + 64),
        ([1, 2], 16 + 64),
        ([0, 1, 2, 3], 8),
        ([1, 3], 16 + 64 + 64 + 8),
        (range(5), 16),  # the pooling behind them is taken for an 8-bit one
        ([], 0),
    ):
        layers = [names[at] for at in kept]
        expected = sum(products[name] for name in layers) + CONVERSION * values * pixels
        assert price.share(layers) == pytest.approx(expected / every), kept


def found_in(model: onnx.ModelProto, errors: list[float]) -> list[LayerSensitivity]:
    layers = Graph(model).convs()
    return [
        LayerSensitivity(layer.name, 20.0, 1, 48, error, 0.015)
        for layer, error in zip(layers, errors, strict=True)
    ]


def test_neighbours_stay_float_together_where_one_alone_costs_more() -> None:
    model = narrow_in_the_middle()
    found = found_in(model, [0.30, 0.05, 0.30, 0.30, 0.05])
    names = [layer.name for layer in found]
    price = Price(Graph(model), names)
    run = price.share(names[:4])
    assert run < price.share([names[2]])
    chosen = choose_float(found, price, run + 0.001)
    assert sorted(chosen) == sorted(names[:4]), "the second only because the others are"
    assert chosen[names[0]] == (
        "float, alone or with its neighbours: 30.0% of the error (20.0 dB alone, 1 of 48 images "
        "change class) for 1.5% of the multiplications"
    )
    assert choose_float(found, price, 0.0) == {}


def test_layers_that_make_no_error_are_no_reason() -> None:
    model = network_of_blocks()
    table = make_table(model, draw_images(16))
    black = np.zeros((3, 16, 16, 1), np.uint8)
    found = scan(model, table, tensorrt_dialect.emit, black, layers=[])
    assert found == ()
    assert choose_float(found, Price(Graph(model), []), 1.0) == {}
