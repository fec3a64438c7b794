"""Ranges against NumPy on the same activations, and a table that knows what it belongs to."""

from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper

from calibration.graph import Graph
from calibration.observer import BINS, Histogram
from calibration.ranges import measure, shares_outside
from calibration.table import (
    Fidelity,
    MethodScore,
    Table,
    TensorRange,
    differences,
    read_table,
    table_key,
    write_table,
)
from runtime.errors import DataError, ExportError
from runtime.preprocess import InputSpec, UInt8
from runtime.recipe import CalibrationSettings
from tests.calibration_graphs import draw_images, make_table, small_cnn

MINMAX = CalibrationSettings(method="minmax")


def activations(model: onnx.ModelProto, images: UInt8) -> dict[str, np.ndarray]:
    names = Graph(model).observable()
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(opened.SerializeToString())
    return dict(zip(names, session.run(list(names), {"image": images}), strict=True))


def test_minmax_and_channel_means_are_those_of_all_activations_at_once() -> None:
    model, images = small_cnn(), draw_images(24)
    reference = activations(model, images)
    measured = measure(model, [images[:5], images[5:6], images[6:]], MINMAX)
    assert measured.keys() == reference.keys()
    read_by_layers = {layer.input for layer in Graph(model).layers()}
    for name, values in reference.items():
        expected = (values.min(), values.max())
        assert measured[name].observed == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert measured[name].chosen == measured[name].observed
        assert measured[name].clipped == 0.0
        means = values.mean(axis=(0, 2, 3)[: values.ndim - 1]) if name in read_by_layers else []
        assert measured[name].channel_means == pytest.approx(list(means), rel=1e-4, abs=1e-5)


def test_percentile_is_within_a_bin_of_the_exact_quantile() -> None:
    model, images = small_cnn(), draw_images(24)
    reference = activations(model, images)
    measured = measure(model, [images], CalibrationSettings(method="percentile", percentile=99))
    for name, values in reference.items():
        tail = 0.01 if values.min() >= 0 else 0.005
        bin_width = 2.0 * 2.0 ** float(np.ceil(np.log2(np.abs(values).max()))) / BINS
        low, high = measured[name].chosen
        below, above = (
            np.quantile(values, [tail, 1 - tail], method=side) for side in ("lower", "higher")
        )
        assert below[1] - bin_width <= high <= above[1] + bin_width
        if values.min() < 0:
            assert below[0] - bin_width <= low <= above[0] + bin_width
        else:
            assert low == pytest.approx(float(values.min()))
        outside = float(np.mean((values < low - 1e-6) | (values > high + 1e-6)))
        assert measured[name].clipped == pytest.approx(outside, abs=2e-3)
        assert measured[name].clipped <= 0.01


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.integers(1, 200),
        elements=st.floats(-(2.0**30), 2.0**30, width=32, allow_subnormal=False),
    )
)
def test_a_histogram_that_grew_equals_one_that_had_the_room(values: np.ndarray) -> None:
    grown = Histogram()
    for value in values:
        grown.add(np.array([value]), float(abs(value)))
    roomy = Histogram(limit=grown.limit)
    roomy.add(values, float(np.abs(values).max()))
    np.testing.assert_array_equal(grown.counts, roomy.counts)
    edges = grown.edges
    expected, _ = np.histogram(values.astype(np.float64), bins=edges)
    np.testing.assert_array_equal(grown.counts, expected)


def test_shares_outside_are_those_of_all_activations_at_once() -> None:
    model, images = small_cnn(), draw_images(12, seed=3)
    ranges = {
        name: (float(values.min()) * 0.9, float(np.quantile(values, 0.9)))
        for name, values in activations(model, draw_images(12)).items()
    }
    measured = shares_outside(Graph(model), ranges, [images[:5], images[5:]])
    for name, values in activations(model, images).items():
        low, high = min(ranges[name][0], 0.0), max(ranges[name][1], 0.0)
        expected = float(np.mean((values < low) | (values > high)))
        assert measured[name] == pytest.approx(expected, abs=2.5 / values.size), name
    assert sum(share > 0 for share in measured.values()) > len(measured) / 2


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype(np.float32), "float32"),
        (draw_images(2)[:, :8, :8], r"uint8 \[2, 8, 8, 1\]"),
        (draw_images(2, channels=3), r"uint8 \[2, 16, 16, 3\]"),
        (draw_images(2)[0], r"uint8 \[16, 16, 1\]"),
    ],
)
def test_what_is_no_batch_of_the_graphs_images_is_refused(images: np.ndarray, got: str) -> None:
    expected = rf"expected calibration images uint8 \[N, 16, 16, 1\], got {got}.*preprocess"
    with pytest.raises(DataError, match=expected):
        measure(small_cnn(), [images], MINMAX)


@pytest.mark.parametrize(("bad", "word"), [(np.nan, "NaN"), (np.inf, "infinity")])
def test_activations_that_are_not_finite_are_named(bad: float, word: str) -> None:
    model = small_cnn()
    weight = next(t for t in model.graph.initializer if t.name == "t6_weight")
    values = numpy_helper.to_array(weight).copy()
    values[:] = bad
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    with pytest.raises(ExportError, match=rf"tensor 't7?6?\d?' holds (NaN|{word})"):
        measure(model, [draw_images(2)], MINMAX)


def test_batches_pass_through_the_progress_bar() -> None:
    seen: list[int] = []

    def track(batches: Iterable[UInt8]) -> Iterable[UInt8]:
        for batch in batches:
            seen.append(len(batch))
            yield batch

    images = draw_images(5)
    measure(small_cnn(), (images[i : i + 2] for i in range(0, 5, 2)), MINMAX, track=track)
    assert seen == [2, 2, 1]


def test_no_images_are_an_error() -> None:
    with pytest.raises(DataError, match="got none"):
        measure(small_cnn(), [], MINMAX)


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    settings = CalibrationSettings(method="percentile", percentile=99.5)
    table = make_table(small_cnn(), draw_images(8), settings)
    fidelity = Fidelity(sqnr_db=20.0, agreement=0.9)
    scores = tuple(
        MethodScore(method=name, tensorrt=fidelity, onnxruntime=fidelity) for name in ("a", "b")
    )
    table = msgspec.structs.replace(table, scores=scores, reason="a is best", held_out=3)
    path = tmp_path / "table.json"
    write_table(path, table)
    assert read_table(path) == table
    tensor_lines = [line for line in path.read_text().splitlines() if '"observed"' in line]
    assert len(tensor_lines) == len(table.tensors), "one line a tensor, for people and for diff"
    assert [line.count('"agreement"') for line in path.read_text().splitlines()].count(2) == 2
    marked = [line for line in tensor_lines if '"clipped"' in line]
    clipping = [tensor for tensor in table.tensors.values() if tensor.clipped > 0]
    assert 0 < len(marked) == len(clipping) <= len(table.tensors) - 2, "those that clip stand out"


def test_a_key_changes_with_each_of_its_parts_and_with_nothing_else() -> None:
    model, spec = small_cnn(), InputSpec()
    percent = CalibrationSettings(method="percentile")
    key = table_key(model, ["a", "b"], spec, MINMAX)
    assert differences(key, table_key(small_cnn(seed=1), ["a", "b"], spec, MINMAX)) == ("graph",)
    assert differences(key, table_key(model, ["b", "a"], spec, MINMAX)) == ("images",)
    other = InputSpec(size=(64, 64))
    assert differences(key, table_key(model, ["a", "b"], other, MINMAX)) == ("preprocessing",)
    assert differences(key, table_key(model, ["a", "b"], spec, percent)) == ("method",)
    looser = CalibrationSettings(method="percentile", percentile=99.9)
    one, two = (table_key(model, ["a"], spec, s) for s in (percent, looser))
    assert differences(one, two) == ("method",)
    assert differences(key, table_key(model, ["a", "b"], spec, MINMAX, held_out=["c"])) == (
        "held_out",
    )
    auto, looser_auto = (CalibrationSettings(percentile=percent) for percent in (99.99, 99.9))
    assert differences(
        table_key(model, ["a"], spec, auto), table_key(model, ["a"], spec, looser_auto)
    ) == ("method",)
    unused = CalibrationSettings(method="minmax", percentile=99.5, images=9)
    noted = small_cnn()
    noted.graph.node[4].doc_string = noted.producer_version = "written elsewhere"
    assert differences(key, table_key(noted, ["a", "b"], spec, unused)) == ()


def test_a_table_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    with pytest.raises(ExportError, match="run `python -m calibration RECIPE`"):
        read_table(path)
    path.write_text('{"key": 1}')
    with pytest.raises(ExportError, match="not a calibration table"):
        read_table(path)
    key = table_key(small_cnn(), [], InputSpec(), MINMAX)
    table = Table(
        key=key,
        images=1,
        tensors={"x": TensorRange(observed=(0, 1), chosen=(0, 1), channel_means=())},
    )
    assert table.range("x") == (0, 1)
    with pytest.raises(ExportError, match="no range for tensor 'y'"):
        table.range("y")
    with pytest.raises(ExportError, match="no channel means for tensor 'x'"):
        table.channel_means("x")
