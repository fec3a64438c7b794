"""``python -m calibration RECIPE``: what it says, what it leaves, and how it ends."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from calibration.__main__ import describe, main
from runtime.dataset import Dataset, write_dataset
from tests.calibration_graphs import SIZE, small_cnn, write_example, write_examples

CLASSES = ("bad", "dark", "good")
RECIPE = f"""
name = "cells"
[data]
source = "elpv"
[input]
size = [{SIZE}, {SIZE}]
channels = 1
[calibration]
images = 16
method = "percentile"
percentile = 99.0
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "cells.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def build(recipe: Path) -> Path:
    """The recipe's build folder as train and export leave it: 40 good images and a black one."""
    folder = recipe.parent / "build" / "cells"
    dark = write_example(recipe.parent / "black.png", Image.new("L", (SIZE, SIZE)), "dark")
    examples = (*write_examples(recipe.parent, 40), dark)
    write_dataset(folder / "train" / "images.json", Dataset(classes=CLASSES, examples=examples))
    (folder / "calibration").mkdir()
    onnx.save(small_cnn(), folder / "calibration" / "fp32.onnx")
    return folder


def test_what_must_run_before_is_named(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe)]) == 1
    assert "run `python -m train RECIPE` first" in capsys.readouterr().err
    build = tmp_path / "build" / "cells"
    dataset = Dataset(classes=CLASSES, examples=tuple(write_examples(tmp_path, 10)))
    write_dataset(build / "train" / "images.json", dataset)
    assert main([str(recipe)]) == 1
    assert "fp32.onnx: no such graph; run `python -m export" in capsys.readouterr().err
    (build / "calibration").mkdir()
    (build / "calibration" / "fp32.onnx").write_bytes(b"nonsense")
    assert main([str(recipe)]) == 1
    assert "not an ONNX model" in capsys.readouterr().err


def test_it_says_what_it_did_and_what_to_do_next(
    recipe: Path, build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe)]) == 0
    said = capsys.readouterr().out
    assert "16 of 41 images: bad 8, dark 0, good 8" in said
    assert f"1 refused\n  {recipe.parent}/black.png: black: no level above 0" in said
    assert "method percentile 99.0, table measured: there was none" in said
    assert "most clipped:" in said
    assert said.endswith("next: add images of dark to the training split, then train again\n")
    left = {path.name for path in (build / "calibration").iterdir()}
    assert left == {
        "fp32.onnx", "features.npz", "images.json", "table.json", "gallery.html", "ranges.png"
    }  # fmt: skip
    assert "held-out training images" in said
    page = (build / "calibration" / "gallery.html").read_text()
    assert page.count("<img") == 17


def test_json_holds_what_a_program_wants(
    recipe: Path, build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe)]) == 0
    capsys.readouterr()
    assert main([str(recipe), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["reused"] is True
    assert summary["per_class"] == {"bad": 8, "dark": 0, "good": 8}
    assert 0 < summary["most_clipped"][0]["clipped"] <= 0.011
    assert all((build / "calibration" / name).is_file() for name in summary["files"])


def test_too_few_images_for_the_recipe_is_the_next_thing_to_mend(
    recipe: Path, build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = Dataset(classes=("bad", "good"), examples=tuple(write_examples(recipe.parent, 12)))
    write_dataset(build / "train" / "images.json", dataset)
    assert main([str(recipe)]) == 0
    said = capsys.readouterr().out
    assert "next: add images to the training split: 12 of the 16 wanted are usable" in said


def test_noise_instead_of_the_field_ends_with_an_error(
    recipe: Path, build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = np.random.default_rng(0).normal(128, 50, (20, 96, 96)).clip(0, 255)
    noise = [
        write_example(recipe.parent / f"noise-{number}.png", Image.fromarray(levels), "good")
        for number, levels in enumerate(drawn.astype(np.uint8))
    ]
    examples = (*write_examples(recipe.parent, 10), *noise)
    write_dataset(build / "train" / "images.json", Dataset(classes=CLASSES, examples=examples))
    assert main([str(recipe)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "calibration images are unusable, expected at most 50%" in captured.err
    assert "noise: neighbouring pixels correlate by" in captured.err
    assert not (build / "calibration" / "table.json").exists()


def test_methods_are_compared_for_both_forms(
    recipe: Path, build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe), "--compare", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["methods"]
    names = [score["method"] for score in found]
    assert names == ["minmax", "percentile", "entropy", "mse", "the table: percentile 99.0"]
    assert found[1]["int8"] == found[-1]["int8"], "the table was made by percentile"
    assert len({score["int8-cpu"]["sqnr_db"] for score in found}) > 2
    assert main([str(recipe), "--compare"]) == 0
    assert "methods, by the logits on held-out images" in capsys.readouterr().out


def test_sensitivity_lists_every_layer_of_both_forms_worst_first(
    recipe: Path, build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe), "--sensitivity", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    found = summary["sensitivity"]
    assert list(found) == ["int8", "int8-cpu"]
    for layers in found.values():
        shares = [layer["error_share"] for layer in layers]
        assert len(shares) > 2
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1.0)
        # 24 of the 40 good images were not chosen; those judge.
        assert {layer["images"] for layer in layers} == {24}
    said = describe(summary)
    assert "int8-cpu: layers by their share of the error, each alone in INT8" in said
    assert found["int8"][0]["name"] in said


def test_help_says_what_to_look_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    for word in ("gallery.html", "ranges.png", "What to look for", "--sensitivity", "--json"):
        assert word in said


def test_it_can_be_interrupted(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("calibration.__main__.run", interrupt)
    assert main([str(recipe)]) == 130
    assert capsys.readouterr().err.strip() == "calibration: interrupted"
