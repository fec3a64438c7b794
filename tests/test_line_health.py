"""Health on the line: limits and drift of the bundle that answers, whichever that is."""

import hashlib
import logging
from pathlib import Path

import msgspec
import numpy as np
import pytest

from export.write_bundle import write_bundle
from runtime.bundle import Bundle
from runtime.classifier import Classifier
from runtime.line.health import Health
from runtime.line.inspection import Inspected, Inspector
from runtime.manifest import FileEntry
from runtime.monitoring.drift import WINDOW
from runtime.monitoring.image_quality import limits_of, measure
from runtime.monitoring.reference import REFERENCE, Projection, Reference, encode
from runtime.sources.frame import Frame
from tests.model_zips import LABELS, SIZE, model_zip
from tests.test_engines import CHANNELS


def pictures(count: int, level: float = 120.0, seed: int = 1) -> list[np.ndarray]:
    """Noise around levels that differ from picture to picture."""
    random, shape = np.random.default_rng(seed), (*SIZE, CHANNELS)
    return [
        np.clip(random.normal(level + random.normal(0, 15), 20, shape), 0, 255).astype(np.uint8)
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose reference is of what its own model says of such pictures."""
    folder = tmp_path_factory.mktemp("referenced")
    plain = model_zip(folder, "1")
    with Classifier.open(plain, threads=1) as classifier:
        seen = [classifier.inspect(picture) for picture in pictures(400, seed=0)]
    features = np.stack([one.features for one in seen])
    projection = Projection(features.mean(axis=0), np.eye(CHANNELS, 1, dtype=np.float32), 1.0)
    reference = Reference(
        labels=LABELS,
        probabilities=np.array([[*one.answer.probabilities.values()] for one in seen], np.float32),
        projection=projection, features=projection(features),
        limits=limits_of(np.stack([measure(one.image) for one in seen])),
    )  # fmt: skip
    bundle = Bundle.open(plain)
    files = {entry.name: bundle.read(entry.name) for entry in bundle.manifest.files}
    files[REFERENCE] = encode(reference)
    manifest = msgspec.structs.replace(
        bundle.manifest, version="2", reference=REFERENCE,
        files=tuple(
            FileEntry(name=name, sha256=hashlib.sha256(data).hexdigest(), size=len(data))
            for name, data in files.items()
        ),
    )  # fmt: skip
    written = folder / "tiny-2.zip"
    write_bundle(folder / "tiny-2", written, manifest, files)
    return written


def inspected(classifier: Classifier, health: Health, images: list[np.ndarray]) -> list[Inspected]:
    inspector = Inspector(classifier, boot="b", ok=LABELS[:1], checks=health)
    found = []
    for number, image in enumerate(images):
        frame = Frame("cam", str(number), image, 1e9 + number, float(number))
        found.append(inspector.inspect(frame, 0.0))
        health.judged(frame, found[-1], found[-1].finding)
    return found


def test_a_dark_frame_alarms_and_usual_ones_do_not(archive: Path) -> None:
    with Classifier.open(archive, threads=1) as classifier:
        health = Health(classifier.bundle)
        usual = inspected(classifier, health, pictures(20))
        (black,) = inspected(classifier, health, [np.zeros((*SIZE, CHANNELS), np.uint8)])
    assert sum(one.finding.verdict == "ABSTAIN" for one in usual) <= 1
    assert black.finding.verdict == "ABSTAIN"
    assert black.finding.flags[0] == "black"
    assert black.finding.reason.startswith("black: mean level 0.0")


def test_a_window_of_brighter_pictures_drifts_and_a_usual_one_does_not(
    archive: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Classifier.open(archive, threads=1) as classifier:
        health = Health(classifier.bundle)
        assert health.knows
        inspected(classifier, health, pictures(WINDOW // 2))
        assert (health.fill, health.report) == (0.5, None)
        inspected(classifier, health, pictures(WINDOW // 2, seed=2))
        assert health.report is not None
        assert not health.drifts()
        with caplog.at_level(logging.WARNING):
            inspected(classifier, health, pictures(WINDOW, 150.0))
        assert health.drifts()
    assert health.report.sentence in caplog.text


def test_a_camera_that_repeats_a_picture_alarms_and_a_folder_may(archive: Path) -> None:
    images = pictures(1) * 5
    with Classifier.open(archive, threads=1) as classifier:
        camera = inspected(classifier, Health(classifier.bundle), images)
        folder = inspected(classifier, Health(classifier.bundle, files={"cam"}), images)
    assert camera[-1].finding.verdict == "ABSTAIN"
    assert "frozen" in camera[-1].finding.reason
    assert folder[-1].finding.verdict != "ABSTAIN"


def test_it_follows_the_bundle_that_answers_and_says_if_that_has_no_reference(
    tmp_path: Path, archive: Path, caplog: pytest.LogCaptureFixture
) -> None:
    black = np.zeros((*SIZE, CHANNELS), np.uint8)
    old, new = Bundle.open(model_zip(tmp_path, "1")), Bundle.open(archive)
    with caplog.at_level(logging.WARNING):
        health = Health(old)
    assert "tiny 1: has no reference: light and drift are not checked" in caplog.text
    assert not health.knows
    assert health.look("cam", black, old) == ()
    assert [flag.word for flag in health.look("cam", black, new)] == ["black"]
    assert health.knows
