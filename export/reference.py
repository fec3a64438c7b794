"""What a device compares its field with: statistics of field images, as the fp32 graph answers.

The projection is fitted on training images and limits of image quality are learned on training and
validation images; the reference itself is of validation and test images, which no weight was
fitted to. It knows no label.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from export.release import ReferenceReport
from runtime import metrics
from runtime.dataset import Split
from runtime.engines.engine import Engine, Outputs
from runtime.monitoring.image_quality import limits_of, look, measure
from runtime.monitoring.reference import Projection, Reference
from train import console

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

DIRECTIONS = 8
"""Principal components of the features that are tested one by one."""

FITTED = 256
"""Training images that the projection is fitted on."""

PER_SPLIT = 1024
"""Images of each split that statistics are made of, at most."""

_BATCH = 16


def make_reference(
    engine: Engine, labels: tuple[str, ...], images: Mapping[Split, UInt8], *, temperature: float
) -> tuple[Reference, ReferenceReport]:
    """The reference of a field by ``engine``, which runs the fp32 graph.

    ``images`` are its uint8 ``[N, H, W, C]`` by split; there may be no validation images.
    """
    train, test = _some(images["train"]), _some(images["test"])
    validation = _some(images["validation"]) if "validation" in images else []
    measured = np.stack([measure(image) for image in (*train, *validation)])
    limits = limits_of(measured)
    projection = fit_projection(_ask(engine, train[:: -(-len(train) // FITTED)]).features)
    outputs = _ask(engine, [*validation, *test])
    probabilities = metrics.softmax(outputs.logits, temperature=temperature).astype(np.float32)
    reference = Reference(labels, probabilities, projection, projection(outputs.features), limits)
    flags = [look(image, None, limits) for image in test]
    return reference, ReferenceReport(
        images=len(probabilities),
        limits_from=len(measured),
        flagged=float(np.mean([bool(found) for found in flags])),
        alarmed=float(np.mean([any(flag.alarms for flag in found) for found in flags])),
    )


def fit_projection(features: Float32) -> Projection:
    """Principal components of ``features [N, D]``, each coordinate of unit variance."""
    centre = features.mean(axis=0)
    _, spread, directions = np.linalg.svd(features - centre, full_matrices=False)
    spread = spread / np.sqrt(max(1, len(features) - 1))
    real = int(np.sum(spread[:DIRECTIONS] > 1e-6 * max(spread[0], 1e-12)))
    basis = directions[:real].T / spread[:real]
    left = np.square(spread[real:]).sum()
    scale = float(np.sqrt(left)) if left > 0 else 1.0
    return Projection(centre.astype(np.float32), basis.astype(np.float32), scale)


def _ask(engine: Engine, images: Sequence[UInt8]) -> Outputs:
    starts = console.track(range(0, len(images), _BATCH), "reference statistics")
    parts = [engine.infer(np.stack(images[start : start + _BATCH])) for start in starts]
    return Outputs(
        np.concatenate([part.logits for part in parts]),
        np.concatenate([part.features for part in parts]),
    )


def _some(images: UInt8) -> list[UInt8]:
    """Images of a split, evenly spaced, in memory; as many as a reference has room for."""
    count = len(images)
    rows = np.linspace(0, count - 1, min(count, PER_SPLIT)).round().astype(np.int64)
    return [np.asarray(images[row]) for row in rows]
