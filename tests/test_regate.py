"""``python -m export gate``: a bundle of tiny graphs is judged again, from it and images alone."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from export.__main__ import main as export
from export.float16 import to_float16
from export.gate import judge
from export.golden import choose_golden
from export.parity import measure
from export.regate import regate
from export.release import (
    RELEASE,
    Attempt,
    FormReport,
    Release,
    encode_release,
    judged_sha256,
    read_release,
)
from export.write_bundle import encode_golden, write_bundle
from runtime.bundle import Bundle
from runtime.dataset import Dataset, Example, write_dataset
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.errors import BundleError, DataError
from runtime.manifest import FORMAT, Adaptation, Artifact, FileEntry, Form, Manifest
from runtime.preprocess import InputSpec, preprocess_batch
from runtime.recipe import GateSettings
from tests.test_engines import CHANNELS, tiny_model

ROOT = Path(__file__).resolve().parent.parent
SIZE = (24, 16)
LABELS = ("a", "b", "c", "d")
SPEC = InputSpec(size=SIZE, channels=CHANNELS)
BUDGET = GateSettings(min_agreement=0.9)
ADAPTATION = Adaptation(rung="as is", verified=True, reason="so", labels_used=0)


def picture(number: int) -> Image.Image:
    """One colour and some noise, so that the tiny graph has something to tell apart."""
    random = np.random.default_rng(number)
    levels = random.integers(0, 256, 3) + random.normal(0, 20, (*SIZE, 3))
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def entry(path: Path, label: str | None, split: str = "test") -> Example:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Example(path=str(path), sha256=digest, domain="target", label=label, split=split)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``build/tiny`` with 40 test images and a bundle of fp32 and fp16, as export leaves it."""
    build = tmp_path_factory.mktemp("regate") / "build" / "tiny"
    (build / "images").mkdir(parents=True)
    (build / "train").mkdir()
    paths = [build / "images" / f"{number}.png" for number in range(45)]
    for number, path in enumerate(paths):
        picture(number).save(path)
    graph = tiny_model(size=SIZE)
    models = {"fp32": graph, "fp16": to_float16(graph)}
    images = preprocess_batch(list(paths[:40]), SPEC)
    logits = {}
    for form, model in models.items():
        with OnnxRuntimeEngine(model.SerializeToString(), form=form, threads=1) as engine:
            logits[form] = engine.infer(images).logits
    right = logits["fp32"].argmax(axis=1)
    labels = np.where(np.arange(40) % 8 == 0, (right + 1) % 4, right)
    examples = [entry(p, LABELS[k]) for p, k in zip(paths[:40], labels, strict=True)]
    examples += [entry(path, "a", "train") for path in paths[40:]]
    write_dataset(
        build / "train" / "images.json", Dataset(classes=LABELS, examples=tuple(examples))
    )
    reference = measure(logits["fp32"], logits["fp32"], labels, seed=3)
    reports = []
    for form, model in models.items():
        quality = measure(logits["fp32"], logits[form], labels, seed=3)
        passed, reason = judge(quality, reference, BUDGET)
        assert passed
        attempt = Attempt(form=form, quality=quality, passed=True, reason=reason)
        size = len(model.SerializeToString())
        reports.append(
            FormReport(form=form, released=True, reason=reason, bytes=size, attempts=(attempt,))
        )
    release = Release(
        name="tiny", version="1", field="target", adaptation=ADAPTATION, reference=reference,
        parity_db=117.0, forms=tuple(reports), checkpoint_sha256="1" * 64, recipe_sha256="2" * 64,
        dataset_sha256="3" * 64, gate=BUDGET, seed=3, seconds=1.0, machine="x86_64", versions={},
        judged_sha256=judged_sha256((e.sha256, e.label) for e in examples[:40]), git=None,
    )  # fmt: skip
    rows = choose_golden(logits["fp32"], 4)
    files = {f"{form}.onnx": model.SerializeToString() for form, model in models.items()}
    files["golden.npz"] = encode_golden(images[rows], {f: v[rows] for f, v in logits.items()})
    files[RELEASE] = encode_release(release)
    pack(build, files, release)
    return build


def pack(build: Path, files: dict[str, bytes], release: Release) -> None:
    forms: tuple[Form, ...] = ("fp32", "fp16")
    manifest = Manifest(
        format=FORMAT, name="tiny", version="1", labels=LABELS, input=SPEC, adaptation=ADAPTATION,
        artifacts=tuple(
            Artifact(form=form, file=f"{form}.onnx", quality=report.attempts[-1].quality)
            for form, report in zip(forms, release.forms, strict=True)
        ),
        files=tuple(
            FileEntry(name=name, sha256=hashlib.sha256(data).hexdigest(), size=len(data))
            for name, data in sorted(files.items())
        ),
        golden="golden.npz", recipe_sha256="2" * 64, checkpoint_sha256="1" * 64,
    )  # fmt: skip
    write_bundle(build / "bundle", build / "tiny-1.zip", manifest, files)


@pytest.fixture
def build(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil; its list of images points at the copied images."""
    copy = Path(shutil.copytree(original, tmp_path / "tiny"))
    listed = copy / "train" / "images.json"
    listed.write_text(listed.read_text().replace(str(original), str(copy)))
    return copy


def repack(build: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    bundle = Bundle.open(build / "bundle")
    files = {entry.name: bundle.read(entry.name) for entry in bundle.manifest.files}
    release = read_release(bundle)
    change(files)
    pack(build, files, release)


@pytest.mark.parametrize("place", ["bundle", "tiny-1.zip"])
def test_an_unspoilt_bundle_passes_with_the_recorded_figures(build: Path, place: str) -> None:
    report = regate(build / place)
    assert report.passed
    assert report.images == "the recorded images"
    for form in report.forms:
        assert form.now.sqnr_db == pytest.approx(form.recorded.sqnr_db, abs=0.1)
        assert form.now.accuracy == form.recorded.accuracy == 35 / 40
        assert form.now.accuracy_drop_interval == form.recorded.accuracy_drop_interval
    assert report.forms[0].reason == "the reference; 117 dB to the checkpoint at export"
    assert report.forms[1].reason.startswith("within budget: agreement 100.00%")


def test_it_needs_neither_torch_nor_a_checkpoint(build: Path) -> None:
    blocked = ["torch", "torchvision", "timm", "safetensors"]
    code = f"""
import sys
for name in {blocked}: sys.modules[name] = None
from export.__main__ import main
sys.exit(main(["gate", {str(build / "bundle")!r}, "--json"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["passed"]
    assert [form["form"] for form in shown["forms"]] == ["fp32", "fp16"]
    assert "fp16 passes: within budget" in done.stderr
    assert "now (recorded at export)" in done.stderr


def test_a_form_that_fails_now_is_exit_code_1_with_the_number(
    build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Signed anew and consistent in itself: only its answers tell."""

    def spoil(files: dict[str, bytes]) -> None:
        model = onnx.load_from_string(files["fp16.onnx"])
        weight = next(t for t in model.graph.initializer if t.name.startswith("weight"))
        turned = np.roll(numpy_helper.to_array(weight), 1, axis=0)
        weight.CopyFrom(numpy_helper.from_array(turned, weight.name))
        files["fp16.onnx"] = model.SerializeToString()

    repack(build, spoil)
    assert export(["gate", str(build / "bundle"), "--json"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert not report["passed"]
    assert [form["passed"] for form in report["forms"]] == [True, False]
    assert "< 90.00%" in report["forms"][1]["reason"]
    assert "fp16 fails: agreement" in captured.err


def test_answers_that_are_not_finite_fail(build: Path) -> None:
    def spoil(files: dict[str, bytes]) -> None:
        model = onnx.load_from_string(files["fp16.onnx"])
        bias = next(t for t in model.graph.initializer if t.name.startswith("bias"))
        values = numpy_helper.to_array(bias).copy()
        values[0] = np.inf
        bias.CopyFrom(numpy_helper.from_array(values, bias.name))
        files["fp16.onnx"] = model.SerializeToString()

    repack(build, spoil)
    assert regate(build / "bundle").forms[1].reason == "logits are not finite (overflow)"


def test_an_image_that_changed_is_named(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(99).save(build / "images" / "7.png")
    assert export(["gate", str(build / "bundle")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"export: {build / 'images' / '7.png'}: changed since the list")
    (build / "images" / "7.png").unlink()
    with pytest.raises(DataError, match=r"7\.png: cannot be read: No such file"):
        regate(build / "bundle")


def test_other_images_are_refused_unless_they_are_named(build: Path) -> None:
    listed = build / "train" / "images.json"
    dataset = msgspec.json.decode(listed.read_bytes(), type=Dataset)
    fewer = msgspec.structs.replace(dataset, examples=dataset.examples[1:])
    write_dataset(listed, fewer)
    with pytest.raises(DataError, match=r"expected the 40 images .*, got 39 others from .*--data"):
        regate(build / "bundle")
    report = regate(build / "bundle", listed)
    assert report.images == "other images"
    assert report.forms[0].now.samples == 39
    listed.unlink()
    with pytest.raises(DataError, match=r"expected the list of images .*, got nothing; .*--data"):
        regate(build / "bundle")


def test_the_recorded_images_are_known_by_content_wherever_they_are(
    build: Path, tmp_path: Path
) -> None:
    dataset = msgspec.json.decode((build / "train/images.json").read_bytes(), type=Dataset)
    for number, example in enumerate(dataset.select("target", "test")):
        folder = tmp_path / "moved" / str(example.label)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(example.path, folder / f"other-name-{number}.png")
    report = regate(build / "bundle", tmp_path / "moved")
    assert report.images == "the recorded images"
    assert report.passed
    assert (
        report.forms[1].now.accuracy_drop_interval
        == report.forms[1].recorded.accuracy_drop_interval
    )


def test_a_csv_file_gives_its_test_images_and_may_have_no_labels(
    build: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for number in range(200, 212):
        picture(number).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,,{'train' if number < 203 else ''}\n")
    (tmp_path / "new.csv").write_text("path,label,split\n" + "".join(rows))
    assert export(["gate", str(build / "bundle"), "--data", str(tmp_path / "new.csv")]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "on 9 images (other images)" in shown
    assert "these are not the images of the release" in shown
    assert "no labels to judge accuracy by" in shown


def test_labels_of_another_model_are_refused(build: Path, tmp_path: Path) -> None:
    for name in ("a", "zebra"):
        (tmp_path / "zoo" / name).mkdir(parents=True)
        picture(len(name)).save(tmp_path / "zoo" / name / "1.png")
    with pytest.raises(DataError, match="does not know: zebra; it knows a, b, c, d"):
        regate(build / "bundle", tmp_path / "zoo")


def test_one_image_judges_nothing(build: Path, tmp_path: Path) -> None:
    (tmp_path / "one" / "a").mkdir(parents=True)
    picture(1).save(tmp_path / "one" / "a" / "1.png")
    with pytest.raises(DataError, match="expected 2 or more test images to judge on, got 1"):
        regate(build / "bundle", tmp_path / "one")


def test_a_bundle_without_its_record_says_to_export_again(build: Path) -> None:
    repack(build, lambda files: files.__delitem__(RELEASE))
    with pytest.raises(BundleError, match=r"expected release\.json in the bundle.*export again"):
        regate(build / "bundle")


def test_a_record_of_another_make_says_so(build: Path) -> None:
    repack(build, lambda files: files.update({RELEASE: b'{"name": "tiny"}'}))
    with pytest.raises(BundleError, match=r"release\.json: .*missing required field"):
        regate(build / "bundle")


def test_budgets_are_those_of_the_record_not_of_today_s_recipe(build: Path) -> None:
    def stricter(files: dict[str, bytes]) -> None:
        release = msgspec.json.decode(files[RELEASE], type=Release)
        gate = msgspec.structs.replace(release.gate, min_sqnr_db=150.0)
        files[RELEASE] = encode_release(msgspec.structs.replace(release, gate=gate))

    repack(build, stricter)
    report = regate(build / "bundle")
    assert "< 150 dB" in report.forms[1].reason
    assert [form.passed for form in report.forms] == [True, False]


def test_the_digest_of_images_knows_content_and_label_but_no_order() -> None:
    images = [("aa", "x"), ("bb", "y"), ("cc", None)]
    digest = judged_sha256(images)
    assert digest == judged_sha256(images[::-1])
    assert len({digest, judged_sha256(images[:2]), judged_sha256([("aa", "y"), *images[1:]])}) == 3


def test_its_help_teaches_by_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        export(["gate", "--help"])
    assert stopped.value.code == 0
    assert "Example: python -m export gate" in " ".join(capsys.readouterr().out.split())
