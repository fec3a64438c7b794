"""Held-out field images with the checkpoint's answers: what every form is asked and judged by.

Validation images choose between rungs, test images prove what was chosen. It does not know how a
form was made.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx

from export.float16 import first_not_finite
from export.gate import judge
from export.parity import measure
from runtime.dataset import Dataset, Split
from runtime.engines.engine import Engine
from runtime.manifest import Quality
from runtime.recipe import Recipe
from train import console
from train.device import reference_device
from train.features import predict
from train.model import ImageClassifier
from train.pipeline import CACHE
from train.pixels import load_pixels

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

BATCH = 16


class HeldOut(NamedTuple):
    """Images of one split of the field, and what the checkpoint says to them."""

    split: Split
    images: UInt8
    """``[N, H, W, C]``, on disk."""
    labels: Ints
    """``[N]``, -1 where unknown."""
    logits: Floats
    """``[N, K]`` of the torch checkpoint in float32."""
    reference: Quality
    """The checkpoint itself."""


class Judged(NamedTuple):
    """The gate's verdict on one form."""

    split: Split
    quality: Quality
    passed: bool
    reason: str


def ask_checkpoint(
    model: ImageClassifier, dataset: Dataset, split: Split, recipe: Recipe
) -> HeldOut:
    """The field's images of ``split``, with the checkpoint's answers."""
    examples = dataset.select(dataset.field, split)
    labels = np.array([dataset.label_index(e) for e in examples], dtype=np.int64)
    images = load_pixels(examples, recipe.input, CACHE)
    logits = predict(
        model, images, reference_device("the reference"),
        lambda i, n: console.track(i, f"checkpoint: {split} images", n),
    )  # fmt: skip
    reference = measure(logits, logits, labels, seed=recipe.seed)
    return HeldOut(split, images, labels, logits, reference)


def answers(engine: Engine, held: HeldOut) -> Floats:
    """The engine's logits ``[N, K]``."""
    starts = console.track(range(0, len(held.images), BATCH), f"{engine.form}: {held.split} images")
    # From disk a few at a time; an engine takes plain arrays only.
    batches = (np.asarray(held.images[start : start + BATCH]) for start in starts)
    return np.concatenate([engine.infer(batch).logits for batch in batches])


def examine(
    engine: Engine, model: onnx.ModelProto, held: HeldOut, recipe: Recipe
) -> tuple[Judged, Floats]:
    """The gate's verdict on what the engine of ``model`` answers, and its logits."""
    logits = answers(engine, held)
    quality = measure(held.logits, logits, held.labels, seed=recipe.seed)
    broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(broken):
        first = first_not_finite(model, np.asarray(held.images[broken[:1]]))
        return Judged(held.split, quality, False, f"logits are not finite: {first}"), logits
    verdict = judge(quality, held.reference, recipe.gate)
    return Judged(held.split, quality, verdict.passed, verdict.reason), logits
