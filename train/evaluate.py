"""Ask a model about held-out images: features once for each backbone, answers for each head.

It knows what a model says, not whether that is good enough (train/gate) nor what it means
(train/similarity).
"""

from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from runtime import metrics
from runtime.recipe import Metric
from train import console
from train.degradations import DEGRADATIONS, degrade
from train.device import Device
from train.features import compute_features
from train.head import Features, Head, log_loss
from train.material import Material
from train.model import ImageClassifier
from train.similarity import Answers, Portrait, Sweep

Float32 = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

SEVERITIES = (1, 2, 3, 4, 5)


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """What a model does on one set of images; None where no label is known."""

    images: int
    labelled: int
    accuracy: float | None
    balanced_accuracy: float | None
    worst_recall: float | None
    auc: float | None
    log_loss: float | None

    def metric(self, name: Metric) -> float:
        """The value of the recipe's metric; minus infinity if it cannot be known."""
        value = {
            "auc": self.auc,
            "balanced-accuracy": self.balanced_accuracy,
            "accuracy": self.accuracy,
        }[name]
        return -np.inf if value is None else value


def score(logits: Float32, labels: Ints) -> Scores:
    """Scores of ``logits [N, K]`` against ``labels [N]``, -1 where unknown."""
    classes = logits.shape[1]
    predicted = logits.argmax(axis=1)
    return Scores(
        images=len(labels),
        labelled=int((labels >= 0).sum()),
        accuracy=_known(metrics.accuracy(predicted, labels)),
        balanced_accuracy=_known(metrics.balanced_accuracy(predicted, labels, classes)),
        worst_recall=_known(metrics.worst_recall(predicted, labels, classes)),
        auc=_known(metrics.macro_auc(metrics.softmax(logits), labels)),
        log_loss=_known(log_loss(logits, labels)),
    )


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


class Seen(NamedTuple):
    """Features of one backbone; heads that share it share them."""

    views: dict[str, Features]
    """By ``DOMAIN-SPLIT``, ``[N, D]``."""

    def answers(self, head: Head, view: str) -> Answers | None:
        """What ``head`` makes of a view; None if there are no such images."""
        if view not in self.views:
            return None
        features = self.views[view]
        return Answers(head.logits(features), features)


def look(model: ImageClassifier, material: Material, label: str) -> Seen:
    """Features of every held-out image."""
    rows = material.views
    order = np.concatenate(list(rows.values()))
    features = compute_features(
        model, material.pixels, material.device,
        lambda i, n: console.track(i, f"{label}: held-out images", n), rows=order,
    )  # fmt: skip
    model.to("cpu")
    parts = np.split(features, np.cumsum([len(r) for r in rows.values()])[:-1])
    return Seen(dict(zip(rows, parts, strict=True)))


def pick(features: Features, material: Material) -> Seen:
    """The held-out images' part of the features of every image."""
    return Seen({view: np.asarray(features[rows]) for view, rows in material.views.items()})


class SweptFeatures(NamedTuple):
    """Features of source test images and their degraded twins, for any head of the backbone."""

    clean: Float32
    """``[M, D]``"""
    degraded: dict[str, Float32]
    """By degradation ``[5, M, D]``."""

    def answers(self, head: Head) -> Sweep:
        """What ``head`` makes of them."""
        return Sweep(
            clean=head.logits(self.clean),
            degraded={
                name: np.stack([head.logits(at) for at in features])
                for name, features in self.degraded.items()
            },
        )


def sweep_rows(material: Material) -> Ints:
    """The source test images that are degraded: labelled ones, evenly over classes and list."""
    rows = material.rows("source", "test", labelled=True)
    if not len(rows):
        rows = material.rows("target", "test", labelled=True)
    count = min(material.recipe.train.similarity.images, len(rows))
    order = rows[np.argsort(material.labels[rows], kind="stable")]
    return order[np.linspace(0, len(order) - 1, count).round().astype(np.int64)]


def sweep(model: ImageClassifier, material: Material, label: str) -> SweptFeatures | None:
    """Every degradation at every severity on a few labelled test images; None without any."""
    rows = sweep_rows(material)
    if not len(rows):
        return None
    device = material.device
    images = np.asarray(material.pixels[rows])
    clean = compute_features(model, images, device)
    degraded = {}
    for name in console.track(list(DEGRADATIONS), f"{label}: degraded twins"):
        at = [_degraded(images, name, severity, rows, device) for severity in SEVERITIES]
        features = compute_features(model, np.concatenate(at), device)
        degraded[name] = features.reshape(len(SEVERITIES), len(rows), -1)
    model.to("cpu")
    return SweptFeatures(clean, degraded)


def _degraded(
    images: npt.NDArray[np.uint8], name: str, severity: int, seeds: Ints, device: Device
) -> npt.NDArray[np.uint8]:
    on = torch.from_numpy(images).to(device.torch)
    twins: npt.NDArray[np.uint8] = degrade(on, name, severity, seeds.tolist()).cpu().numpy()
    return twins


def portrait(seen: Seen, swept: SweptFeatures | None, head: Head) -> Portrait:
    """What the similarity report compares: test images, which no choice sees."""
    return Portrait(
        source=seen.answers(head, "source-test"),
        target=seen.answers(head, "target-test"),
        sweep=None if swept is None else swept.answers(head),
    )
