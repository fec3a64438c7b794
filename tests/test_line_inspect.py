"""What ``inspect`` gives beside the answer: the picture as the model saw it, and its features."""

from pathlib import Path

import numpy as np
import pytest

from runtime.candidates import Request
from runtime.classifier import Classifier
from runtime.delivery.live import LiveClassifier
from runtime.delivery.slots import Slots
from runtime.errors import DataError
from runtime.preprocess import preprocess_batch
from tests.model_zips import SIZE, model_zip
from tests.test_engines import CHANNELS

LARGER = (SIZE[0] * 2, SIZE[1] * 3, CHANNELS)
PICTURE = np.random.default_rng(0).integers(0, 256, LARGER, dtype=np.uint8)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return model_zip(tmp_path, "1")


def test_an_inspection_has_the_answer_of_a_call_and_what_the_engine_saw(archive: Path) -> None:
    with Classifier.open(archive, threads=1) as classifier:
        answer, image, features, by = classifier.inspect(PICTURE)
        assert by is classifier
        called = classifier(PICTURE)
        seen = preprocess_batch([PICTURE], classifier.bundle.manifest.input)
        outputs = classifier.engine.infer(seen)
        with pytest.raises(DataError):
            classifier.inspect(b"no picture")
    assert (answer.label, answer.probabilities) == (called.label, called.probabilities)
    assert set(answer.milliseconds) == {"preprocess", "infer"}
    np.testing.assert_array_equal(image, seen[0])
    np.testing.assert_array_equal(features, outputs.features[0])
    assert (image.dtype, image.shape) == (np.dtype(np.uint8), (*SIZE, CHANNELS))
    assert (features.dtype, features.ndim) == (np.dtype(np.float32), 1)


def test_an_inspection_of_a_slot_says_which_slot(tmp_path: Path, archive: Path) -> None:
    slots = Slots(tmp_path / "state")
    sha256 = slots.activate(slots.stage(archive).sha256).sha256
    slots.begin_try()
    slots.commit()
    with LiveClassifier(tmp_path / "state", request=Request(threads=1)) as live:
        answer, image, features, by = live.inspect(PICTURE)
        assert by is live.classifier
        called = live(PICTURE)
    assert (answer.slot, answer.version) == (sha256, "1")
    assert (answer.label, answer.score, answer.slot) == (called.label, called.score, called.slot)
    assert image.shape == (*SIZE, CHANNELS)
    assert features.dtype == np.float32
