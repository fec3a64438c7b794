"""What every rung of one run shares: images, labels, splits, the device, and where results go.

It answers questions about rows; it trains nothing and decides nothing.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from runtime.dataset import Dataset, Split
from runtime.recipe import Recipe
from train import console
from train.device import Device
from train.features import cached_features, compute_features
from train.head import Features
from train.model import ImageClassifier
from train.pixels import load_pixels
from train.threshold import class_rates

Floats = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CACHE = Path("build") / "cache"

MIN_RATE_LABELS = 20
"""Labelled field images below which class rates are expected to be the source's."""


class Material:
    """The arrays of one run; ``rows`` index all of them."""

    def __init__(
        self, recipe: Recipe, dataset: Dataset, device: Device, folder: Path, key: str
    ) -> None:
        self.recipe, self.dataset, self.device = recipe, dataset, device
        self.folder, self.key = folder, key
        self.classes = len(dataset.classes)
        examples = dataset.examples
        self.labels = np.array([dataset.label_index(e) for e in examples], dtype=np.int64)
        self._domain = np.array([e.domain for e in examples])
        self._split = np.array([e.split for e in examples])
        self.pixels = load_pixels(
            examples, recipe.input, CACHE, lambda i, n: console.track(i, "decoding images", n)
        )

    def rows(self, domain: str, split: Split, *, labelled: bool | None = None) -> Ints:
        """Rows of a domain and split: all, the labelled or (False) the unlabelled ones."""
        chosen = (self._domain == domain) & (self._split == split)
        if labelled is not None:
            chosen &= (self.labels >= 0) == labelled
        return np.flatnonzero(chosen)

    @property
    def views(self) -> dict[str, Ints]:
        """Rows of the held-out images, by ``DOMAIN-SPLIT``."""
        splits: tuple[Split, ...] = ("validation", "test")
        found = {f"{d}-{s}": self.rows(d, s) for d in ("source", "target") for s in splits}
        return {name: rows for name, rows in found.items() if len(rows)}

    @property
    def has_source(self) -> bool:
        """Whether there are source images: to replay, and to measure what was forgotten."""
        return len(self.rows("source", "train")) > 0

    @property
    def labels_used(self) -> int:
        """Labelled field images that training may learn from."""
        return len(self.rows("target", "train", labelled=True))

    @property
    def field_labels_may_choose(self) -> bool:
        """``labels = 0`` asks for an adaptation that no field label shaped in any way."""
        return self.recipe.data.labels != 0

    def expected_rates(self) -> tuple[Float64, str]:
        """Class rates ``[K]`` to expect in the field, and where they are from."""
        labels = [self.labels[self.rows("target", "train", labelled=True)]]
        if self.field_labels_may_choose:
            labels.append(self.labels[self.rows("target", "validation", labelled=True)])
        known = np.concatenate(labels)
        if len(known) >= MIN_RATE_LABELS:
            return class_rates(known, self.classes), f"{len(known)} labelled field images"
        known = self.labels[self.rows("source", "train", labelled=True)]
        if len(known):
            return class_rates(known, self.classes), "the source, for want of field labels"
        return np.full(self.classes, 1 / self.classes), "nothing: every class alike"

    def features(self, model: ImageClassifier) -> Features:
        """Cached features ``[N, D]`` of every image; float16, possibly a memory map."""
        features = cached_features(
            model, self.pixels, self.images_sha256, CACHE, self.device,
            lambda i, n: console.track(i, "features of the frozen backbone", n),
        )  # fmt: skip
        model.to("cpu")
        return features

    def held_out_features(self, model: ImageClassifier, rows: Ints) -> Features:
        """Features ``[n, D]`` of some rows, straight from the model while it is being trained."""
        return compute_features(model, self.pixels, self.device, rows=rows)

    def log(self, name: str) -> Path:
        """Where the TensorBoard log of a training goes."""
        return self.folder / "tensorboard" / f"{name}-{self.key[:8]}"

    @property
    def images_sha256(self) -> str:
        """Stands for ``pixels``: their content, order and preprocessing."""
        digest = hashlib.sha256(msgspec.json.encode(self.recipe.input))
        for example in self.dataset.examples:
            digest.update(example.sha256.encode())
        return digest.hexdigest()


def balanced_weights(groups: Sequence[int]) -> Floats:
    """Sample weights of mean 1 for groups of these sizes, one after another, of equal totals."""
    filled = [count for count in groups if count]
    total = sum(filled)
    return np.concatenate(
        [np.full(count, total / (len(filled) * count), dtype=np.float32) for count in filled]
    )
