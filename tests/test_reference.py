"""A bundle carries how its field looks and is answered, and a device compares itself with that."""

import hashlib
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from export.pipeline import export
from export.reference import DIRECTIONS, fit_projection
from export.release import read_release
from export.write_bundle import write_bundle
from runtime import Classifier
from runtime.bundle import MANIFEST, Bundle
from runtime.dataset import read_dataset
from runtime.errors import BundleError, DataError
from runtime.manifest import FileEntry
from runtime.monitoring.drift import Drift
from runtime.monitoring.image_quality import STATISTICS, look
from runtime.monitoring.reference import REFERENCE, encode, read_reference
from runtime.preprocess import preprocess_batch
from runtime.recipe import load_recipe
from tests.conftest import QUICK


def test_an_exported_bundle_has_a_reference_of_all_held_out_images(quick: Path) -> None:
    bundle = Bundle.open(quick / "build/quick/bundle")
    reference = read_reference(bundle)
    assert reference is not None
    dataset = read_dataset(quick / "build/quick/train/images.json")
    held_out = [*dataset.select("target", "validation"), *dataset.select("target", "test")]
    assert reference.probabilities.shape == (len(held_out), 2)
    np.testing.assert_allclose(reference.probabilities.sum(axis=1), 1, rtol=1e-6)
    assert reference.features.shape == (len(held_out), DIRECTIONS + 1)
    assert set(reference.limits) == set(STATISTICS)
    assert len(bundle.read(REFERENCE)) < 100_000
    release = read_release(bundle)
    assert release.statistics is not None
    assert release.statistics.images == len(held_out)


def test_a_device_finds_the_reference_in_its_own_answers(quick: Path) -> None:
    """The classifier's own way to scores and features is the one that the reference was made on."""
    bundle = quick / "build/quick/bundle"
    dataset = read_dataset(quick / "build/quick/train/images.json")
    with Classifier.open(bundle, engine="onnxruntime-cpu", form="fp32") as classifier:
        reference = read_reference(classifier.bundle)
        assert reference is not None
        example = dataset.select("target", "validation")[3]
        seen = classifier.inspect(example.path)
    scores = [seen.answer.probabilities[label] for label in reference.labels]
    np.testing.assert_allclose(scores, reference.probabilities[3], atol=1e-5)
    projected = reference.projection(seen.features[None])
    np.testing.assert_allclose(projected[0], reference.features[3], atol=1e-3)
    assert not [flag for flag in look(seen.image, None, reference.limits) if flag.alarms]


def test_images_of_another_kind_are_drift_and_those_of_the_field_are_not(quick: Path) -> None:
    """End to end: a real graph, its own reference, a window of each."""
    dataset = read_dataset(quick / "build/quick/train/images.json")
    with Classifier.open(quick / "build/quick/bundle", form="fp32") as classifier:
        reference = read_reference(classifier.bundle)
        assert reference is not None
        spec = classifier.bundle.manifest.input
        field = preprocess_batch([e.path for e in dataset.select("target", "train")], spec)
        drift = Drift(reference, window=len(field))
        dim = (field // 5).astype(np.uint8)
        reports = []
        for images in (field, dim):
            for image in images:
                seen = classifier.inspect(image)
                scores = np.array(list(seen.answer.probabilities.values()))
                report = drift.observe(scores, seen.features)
            reports.append(report)
    quiet, drifted = reports
    assert quiet is not None
    assert drifted is not None
    assert not quiet.drifted
    assert drifted.drifted
    assert any(look(image, None, reference.limits) for image in dim)


def test_a_bundle_without_a_reference_is_a_good_bundle(bundle: Path, tmp_path: Path) -> None:
    older = _with_reference(bundle, None, tmp_path)
    assert read_reference(older) is None


def test_the_reference_survives_its_file(quick: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(quick / "build/quick/bundle")
    reference = read_reference(bundle)
    assert reference is not None
    assert encode(reference) == bundle.read(REFERENCE)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda r: encode(r)[:-200], "damaged"),
        (lambda r: encode(r._replace(probabilities=r.probabilities[:, :1])), "probabilities"),
        (lambda r: encode(r._replace(features=r.features[1:])), "features"),
        (lambda r: encode(r._replace(probabilities=r.probabilities[:0])), "probabilities"),
        (lambda r: encode(r._replace(features=np.full_like(r.features, np.nan))), "finite"),
        (lambda r: encode(r._replace(limits={"noise": (1.0, 2.0)})), "limits"),
        (
            lambda r: encode(r._replace(projection=r.projection._replace(basis=r.features[0]))),
            "basis|features|centre",
        ),
    ],
)
def test_a_reference_that_is_none_is_refused(
    quick: Path, tmp_path: Path, damage: object, said: str
) -> None:
    assert callable(damage)
    bundle = quick / "build/quick/bundle"
    reference = read_reference(Bundle.open(bundle))
    bad = _with_reference(bundle, damage(reference), tmp_path)
    with pytest.raises(BundleError, match=f"{REFERENCE} cannot be read: .*({said})"):
        read_reference(bad)


def _with_reference(folder: Path, data: bytes | None, tmp_path: Path) -> Bundle:
    """The bundle in ``folder`` with ``data`` in place of its reference."""
    bundle = Bundle.open(folder)
    files = {
        name: bundle.read(name) for name in bundle.names() if name not in (MANIFEST, REFERENCE)
    }
    if data is not None:
        files[REFERENCE] = data
    manifest = msgspec.structs.replace(
        bundle.manifest,
        reference=None if data is None else REFERENCE,
        files=tuple(
            FileEntry(name=name, sha256=hashlib.sha256(content).hexdigest(), size=len(content))
            for name, content in sorted(files.items())
        ),
    )
    write_bundle(tmp_path / "other", tmp_path / "other.zip", manifest, files)
    return Bundle.open(tmp_path / "other")


def test_a_projection_is_of_unit_variance_and_keeps_the_length_of_what_is_left() -> None:
    random = np.random.default_rng(0)
    spread = np.linspace(10, 0.1, 40)
    features = (random.normal(0, 1, (500, 40)) * spread + 7).astype(np.float32)
    project = fit_projection(features)
    values = project(features)
    np.testing.assert_allclose(values[:, :DIRECTIONS].std(axis=0), 1, rtol=0.01)
    assert np.square(values[:, -1]).mean() == pytest.approx(1, rel=0.01)


def test_fewer_features_than_directions_are_projected_all_the_same() -> None:
    random = np.random.default_rng(0)
    features = random.normal(0, 1, (30, 3)).astype(np.float32)
    assert fit_projection(features)(features).shape == (30, 4)
    same = np.ones((30, 3), np.float32)
    assert np.isfinite(fit_projection(same)(same)).all()


def test_an_ok_label_that_the_model_does_not_have_is_refused_before_anything_is_made(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(quick / "build/quick/train", tmp_path / "build/quick/train")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(QUICK)
    wrong = msgspec.structs.replace(
        recipe, export=msgspec.structs.replace(recipe.export, ok=("functional", "fine"))
    )
    with pytest.raises(DataError, match=r"\[export\] ok: .* defective, functional; got 'fine'"):
        export(wrong)
    assert not (tmp_path / "build/quick/bundle").exists()


def test_the_bundle_says_which_labels_are_ok_and_from_which_score_on_it_answers(
    quick: Path,
) -> None:
    bundle = Bundle.open(quick / "build/quick/bundle")
    assert bundle.manifest.ok_labels == ("functional",)
    abstention = read_release(bundle).abstention
    assert abstention is not None
    assert bundle.manifest.abstain_below == abstention.abstain_below == 0
    assert abstention.labelled > 0
    assert (quick / "build/quick/selective-risk.png").is_file()
