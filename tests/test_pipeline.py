"""The main job on the quick recipe: what each stage leaves behind is whole and true."""

import functools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from calibration import Emitted, count_kernels, onnxruntime_dialect, read_table
from export import pipeline
from export.__main__ import main as export
from export.onnx_graph import to_onnx
from export.parity import BATCH_SIZES, check_checkpoint
from export.release import Release, read_release
from runtime.bundle import Bundle
from runtime.dataset import read_dataset
from runtime.errors import ExportError
from runtime.manifest import Quality
from runtime.preprocess import preprocess_batch
from runtime.recipe import GateSettings, load_recipe
from tests.conftest import draw_nothing
from train.__main__ import main as train
from train.checkpoint import CheckpointFacts, read_checkpoint
from train.model import ImageClassifier
from train.record import Training

QUICK = Path(__file__).resolve().parent.parent / "train" / "recipes" / "quick.toml"


@pytest.fixture(autouse=True)
def shortly_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test looks at speeds, nor at pictures of what it exports itself."""
    monkeypatch.setattr(pipeline, "TIMED_SECONDS", 0.2)
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def build(quick: Path) -> Path:
    return quick / "build" / "quick"


@pytest.fixture(scope="module")
def release(build: Path) -> Release:
    return msgspec.json.decode((build / "release.json").read_bytes(), type=Release)


@pytest.fixture(scope="module")
def model(build: Path) -> onnx.ModelProto:
    return onnx.load(build / "bundle" / "fp32.onnx")


def test_training_leaves_its_record_checkpoint_and_log(build: Path) -> None:
    training = msgspec.json.decode((build / "train/training.json").read_bytes(), type=Training)
    names = [rung.name for rung in training.rungs]
    assert names[:3] == ["as is", "threshold", "feature extraction"]
    assert {rung.rung for rung in training.rungs} == {0, 1, 2}
    assert {skip.name for skip in training.skipped} == {"CORAL", "adversarial"}
    assert [rung.kept for rung in training.rungs].count(True) == 1
    for rung in training.rungs:
        assert rung.reason
        assert (rung.verdict is None) == (rung.name == "as is")
        assert set(rung.scores) == {
            "source-validation", "source-test", "target-validation", "target-test",
        }  # fmt: skip
    assert training.ended == "every rung that the data allows was tried"
    assert list((build / "train/tensorboard").rglob("events.out.tfevents.*"))
    assert not list((build / "train").glob("re*.safetensors")), "states of a finished run go"
    _, facts = read_checkpoint(build / "train/checkpoint.safetensors")
    assert facts.classes == ("defective", "functional")
    assert facts.rung == training.rung


def test_training_again_has_nothing_to_do(
    quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(quick)
    before = (quick / "build/quick/train/checkpoint.safetensors").stat().st_mtime_ns
    assert train([str(QUICK), "--json"]) == 0
    captured = capsys.readouterr()
    assert "nothing to do" in captured.err
    assert json.loads(captured.out)["name"] == "quick"
    assert (quick / "build/quick/train/checkpoint.safetensors").stat().st_mtime_ns == before


def test_the_graph_keeps_the_contract(model: onnx.ModelProto) -> None:
    assert model.ir_version == 10
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    (image,) = model.graph.input
    assert image.name == "image"
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_value for d in image.type.tensor_type.shape.dim][1:] == [48, 48, 1]
    assert image.type.tensor_type.shape.dim[0].dim_param
    assert [o.name for o in model.graph.output] == ["logits", "features"]
    assert [n.op_type for n in model.graph.node][:4] == ["Cast", "Transpose", "Mul", "Add"]
    assert [n.op_type for n in model.graph.node][-3:] == ["GlobalAveragePool", "Flatten", "Gemm"]
    onnx.checker.check_model(model, full_check=True)
    metadata = {p.key: p.value for p in model.metadata_props}
    assert json.loads(metadata["labels"]) == ["defective", "functional"]


def test_the_graph_carries_no_trace_of_the_machine(build: Path) -> None:
    data = (build / "bundle/fp32.onnx").read_bytes()
    assert b"site-packages" not in data
    assert b"stack_trace" not in data
    assert str(Path(__file__).parent.parent).encode() not in data


def test_layers_have_the_checkpoint_s_names(model: onnx.ModelProto, build: Path) -> None:
    checkpoint, _ = read_checkpoint(build / "train/checkpoint.safetensors")
    convolutions = [n.name for n in model.graph.node if n.op_type == "Conv"]
    assert len(set(convolutions)) == 49
    assert set(convolutions) <= {name for name, _ in checkpoint.named_modules()}


@pytest.mark.parametrize("size", BATCH_SIZES)
@pytest.mark.parametrize("form", ["fp32", "fp16", "int8", "int8-cpu"])
def test_every_form_takes_every_batch(build: Path, form: str, size: int) -> None:
    bundle = Bundle.open(build / "bundle")
    images = np.resize(bundle.golden()["images"], (size, *bundle.manifest.input.shape))
    session = onnxruntime.InferenceSession(bundle.model(form), providers=["CPUExecutionProvider"])
    logits, features = session.run(["logits", "features"], {"image": images})
    assert logits.shape == (size, 2)
    assert features.shape == (size, 1280)
    assert logits.dtype == features.dtype == np.float32


def test_the_fp32_graph_is_the_checkpoint(build: Path) -> None:
    """On real held-out target images, against torch itself."""
    checkpoint, facts = read_checkpoint(build / "train/checkpoint.safetensors")
    dataset = read_dataset(build / "train/images.json")
    paths = [e.path for e in dataset.select("target", "test")[:12]]
    images = preprocess_batch(paths, facts.input)
    with torch.inference_mode():
        expected, _ = checkpoint(torch.from_numpy(images))
    session = onnxruntime.InferenceSession(build / "bundle/fp32.onnx")
    (logits,) = session.run(["logits"], {"image": images})
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-3, atol=1e-3)


def kept_float(release: Release, form: str) -> set[str]:
    """Layers that the ladder left float, of the rung that was released."""
    return set(next(r for r in release.forms if r.form == form).attempts[-1].kept_float)


def test_every_quantized_convolution_is_a_qlinearconv(build: Path, release: Release) -> None:
    kernels = count_kernels(onnx.load(build / "bundle/int8-cpu.onnx"))
    kept = kept_float(release, "int8-cpu") - {"head"}
    assert kernels["QLinearConv"] == 49 - len(kept)
    assert kernels.get("Conv", 0) + kernels.get("FusedConv", 0) == len(kept)
    # Whatever the ladder leaves float, the graph that it starts from has nothing that is.
    graph = onnx.load(build / "calibration/fp32.onnx")
    table = read_table(build / "calibration/table.json")
    kernels = count_kernels(onnxruntime_dialect.emit(graph, table).model)
    assert kernels["QLinearConv"] == 49
    assert not {"Conv", "FusedConv", "Clip"} & set(kernels)
    assert kernels.get("QuantizeLinear", 0) == 0, "the image's byte is the quantized value"


def test_engines_were_built_with_every_convolution_in_its_precision(release: Release) -> None:
    pytest.importorskip("tensorrt_rtx")
    forms = {report.form: report for report in release.forms}
    for form, precision in (("fp16", "FP16"), ("int8", "INT8")):
        engine = forms[form].engine
        assert engine is not None
        assert engine.built
        assert engine.passed
        kept = kept_float(release, form) - {"head"}
        expected = {precision: 49 - len(kept), "FP32": len(kept)}
        expected = {name: count for name, count in expected.items() if count}
        assert [build.target for build in engine.builds] == ["8.6", "8.9", "12.0"]
        assert all(build.precisions == expected for build in engine.builds)


def test_the_manifest_says_what_was_measured(build: Path, release: Release) -> None:
    manifest = Bundle.open(build / "bundle").manifest
    for artifact in manifest.artifacts:
        report = next(r for r in release.forms if r.form == artifact.form)
        assert report.released
        assert artifact.quality == report.attempts[-1].quality
        assert artifact.quality.samples == 40
    assert manifest.labels == ("defective", "functional")
    assert Counter(a.form for a in manifest.artifacts).most_common(1)[0][1] == 1


def test_the_bundle_carries_its_record_and_is_judged_again_from_it(
    quick: Path, build: Path, release: Release, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_release(Bundle.open(build / "bundle")) == release
    assert release.gate == load_recipe(QUICK).gate
    assert export(["gate", str(build / "quick-0.1.0.zip"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == "the recorded images"
    assert [form["form"] for form in report["forms"]] == ["fp32", "fp16", "int8", "int8-cpu"]
    for form in report["forms"]:
        assert form["now"]["accuracy"] == form["recorded"]["accuracy"]


def test_calibration_saw_training_images_only(build: Path) -> None:
    dataset = read_dataset(build / "train/images.json")
    allowed = {e.path for e in dataset.select("target", "train")}
    chosen = json.loads((build / "calibration/images.json").read_text())["chosen"]
    assert len(chosen) == 32
    assert {image["path"] for image in chosen} <= allowed
    table = read_table(build / "calibration/table.json")
    assert table.images == 32


@pytest.fixture
def again(build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build folder to export in once more; the checkpoint's graph and table are there already."""
    folder = tmp_path / "build" / "quick"
    for room in ("train", "calibration"):
        shutil.copytree(build / room, folder / room)
    graphs = iter([onnx.load(build / "calibration" / "fp32.onnx")])

    def first_known(model: ImageClassifier, facts: CheckpointFacts) -> onnx.ModelProto:
        return next(graphs, None) or to_onnx(model, facts)

    monkeypatch.setattr(pipeline, "to_onnx", first_known)
    monkeypatch.chdir(tmp_path)
    return folder


def test_nothing_is_released_if_the_graph_is_not_the_checkpoint(
    again: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A graph with one damaged weight must not leave the house."""

    def damaged(*_: object) -> onnx.ModelProto:
        graph = onnx.load(again / "calibration" / "fp32.onnx")
        weight = next(t for t in graph.graph.initializer if t.name == "backbone.conv_stem.weight")
        values = onnx.numpy_helper.to_array(weight) * 1.02
        weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), weight.name))
        return graph

    monkeypatch.setattr(pipeline, "to_onnx", damaged)
    assert export([str(QUICK)]) == 1
    error = capsys.readouterr().err
    assert "the fp32 ONNX graph is not the checkpoint" in error
    assert sorted(path.name for path in again.iterdir()) == ["calibration", "train"]


def test_a_form_that_cannot_be_made_is_refused_and_the_others_go_on(
    again: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from export import precision_ladder

    def broken(*_: object, **__: object) -> Emitted:
        raise ExportError("no such kernel")

    def float_only(graph: onnx.ModelProto, *_: object, **__: object) -> Emitted:
        return Emitted(graph, (), {})

    monkeypatch.setitem(precision_ladder.EMITTERS, "int8", float_only)
    monkeypatch.setitem(precision_ladder.EMITTERS, "int8-cpu", broken)
    recipe = tmp_path / "changed.toml"
    forms = '[export]\nforms = ["int8", "int8-cpu", "fp16"]'
    recipe.write_text(QUICK.read_text().replace("[export]", forms))
    assert export([str(recipe), "--allow-fp16-only"]) == 0
    error = capsys.readouterr().err
    assert "int8 is not in the bundle: no layer is left to quantize" in error
    assert "int8-cpu is not in the bundle: no such kernel" in error
    bundle = Bundle.open(again / "bundle")
    assert [artifact.form for artifact in bundle.manifest.artifacts] == ["fp32", "fp16"]
    assert not (again / "bundle" / "int8-cpu.onnx").exists()


def test_a_form_over_budget_is_refused_after_every_rung(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no bundle is written without the form, unless its owner says so."""
    from export import precision_ladder, teach
    from train.quantization_aware import quantize_aware

    shortly = functools.partial(quantize_aware, steps=6)
    monkeypatch.setattr(teach, "quantize_aware", shortly)
    monkeypatch.setattr(precision_ladder, "BUDGETS", (0.1, 0.3))
    text = (small / "small.toml").read_text().replace('["fp16"]', '["int8-cpu"]')
    strict = tmp_path / "strict.toml"
    strict.write_text(text.replace("min_sqnr_db = 3.0", "min_sqnr_db = 60.0"))
    build = tmp_path / "build" / "small"
    shutil.copytree(small / "build" / "small" / "train", build / "train")
    monkeypatch.chdir(tmp_path)
    assert export([str(strict)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "no INT8 for onnxruntime on a CPU: int8-cpu was refused: SQNR" in error
    assert "--allow-fp16-only" in error
    assert not (build / "bundle").exists()
    release = msgspec.json.decode((build / "release.json").read_bytes(), type=Release)
    report = release.forms[-1]
    assert not report.released
    assert "< 60 dB" in report.reason
    rungs = [attempt.rung for attempt in report.attempts]
    kept = [len(attempt.kept_float) for attempt in report.attempts]
    assert rungs[0] == "post-training"
    assert rungs[1] == f"{kept[1]} layers float"
    assert kept[1] > kept[0]
    assert {attempt.split for attempt in report.attempts} == {"validation"}
    assert all(attempt.made for attempt in report.attempts)


def test_parity_is_judged_by_signal_to_noise() -> None:
    reference = np.random.default_rng(0).normal(0, 2, (50, 3)).astype(np.float32)
    assert check_checkpoint(reference, reference + 1e-5) > 60
    for wrong in (reference + 0.1 * reference[:, ::-1], np.full_like(reference, np.nan)):
        with pytest.raises(ExportError, match="nothing is released"):
            check_checkpoint(reference, wrong)


QUALITY = Quality(samples=100, labelled=100, agreement=1.0, sqnr_db=40.0, accuracy=0.9,
                  worst_recall=0.8)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "within budget"),
        ({"agreement": 0.97}, "agreement 97.00% < 98.00%"),
        ({"sqnr_db": 9.0}, "SQNR 9.0 dB < 15 dB"),
        ({"accuracy": 0.88}, "accuracy down 2.00% > 1.00%"),
        ({"worst_recall": 0.7}, "worst-class recall down 10.00% > 3.00%"),
        ({"accuracy": 0.95}, "within budget"),
        ({"accuracy": None, "worst_recall": None}, "no labels to judge accuracy by"),
    ],
)
def test_the_gate_refuses_with_the_number_that_broke_the_budget(
    changes: dict[str, float | None], reason: str
) -> None:
    from export.gate import judge

    verdict = judge(msgspec.structs.replace(QUALITY, **changes), QUALITY, GateSettings())
    assert reason in verdict.reason
    assert verdict.passed == (reason in ("within budget", "no labels to judge accuracy by"))


def test_own_folders_and_an_unlabelled_field(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pictures: Callable[..., Path],
) -> None:
    """A colour model on folders, a target without one label: judged by agreement and SQNR only."""
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "clean", {"fine": 30, "coarse": 30})
    field = pictures(tmp_path / "field", {"x": 25, "y": 25}, first=500)
    names = sorted(path.relative_to(tmp_path) for path in field.rglob("*.png"))
    lines = "".join(f"{name},,burst-{index // 4}\n" for index, name in enumerate(names))
    (tmp_path / "field.csv").write_text("path,label,group\n" + lines)
    (tmp_path / "own.toml").write_text(
        'name = "own"\n[data]\nsource = "clean"\ntarget = "field.csv"\n'
        "[input]\nsize = [32, 32]\n[source]\nepochs = 1\n"
        "[model]\narchitecture = 'test_resnet'\nweights = 'random'\n"
        "[train]\nstrategy = 'feature-extraction'\n[train.similarity]\nimages = 8\n"
        "[calibration]\nimages = 16\n[export]\nforms = ['int8-cpu']\n"
        "[gate]\nmin_agreement = 0.7\nmin_sqnr_db = 3.0\n"
    )
    assert train([str(tmp_path / "own.toml")]) == 0
    training = json.loads((tmp_path / "build/own/train/training.json").read_text())
    assert not training["verified"], "a field without labels proves nothing"
    assert training["rung"] == "as is"
    assert export([str(tmp_path / "own.toml")]) == 0
    release = msgspec.json.decode((tmp_path / "build/own/release.json").read_bytes(), type=Release)
    assert release.reference.accuracy is None
    assert release.reference.labelled == 0
    assert release.forms[0].released
    dataset = read_dataset(tmp_path / "build/own/train/images.json")
    splits: dict[str | None, set[str]] = {}
    for example in dataset.examples:
        if example.group:
            splits.setdefault(example.group, set()).add(example.split)
    assert all(len(found) == 1 for found in splits.values()), "a group straddles splits"


def test_the_calibration_command_shows_what_export_used(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from calibration.__main__ import main as calibration

    for room in ("train", "calibration"):
        shutil.copytree(quick / "build/quick" / room, tmp_path / "build/quick" / room)
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "build/quick/calibration/images.json").read_bytes()
    assert calibration([str(QUICK)]) == 0
    assert "used again" in capsys.readouterr().out
    assert (tmp_path / "build/quick/calibration/images.json").read_bytes() == before
