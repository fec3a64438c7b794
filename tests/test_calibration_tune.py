"""Biases and weights that suit a quantized form: against plain NumPy, and only if they help."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from calibration import onnxruntime_dialect, tensorrt_dialect
from calibration.bias import correct_biases, output_means
from calibration.executor import Executor, run_exactly
from calibration.graph import Conv, Graph, Layer
from calibration.quantize import NOT_TUNED, Tuned, quantize_weight, weight_scales
from calibration.rounding import MAX_INPUTS, _inverse_root, choose_weights, measure_moments, patches
from calibration.sensitivity import Emit
from calibration.tune import Learned, TuneResult, learn, tune
from runtime.metrics import sqnr_db
from tests.calibration_graphs import Network, draw_images, make_table, small_cnn

BOTH = pytest.mark.parametrize(
    "emit", [tensorrt_dialect.emit, onnxruntime_dialect.emit], ids=["tensorrt", "onnxruntime"]
)


def uneven_cnn() -> onnx.ModelProto:
    """Weights with a long tail, so that rounding them to nearest costs something."""
    network = Network(seed=3)
    network.conv(16, stride=2)
    network.relu6()
    for _ in range(2):
        network.depthwise()
        network.relu6()
        network.conv(24, kernel=1)
        network.conv(48, kernel=1)
        network.relu6()
    model = network.finish()
    random = np.random.default_rng(7)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_weight") and tensor.name != "head_weight":
            values = numpy_helper.to_array(tensor).copy()
            rows = values.reshape(len(values), -1)
            rows[np.arange(len(rows)), random.integers(0, rows.shape[1], len(rows))] *= 25
            tensor.CopyFrom(numpy_helper.from_array(values / 8, tensor.name))
    return model


def channel_means(model: onnx.ModelProto, tensor: str, images: Any) -> npt.NDArray[np.float64]:
    values = Executor(model, outputs=[tensor]).run({"image": images})[tensor]
    return np.asarray(values.mean(axis=(0, 2, 3), dtype=np.float64))


@BOTH
def test_after_correction_every_layer_has_its_mean_back(emit: Emit) -> None:
    model, images = uneven_cnn(), draw_images(24)
    table, graph = make_table(model, images), Graph(model)
    plain = emit(model, table, correct_bias=False)
    biases = correct_biases(model, plain, output_means(model, plain.quantized, images), images)
    assert set(biases) == set(plain.quantized)
    corrected = emit(model, table, tuned=Tuned(biases=biases))
    made = {tensor for node in corrected.model.graph.node for tensor in node.output}
    before, after = 0.0, 0.0
    for layer in graph.layers():
        if layer.name in plain.quantized:
            tensor = layer.output if layer.output in made else graph.behind(layer.output)
            expected = channel_means(model, layer.output, images)
            before += np.abs(channel_means(plain.model, tensor, images) - expected).max()
            left = np.abs(channel_means(corrected.model, tensor, images) - expected).max()
            assert left < 2e-3, layer.name  # a bias moves a few values over a rounding edge
            after += left
    assert before > 5 * after


def test_a_layer_without_a_bias_gets_one() -> None:
    network = Network(seed=2)
    network.conv(16, stride=2, bias=False)
    network.activate("Relu")
    network.conv(16, bias=False)
    network.activate("Relu")
    model, images = network.finish(), draw_images(16)
    table = make_table(model, images)
    plain = onnxruntime_dialect.emit(model, table, correct_bias=False)
    biases = correct_biases(model, plain, output_means(model, plain.quantized, images), images)
    tuned = onnxruntime_dialect.emit(model, table, tuned=Tuned(biases=biases))
    reference = run_exactly(model, images)
    assert sqnr_db(reference, run_exactly(tuned.model, images)) > sqnr_db(
        reference, run_exactly(plain.model, images)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 1},
        {"kernel": 3, "stride": 2},
        {"kernel": 5, "groups": 8},
        {"kernel": 3, "groups": 2},
    ],
    ids=["pointwise", "strided", "depthwise", "grouped"],
)
def test_patches_times_rows_is_the_convolution(options: dict[str, Any]) -> None:
    network = Network(seed=1)
    network.conv(8)
    network.activate("Relu")
    network.conv(8, **options)
    model, images = network.finish(), draw_images(3)
    graph = Graph(model)
    layer = graph.convs()[1]
    tensors = Executor(model, outputs=[layer.input, layer.output]).run({"image": images})
    x = patches(tensors[layer.input], graph.nodes[layer.name], layer)
    rows = layer.rows.reshape(layer.groups, -1, x.shape[1])
    made = (rows @ x).reshape(8, -1)
    assert layer.bias is not None
    expected = tensors[layer.output].transpose(1, 0, 2, 3).reshape(8, -1)
    np.testing.assert_allclose(made + layer.bias[:, None], expected, atol=1e-4)


def test_moments_are_those_of_all_images_together() -> None:
    model, images = small_cnn(), draw_images(37)
    moments = measure_moments(model, [layer.name for layer in Graph(model).layers()], images)
    head = moments["Gemm_logits"]
    features = Executor(model, outputs=["features"]).run({"image": images})["features"]
    assert head.count == 37
    expected = np.cov(features.astype(np.float64), rowvar=False, bias=True)
    np.testing.assert_allclose(head.covariance[0], expected, atol=1e-5)


def test_a_layer_too_wide_is_left_to_nearest_rounding() -> None:
    network = Network()
    network.conv(MAX_INPUTS // 9 + 1, kernel=1, stride=8)
    wide = network.conv(8)
    model = network.finish()
    moments = measure_moments(
        model, [layer.name for layer in Graph(model).layers()], draw_images(2)
    )
    assert f"Conv_{wide}" not in moments
    assert "Gemm_logits" in moments


def correlated(side: int, count: int, seed: int) -> npt.NDArray[np.float64]:
    """Inputs ``[side, count]`` that largely say the same, as neighbouring pixels do."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(side, max(side // 4, 1)))
    noise = 0.1 * random.normal(size=(side, count))
    return np.asarray(mixing @ random.normal(size=(mixing.shape[1], count)) + noise + 2.0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("groups", "side"), [(1, 32), (1, 150), (12, 9)])
def test_chosen_weights_are_never_worse_than_nearest_ones(
    groups: int, side: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    weight = random.standard_t(3, (12, side, 1, 1)).astype(np.float32)
    layer = Conv("c", "x", "y", weight, None, groups, op_type="Conv")
    x = np.stack([correlated(side, 4 * side, seed + group) for group in range(groups)])
    centred = x - x.mean(axis=2, keepdims=True)
    covariance = centred @ centred.transpose(0, 2, 1) / x.shape[2]
    chosen = choose_weights(layer, covariance)

    def errors(scales: Any, integers: Any) -> npt.NDArray[np.float64]:
        delta = integers * scales.astype(np.float64).reshape(-1, 1, 1, 1) - weight
        made = delta.reshape(groups, -1, side) @ centred
        return np.asarray((made**2).mean(axis=2).reshape(-1))

    scales = weight_scales(weight)
    nearest = errors(scales, quantize_weight(weight, scales))
    after = errors(chosen.scales, chosen.weight)
    assert (after <= nearest * (1 + 1e-6)).all()
    assert after.mean() < 0.7 * nearest.mean()
    assert chosen.weight.dtype == np.int8
    assert np.abs(chosen.weight.astype(int)).max() <= 127
    assert chosen.error == pytest.approx(after.mean(), rel=1e-4)
    assert chosen.nearest_error == pytest.approx(nearest.mean(), rel=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_matrix_products_keep_their_layout(axis: int) -> None:
    weight = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32)
    side = weight.shape[1 - axis]
    layer = Layer("m", "x", "y", weight, None, op_type="Gemm", axis=axis)
    x = correlated(side, 200, 0)
    chosen = choose_weights(layer, np.cov(x)[None])
    scales = chosen.scales.reshape((-1, 1) if axis == 0 else (1, -1))
    assert chosen.weight.shape == weight.shape
    assert np.abs(chosen.weight * scales - weight).max() < 0.4


def test_inputs_that_never_change_do_no_harm() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 1, 3, 3)).astype(np.float32)
    layer = Conv("c", "x", "y", weight, None, 4, op_type="Conv")
    chosen = choose_weights(layer, np.zeros((4, 9, 9)))
    expected = quantize_weight(weight, weight_scales(weight))
    np.testing.assert_array_equal(chosen.weight, expected)


@BOTH
def test_tuning_raises_the_fidelity_of_held_out_answers(emit: Emit) -> None:
    model = uneven_cnn()
    images, held_out = draw_images(32), draw_images(40, seed=9)
    table = make_table(model, images)
    seen: list[float] = []
    result = tune(
        model, table, emit, images, held_out, progress=lambda done, what: seen.append(done)
    )
    reference = run_exactly(model, held_out)
    plain = sqnr_db(reference, run_exactly(emit(model, table).model, held_out))
    got = sqnr_db(reference, run_exactly(result.emitted.model, held_out))
    assert got > plain + 1
    assert got == pytest.approx(result.score.sqnr_db)
    assert [step.name for step in result.steps] == [
        "as calibrated",
        "sequential bias correction",
        "chosen weights and their biases",
    ]
    assert f"{plain:.1f} dB" in result.steps[0].reason
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    again = tune(model, table, emit, images, held_out, learned=learn(model, images))
    assert again.emitted.model == result.emitted.model, "the same images give the same form"


@BOTH
def test_what_does_not_help_is_reverted(emit: Emit) -> None:
    """Learned from what the graph never sees, means and weights can only mislead."""
    model = uneven_cnn()
    images, held_out = draw_images(16), draw_images(16, seed=9)
    table = make_table(model, images)
    honest = learn(model, images)
    wrong = Learned({name: mean + 3.0 for name, mean in honest.means.items()}, honest.weights)
    result = tune(model, table, emit, images, held_out, learned=wrong)
    assert result.tuned is NOT_TUNED
    assert result.emitted.model == emit(model, table).model
    assert [step.kept for step in result.steps] == [True, False, False]
    assert all("reverted" in step.reason for step in result.steps[1:])


def test_layers_left_float_stay_so() -> None:
    model, images = uneven_cnn(), draw_images(16)
    table = make_table(model, images)
    stem = Graph(model).convs()[0].name
    result: TuneResult = tune(
        model, table, tensorrt_dialect.emit, images, draw_images(8, seed=9), float_nodes=[stem]
    )
    assert stem not in result.emitted.quantized
    assert stem not in result.tuned.biases


def test_inputs_that_hardly_vary_around_a_large_mean_are_no_obstacle() -> None:
    """Their covariance is a difference of large numbers, and not quite positive."""
    covariance = np.diag([1e-12, 1.0, -1e-3])[None]
    root = _inverse_root(covariance)
    assert np.isfinite(root).all()
    assert (np.diagonal(root[0]) > 0).all()


def test_weights_may_be_chosen_on_more_images_than_biases() -> None:
    model, images, more = uneven_cnn(), draw_images(8), draw_images(40, seed=9)
    few, many = learn(model, images), learn(model, images, many=more)
    for name, means in few.means.items():
        np.testing.assert_array_equal(many.means[name], means)
    alone = learn(model, more).weights.weights
    assert any((few.weights.weights[name] != weights).any() for name, weights in alone.items())
    for name, weights in many.weights.weights.items():
        np.testing.assert_array_equal(weights, alone[name])
