"""Calibration from images to table, by value and by command."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import onnx
import pytest

import calibration
from calibration.compare import compare, decide
from calibration.graph import Graph
from calibration.methods import METHODS
from calibration.pipeline import Calibration, calibrate, compare_methods
from calibration.ranges import shares_outside
from runtime.dataset import Example
from runtime.errors import ExportError
from runtime.preprocess import InputSpec, UInt8, preprocess_batch
from runtime.recipe import CalibrationSettings
from tests.calibration_graphs import SIZE, Network, small_cnn, write_examples

SPEC = InputSpec(size=(SIZE, SIZE), channels=1)
CLASSES = ("bad", "good")


def run(model: onnx.ModelProto, examples: list[Example], folder: Path, **other: int) -> Calibration:
    settings = CalibrationSettings(method="minmax", images=other.pop("images", 16))
    return calibrate(model, examples, CLASSES, SPEC, settings, seed=0, folder=folder)


def test_a_table_is_used_again_only_if_nothing_changed(tmp_path: Path) -> None:
    examples, folder = write_examples(tmp_path), tmp_path / "calibration"
    first = run(small_cnn(), examples, folder)
    assert (first.reused, first.reason) == (False, "there was none")
    assert first.per_class == {"bad": 8, "good": 8}
    second = run(small_cnn(), examples, folder)
    assert second.reused
    assert second.table == first.table
    assert second.reason == "graph, images, preprocessing and method are as they were"
    retrained = run(small_cnn(seed=1), examples, folder)
    assert not retrained.reused
    assert retrained.reason.startswith("changed since the last one: graph")
    fewer = run(small_cnn(seed=1), examples, folder, images=8)
    assert not fewer.reused
    assert fewer.reason == "changed since the last one: images, held_out"
    (folder / "table.json").write_text("{")
    mended = run(small_cnn(), examples, folder)
    assert "not a calibration table" in mended.reason
    assert mended.table == first.table


def test_what_calibrate_leaves_is_what_the_dialects_read(tmp_path: Path) -> None:
    model = small_cnn()
    done = calibrate(
        model,
        write_examples(tmp_path),
        CLASSES,
        SPEC,
        CalibrationSettings(images=16),
        seed=0,
        folder=tmp_path,
    )
    table = calibration.read_table(tmp_path / "table.json")
    assert table == done.table
    for dialect in (calibration.tensorrt_dialect, calibration.onnxruntime_dialect):
        assert dialect.emit(model, table).quantized
    chosen = json.loads((tmp_path / "images.json").read_text())["chosen"]
    assert [image["sha256"] for image in chosen] == list(done.choice.digests)


def calibrate_by(
    method: Literal["auto", "percentile"],
    model: onnx.ModelProto,
    examples: list[Example],
    folder: Path,
    *,
    images: int = 16,
) -> Calibration:
    settings = CalibrationSettings(method=method, images=images)
    return calibrate(model, examples, CLASSES, SPEC, settings, seed=0, folder=folder)


def test_auto_takes_the_method_whose_logits_are_nearest_on_held_out_images(tmp_path: Path) -> None:
    model, examples = small_cnn(), write_examples(tmp_path, 40)
    done = calibrate_by("auto", model, examples, tmp_path)
    table = done.table
    assert table == calibration.read_table(tmp_path / "table.json")
    either = [*METHODS, *(f"{method}, bounded tensors percentile" for method in METHODS)]
    assert [score.method for score in table.scores] == either
    best, reason = decide(table.scores)
    assert table.reason == reason
    assert not {example.sha256 for example in done.held_out} & set(done.choice.digests)
    assert table.held_out == len(done.held_out) == 24
    methods = {tensor.method for tensor in table.tensors.values() if tensor.reason == "unbounded"}
    unbounded, _, of_bounded = best.partition(", bounded tensors ")
    assert methods == {unbounded}
    bounded = [tensor for tensor in table.tensors.values() if tensor.reason != "unbounded"]
    assert {tensor.method for tensor in bounded} == {of_bounded or "minmax"}
    assert any(tensor.reason == "bounded: Clip from 0 to 6" for tensor in bounded)
    images = preprocess_batch([example.path for example in done.held_out], SPEC)
    again = compare(model, {best: table}, images)
    assert again == tuple(score for score in table.scores if score.method == best)


def test_where_nothing_is_unbounded_or_held_out_nothing_is_compared(tmp_path: Path) -> None:
    few = calibrate_by("auto", small_cnn(), write_examples(tmp_path), tmp_path).table
    assert (few.scores, few.held_out) == ((), 4)
    assert few.reason == "only 4 held-out images, 16 are needed to compare methods: MinMax"
    network = Network()
    network.conv(16)
    network.activate("Clip")
    network.conv(16)
    network.activate("Clip")
    model, examples = network.finish(), write_examples(tmp_path, 40)
    done = calibrate_by("auto", model, examples, tmp_path / "bounded").table
    assert (done.scores, done.held_out) == ((), 24)
    assert done.reason == "every tensor is bounded: MinMax, without a comparison"


def test_a_reader_sees_what_held_out_images_lose(tmp_path: Path) -> None:
    model, examples = small_cnn(), write_examples(tmp_path, 40)
    done = calibrate_by("percentile", model, examples, tmp_path, images=8)
    images = preprocess_batch([example.path for example in done.held_out], SPEC)
    chosen = {name: tensor.chosen for name, tensor in done.table.tensors.items()}
    shares = shares_outside(Graph(model), chosen, [images])
    assert {n: t.held_out_outside for n, t in done.table.tensors.items()} == shares
    assert max(shares.values()) > 0
    all_taken = calibrate_by("percentile", model, examples, tmp_path, images=40)
    assert all_taken.held_out == ()
    assert not any(tensor.held_out_outside for tensor in all_taken.table.tensors.values())


def test_methods_are_compared_on_request(tmp_path: Path) -> None:
    model, examples = small_cnn(), write_examples(tmp_path, 40)
    settings = CalibrationSettings(method="percentile", images=16)
    done = calibrate_by("percentile", model, examples, tmp_path)
    scores = compare_methods(model, done, SPEC, settings)
    assert [score.method for score in scores] == [*METHODS, "the table: percentile 99.99"]
    assert scores[1].sqnr_db == scores[-1].sqnr_db != scores[2].sqnr_db


def test_features_are_computed_once(tmp_path: Path) -> None:
    examples = write_examples(tmp_path)
    seen: list[int] = []

    def track(batches: Iterable[UInt8]) -> Iterable[UInt8]:
        for batch in batches:
            seen.append(len(batch))
            yield batch

    def passes(model: onnx.ModelProto) -> int:
        seen.clear()
        calibrate(
            model,
            examples,
            CLASSES,
            SPEC,
            CalibrationSettings(images=16),
            seed=0,
            folder=tmp_path,
            track=track,
        )
        return sum(seen)

    assert passes(small_cnn()) == 20 + 16 + 4, "features, calibration, held out"
    assert passes(small_cnn()) == 0
    assert passes(small_cnn(seed=1)) == 20 + 16 + 4
    (tmp_path / "features.npz").write_bytes(b"PK nonsense")
    assert passes(small_cnn(seed=1)) == 20


def test_few_images_and_missing_classes_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = [example for example in write_examples(tmp_path) if example.label == "good"]
    with caplog.at_level(logging.WARNING):
        run(small_cnn(), good, tmp_path)
    assert "only 10 calibration images, 64 or more are advised" in caplog.messages
    assert "no calibration image of class bad" in caplog.messages


def test_a_graph_of_another_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="expected a graph with mean 128 and std 128, got mean 0"):
        run(small_cnn(mean=0), write_examples(tmp_path), tmp_path)
    wide = InputSpec(size=(32, 32), channels=1)
    with pytest.raises(ExportError, match=r"expected images \[32, 32, 1\], got \[16"):
        calibrate(small_cnn(), [], CLASSES, wide, CalibrationSettings(), seed=0, folder=tmp_path)


def test_the_face_is_what_it_says() -> None:
    assert all(hasattr(calibration, name) for name in calibration.__all__)
