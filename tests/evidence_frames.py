"""Frames as the loop inspected them, of a real tiny bundle, with whatever answer a test wants."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from runtime.classifier import Classifier, Inspection
from runtime.line.inspection import Inspected
from runtime.line.verdict import Finding, Word
from runtime.preprocess import ImageLike, preprocess
from runtime.sources.frame import Frame
from tests.model_zips import LABELS, model_zip

SURE = (0.97, 0.01, 0.01, 0.01)
CLOSE = (0.5, 0.4, 0.05, 0.05)


@functools.cache
def _inspection() -> Inspection:
    with tempfile.TemporaryDirectory() as folder:
        archive = model_zip(Path(folder), "1.2.3")
        with Classifier.open(archive, threads=1) as classifier:
            return classifier.inspect(picture(0))


def picture(number: int, size: tuple[int, int] = (48, 32)) -> np.ndarray:
    """A colour picture uint8 ``[H, W, 3]`` unlike that of any other number."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((size[0] // 6, size[1] // 4, 1), np.uint8))


def inspected(
    image: ImageLike,
    *,
    at: float = 0.0,
    probabilities: tuple[float, ...] = SURE,
    flags: tuple[str, ...] = (),
    verdict: Word = "OK",
    source: str = "cam1",
    name: str = "f",
) -> tuple[Frame, Inspected]:
    """A frame taken ``at`` seconds, and what was found on it; ABSTAIN is the model's own."""
    frame = Frame(source, name, image, 1.7e9 + at, at)
    inspection = _inspection()
    manifest = inspection.by.bundle.manifest
    answer = msgspec.structs.replace(
        inspection.answer,
        label="a",
        score=max(probabilities),
        abstained=verdict == "ABSTAIN",
        probabilities=dict(zip(LABELS, probabilities, strict=True)),
    )
    seen = inspection._replace(answer=answer, image=preprocess(image, manifest.input))
    finding: dict[str, Any] = {
        "time": "2023-11-14T22:13:20.000Z", "boot": "b", "monotonic": at, "source": source,
        "frame": name, "verdict": verdict, "label": "a", "score": max(probabilities),
        "flags": flags, "bundle": manifest.name, "version": manifest.version, "engine": "cpu",
    }  # fmt: skip
    return frame, Inspected(Finding(**finding), None, seen)
