"""Each method against plain NumPy on all raw values, and which method is taken."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.compare import MARGIN_DB, compare, decide
from calibration.graph import Graph
from calibration.methods import (
    LEVELS,
    METHODS,
    Grid,
    Method,
    bound,
    choose_range,
    divergence,
    entropy,
    mse,
    outside,
    percentile,
    squared_error,
)
from calibration.observer import BINS, Observer
from calibration.table import LARGEST_DB, Fidelity, MethodScore
from runtime.recipe import CalibrationSettings
from tests.calibration_graphs import Network, draw_images, make_table, small_cnn

KINDS = ("normal", "relu", "heavy", "shifted", "few")


def draw(kind: str, seed: int = 0, count: int = 20_000) -> np.ndarray:
    random = np.random.default_rng(seed)
    values: dict[str, np.ndarray] = {
        "normal": random.normal(0, 1, count),
        "relu": np.maximum(random.normal(0, 3, count), 0),
        "heavy": random.standard_t(3, count),
        "shifted": random.gamma(2.0, 1.5, count) - 0.4,
        "few": random.choice([-1.0, 0.0, 2.5], count),
    }
    return values[kind].astype(np.float32)


def observe(values: np.ndarray, parts: int = 3) -> Observer:
    observer = Observer("x")
    for part in np.array_split(values, parts):
        observer.add(part)
    return observer


def quantize(values: np.ndarray, low: float, high: float, grid: Grid) -> np.ndarray:
    """Through int8 or uint8 and back, value by value."""
    low, high = min(low, 0.0), max(high, 0.0)
    values = values.astype(np.float64)
    if grid == "symmetric":
        scale = max(-low, high) / 127
        return np.asarray(np.clip(np.rint(values / scale), -127, 127) * scale)
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    return np.asarray((np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale)


def error(values: np.ndarray, low: float, high: float, grid: Grid) -> float:
    return float(np.mean((quantize(values, low, high, grid) - values) ** 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_clipped_is_the_share_of_raw_values_outside(method: Method, kind: str) -> None:
    values = draw(kind)
    observer = observe(values)
    chosen = choose_range(observer, method, percent=99.0, reason="a test")
    low, high = chosen.chosen
    assert (chosen.method, chosen.reason) == (method, "a test")
    assert chosen.observed == (values.min(), values.max())
    assert values.min() <= low <= high <= values.max()
    share = float(np.mean((values < low) | (values > high)))
    assert chosen.clipped == pytest.approx(share, abs=2 / len(values))
    assert chosen.clipped == outside(observer, low, high)


def test_every_method_but_minmax_needs_a_histogram() -> None:
    observer = Observer("x", histogram=False)
    observer.add(draw("normal"))
    assert choose_range(observer, "minmax").clipped == 0.0
    for method in METHODS[1:]:
        with pytest.raises(ValueError, match="'x' was observed without a histogram"):
            choose_range(observer, method)


def test_percentile_of_100_is_the_observed_range() -> None:
    assert percentile(observe(np.array([-3.0, 0.1, 7.5], np.float32)), 100.0) == (-3.0, 7.5)


def entropy_reference(values: np.ndarray, width: float) -> dict[int, float]:
    """Migacz's algorithm word for word: end -> divergence, level by level and bin by bin."""
    count = int(np.ceil(np.abs(values).max() / width))
    bins = np.histogram(np.abs(values.astype(np.float64)), bins=np.arange(count + 1) * width)[0]
    bins = bins.astype(np.float64)
    bins[0] = bins[1]
    result = {}
    for end in range(count, LEVELS, -16):
        p = bins[:end].copy()
        p[-1] += bins[end:].sum()
        q = np.zeros(end)
        levels = np.arange(end) * LEVELS // end
        for level in range(LEVELS):
            members = np.flatnonzero((levels == level) & (bins[:end] > 0))
            q[members] = bins[members].mean() if len(members) else 0.0
        p, q = p / p.sum(), q / q.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            result[end] = float(np.where(p > 0, p * np.log(p / q), 0.0).sum())
    return result


@pytest.mark.parametrize("kind", ["heavy", "relu"])
def test_entropy_is_migaczs_on_the_raw_values(kind: str) -> None:
    values = draw(kind, count=4000) / np.float32(3)
    observer = observe(values)
    width = observer.histogram.width
    reference = entropy_reference(values, width)
    magnitudes = np.histogram(np.abs(values), bins=np.arange(BINS // 2 + 1) * width)[0].astype(
        float
    )
    magnitudes[0] = magnitudes[1]
    for end in list(reference)[::20]:
        assert divergence(magnitudes, end) == pytest.approx(reference[end], rel=1e-9)
    threshold = min(reference, key=lambda end: reference[end]) * width
    low, high = entropy(observer)
    assert low == pytest.approx(max(values.min(), -threshold))
    assert high == pytest.approx(min(values.max(), threshold))


def test_entropy_keeps_what_fits_its_levels_anyway() -> None:
    assert entropy(observe(np.zeros(5, np.float32))) == (0.0, 0.0)


@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize("grid", ["symmetric", "asymmetric"])
def test_the_expected_error_is_that_of_the_raw_values(grid: Grid, kind: str) -> None:
    values = draw(kind)
    observer = observe(values)
    for fraction in (1.0, 0.7, 0.4, 0.15):
        low, high = fraction * observer.low, fraction * observer.high
        expected = error(values, low, high, grid)
        found = squared_error(observer.histogram, np.array([low]), np.array([high]), grid)
        assert found[0] == pytest.approx(expected, rel=0.06), fraction


@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize("grids", [("symmetric",), ("asymmetric",), ("symmetric", "asymmetric")])
def test_mse_has_the_least_error_of_a_search_over_raw_values(
    grids: tuple[Grid, ...], kind: str
) -> None:
    values = draw(kind)

    def total(low: float, high: float) -> float:
        return sum(error(values, low, high, grid) for grid in grids)

    fractions = np.linspace(0.05, 1.0, 20)
    lows = fractions * values.min() if values.min() < 0 else [values.min()]
    least = min(total(low, high) for low in lows for high in fractions * values.max())
    found = total(*mse(observe(values), grids))
    assert found <= 1.02 * least
    if kind == "heavy":
        assert found < 0.98 * total(values.min(), values.max())


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 1000), st.integers(1, 9), st.sampled_from(METHODS))
def test_one_pass_gives_the_same_in_any_batches(
    kind: str, seed: int, parts: int, method: Method
) -> None:
    values = draw(kind, seed, count=500)
    assert choose_range(observe(values, parts), method) == choose_range(observe(values, 1), method)


def test_a_tensor_says_what_bounds_it() -> None:
    network = Network()
    clip = (network.conv(16), network.relu6())[1]
    unbounded = network.conv(16)
    relu = network.activate("Relu")
    network.conv(16)
    sigmoid = network.activate("Sigmoid")
    pooled = network.max_pool()
    network.conv(16)
    open_end = network.node(
        "Clip", [network.tensor, network.constant("zero", np.float32(0))], "open_end"
    )
    gated = network.node("Mul", [open_end, pooled], "gated")
    joined = network.node("Concat", [pooled, gated], "joined", axis=1)
    network.channels *= 2
    graph = Graph(network.finish())
    assert bound(graph, "normal") == "pixels"
    assert bound(graph, clip) == "Clip from 0 to 6"
    assert bound(graph, sigmoid) == "Sigmoid from 0 to 1"
    assert bound(graph, pooled) == "MaxPool of Sigmoid from 0 to 1"
    for tensor in (unbounded, relu, open_end, gated, joined, "features", "image"):
        assert bound(graph, tensor) == "", tensor


def score(method: str, *sqnr: float) -> MethodScore:
    trt, ort = (Fidelity(sqnr_db=ratio, agreement=1.0) for ratio in sqnr)
    return MethodScore(method=method, tensorrt=trt, onnxruntime=ort)


def test_minmax_stays_unless_another_is_better_by_the_margin() -> None:
    first = score("minmax", 20.0, 24.0)
    near = score("mse", 20.0, 24.0 + 1.9 * MARGIN_DB)
    better = score("percentile", 19.0, 25.0 + 2.1 * MARGIN_DB)
    method, reason = decide([first, near])
    assert (method, "no method is better than minmax (22.00 dB)" in reason) == ("minmax", True)
    method, reason = decide([first, near, better])
    assert method == "percentile"
    assert "minmax has 22.00 dB" in reason


def test_better_ranges_score_better_in_both_dialects() -> None:
    model, images = small_cnn(), draw_images(24)
    good = make_table(model, images, CalibrationSettings(method="minmax"))
    bad = make_table(model, images[:2] // 8 + 112, CalibrationSettings(method="minmax"))
    scores = compare(model, {"good": good, "bad": bad}, images)
    assert [score.method for score in scores] == ["good", "bad"]
    for dialect in ("tensorrt", "onnxruntime"):
        one, other = (getattr(score, dialect) for score in scores)
        assert one.sqnr_db > other.sqnr_db + 3
        assert 0 <= other.agreement <= one.agreement <= 1


def test_a_graph_with_nothing_to_quantize_scores_what_a_file_can_hold() -> None:
    network = Network()
    network.node("Relu", [network.tensor], "rectified")
    model: onnx.ModelProto = network.finish()
    images = draw_images(4)
    (score,) = compare(model, {"minmax": make_table(model, images)}, images)
    assert score.tensorrt == Fidelity(sqnr_db=LARGEST_DB, agreement=1.0)
