"""``training.json``: every rung that was tried, what it scored, and why it was kept or dropped.

It holds what was found; decisions are made in train/ladder and train/gate.
"""

import hashlib
from pathlib import Path

import msgspec

from runtime.dataset import Dataset
from runtime.recipe import Metric, Recipe
from runtime.version import __version__
from train.evaluate import Scores
from train.gate import Verdict
from train.rungs import Details
from train.similarity import Similarity
from train.source import SourceRecord


class Rung(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate: what it scored and what became of it."""

    name: str
    rung: int
    """0 as is and recalibration, 1 feature extraction, 2 fine-tuning, 3 adversarial."""
    kept: bool
    """Whether it is the checkpoint."""
    passed: bool
    """Whether it replaced what was kept before it."""
    reason: str
    verdict: Verdict | None
    """None for the source model as it is, which proves nothing."""
    scores: dict[str, Scores]
    """By ``DOMAIN-SPLIT``; validation decides, test is for the record."""
    similarity: Similarity | None
    details: Details
    seconds: float


class Skipped(msgspec.Struct, frozen=True, kw_only=True):
    """A rung that was not tried, and why."""

    name: str
    rung: int
    reason: str


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """``training.json``: everything that led to the checkpoint."""

    name: str
    key: str
    """Digest of what the result depends on; the same key means nothing needs to be done."""
    metric: Metric
    source: SourceRecord
    rungs: tuple[Rung, ...]
    skipped: tuple[Skipped, ...]
    rung: str
    """The one that is the checkpoint."""
    verified: bool
    """False: fewer labelled field images than the recipe demands stood behind it."""
    reason: str
    ended: str
    """Why the ladder was not climbed further."""
    labels_used: int
    """Labelled field images that training learned from."""
    labels_held_out: int
    """Labelled field images that decided and judged."""
    temperature: float
    checkpoint_sha256: str
    recipe_sha256: str
    dataset_sha256: str
    images: dict[str, int]
    device: str
    processes: int
    seconds: float
    versions: dict[str, str]


def training_key(recipe: Recipe, dataset: Dataset) -> str:
    """Digest of all that decides the result: settings, images, and the content of model files."""
    files = [Path(recipe.model.weights), Path(recipe.source.checkpoint or "")]
    start = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()]
    parts = (
        recipe.seed, recipe.input, recipe.model, recipe.source, recipe.train, recipe.data.labels,
        dataset.field, __version__,
    )  # fmt: skip
    return hashlib.sha256(msgspec.json.encode([parts, start, dataset.sha256])).hexdigest()


def finished(folder: Path, key: str) -> Training | None:
    """The record of a finished run with the same key whose checkpoint is still whole."""
    try:
        training = msgspec.json.decode((folder / "training.json").read_bytes(), type=Training)
        checkpoint = (folder / "checkpoint.safetensors").read_bytes()
    except (OSError, msgspec.DecodeError):
        return None
    whole = hashlib.sha256(checkpoint).hexdigest() == training.checkpoint_sha256
    return training if whole and training.key == key else None
