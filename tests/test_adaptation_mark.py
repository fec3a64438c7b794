"""Verified or UNVERIFIED: the same words wherever a model appears, on a bundle of a tiny graph."""

import json
from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from export import table
from export.parity import measure
from export.release import Release
from export.write_bundle import adaptation_of, encode_golden, make_manifest, write_bundle
from runtime import Classifier
from runtime.__main__ import main as fieldfit
from runtime.bundle import Bundle
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.errors import BundleError
from runtime.manifest import Adaptation, Artifact, encode
from runtime.preprocess import InputSpec
from runtime.recipe import DataSettings, ModelSettings, Recipe
from tests.test_engines import CHANNELS, tiny_model
from train.checkpoint import CheckpointFacts, read_checkpoint

SIZE = (24, 16)
RECIPE = Recipe(name="tiny", data=DataSettings(source="images"))
WORDS = {
    True: "fine-tuning (200 field labels), verified: AUC up by 0.12 [0.08, 0.16] on 232 images",
    False: "as is (1 field label), UNVERIFIED: 12 labelled field images, 50 are needed",
}


def pictures(count: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (count, *SIZE, CHANNELS), dtype=np.uint8)


def facts(verified: bool) -> CheckpointFacts:
    return CheckpointFacts(
        name="tiny", classes=("a", "b", "c", "d"), model=ModelSettings(),
        input=InputSpec(size=SIZE, channels=CHANNELS), recipe_sha256="0" * 64,
        dataset_sha256="1" * 64, rung="fine-tuning" if verified else "as is", temperature=1.0,
        verified=verified, labels_used=200 if verified else 1,
        adaptation="AUC up by 0.12 [0.08, 0.16] on 232 images"
        if verified
        else "12 labelled field images, 50 are needed",
    )  # fmt: skip


def make_bundle(folder: Path, verified: bool) -> Path:
    model, images = tiny_model(size=SIZE).SerializeToString(), pictures(3)
    with OnnxRuntimeEngine(model, form="fp32", threads=1) as engine:
        logits = engine.infer(images).logits
    quality = measure(logits, logits, np.array([-1, -1, -1]), seed=0)
    files = {"fp32.onnx": model, "golden.npz": encode_golden(images, {"fp32": logits})}
    artifacts = [Artifact(form="fp32", file="fp32.onnx", quality=quality)]
    manifest = make_manifest(RECIPE, facts(verified), "2" * 64, artifacts, files)
    write_bundle(folder / "bundle", folder / "tiny.zip", manifest, files)
    return folder / "bundle"


@pytest.fixture(params=[True, False], ids=["verified", "unverified"])
def verified(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def tiny(tmp_path: Path, verified: bool) -> Path:
    return make_bundle(tmp_path, verified)


def test_export_writes_the_checkpoints_words_into_the_manifest(tiny: Path, verified: bool) -> None:
    adaptation = Bundle.open(tiny).manifest.adaptation
    assert str(adaptation) == WORDS[verified]
    assert adaptation == adaptation_of(facts(verified))
    with Classifier.open(tiny) as model:
        assert model.adaptation == adaptation


def test_a_manifest_without_the_mark_is_refused(tiny: Path) -> None:
    fields = json.loads((tiny / "manifest.json").read_text())
    del fields["adaptation"]
    fields["digest"] = ""
    bare = msgspec.json.format(msgspec.json.encode(fields), indent=1) + b"\n"
    signed = bare.replace(b'"digest": ""', b'"digest": "%s"' % sha256(bare).hexdigest().encode())
    (tiny / "manifest.json").write_bytes(signed)
    with pytest.raises(BundleError, match="missing required field `adaptation`"):
        Bundle.open(tiny)


def test_nobody_can_turn_the_mark_by_hand(tmp_path: Path) -> None:
    path = make_bundle(tmp_path, verified=False) / "manifest.json"
    path.write_text(path.read_text().replace('"verified": false', '"verified": true'))
    with pytest.raises(BundleError, match="changed since export"):
        Bundle.open(path.parent)


def test_doctor_shows_bundle_mark_forms_and_engine(
    tiny: Path, verified: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fieldfit(["doctor", str(tiny)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        f"bundle tiny 0.1.0 adaptation {WORDS[verified]} forms fp32 engine onnxruntime CPU, fp32 "
        "reasons TensorRT: passed over"
    ) in shown
    assert fieldfit(["doctor", str(tiny), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["bundle"]
    assert report["bundle"] == "tiny 0.1.0"
    assert msgspec.convert(report["adaptation"], Adaptation) == adaptation_of(facts(verified))
    assert report["forms"] == ["fp32"]
    assert report["engine"] == "onnxruntime CPU, fp32"


def test_doctor_shows_the_mark_of_a_bundle_that_cannot_run_here(
    tiny: Path, verified: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = msgspec.structs.replace(Bundle.open(tiny).manifest, minimum_runtime="99.0")
    (tiny / "manifest.json").write_bytes(encode(manifest))
    assert fieldfit(["doctor", str(tiny)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert f"adaptation {WORDS[verified]}" in shown
    assert "engine none" in shown
    assert "needs fieldfit 99.0 or newer" in shown


def test_verify_shows_the_mark(
    tiny: Path, verified: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fieldfit(["verify", str(tiny)]) == 0
    assert f"adaptation: {WORDS[verified]}" in capsys.readouterr().out.splitlines()
    assert fieldfit(["verify", str(tiny), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["adaptation"]["verified"] is verified
    assert report["passed"]


def test_classify_warns_once_and_only_of_what_is_unverified(
    tiny: Path, verified: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index, pixels in enumerate(pictures(2)):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    assert fieldfit(["classify", str(tiny), str(tmp_path / "*.png")]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 2
    warnings = [line for line in captured.err.splitlines() if "verified" in line.lower()]
    assert warnings == ([] if verified else [f"fieldfit: {WORDS[False]}"])


def test_the_release_and_its_table_show_the_mark(
    verified: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    logits = np.eye(4, dtype=np.float32)
    release = Release(
        name="tiny", version="0.1.0", field="target", adaptation=adaptation_of(facts(verified)),
        reference=measure(logits, logits, np.arange(4), seed=0), parity_db=100.0, forms=(),
        checkpoint_sha256="2" * 64, recipe_sha256="0" * 64, dataset_sha256="1" * 64, seed=0,
        seconds=1.0, machine="", versions={}, git=None,
    )  # fmt: skip
    written = json.loads(msgspec.json.encode(release))
    assert written["adaptation"]["verified"] is verified
    assert written["adaptation"]["rung"] == facts(verified).rung
    table.show(release)
    assert f"adaptation: {WORDS[verified]}" in capsys.readouterr().err.splitlines()


def test_the_whole_job_carries_the_mark_from_training_to_the_device(quick: Path) -> None:
    build = quick / "build" / "quick"
    _, trained = read_checkpoint(build / "train" / "checkpoint.safetensors")
    expected = adaptation_of(trained)
    assert Bundle.open(build / "bundle").manifest.adaptation == expected
    release = msgspec.json.decode((build / "release.json").read_bytes(), type=Release)
    assert release.adaptation == expected
