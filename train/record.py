"""``training.json``: every rung that was tried, its scores, and why it was kept or dropped.

It holds what was found and words the reasons; the choice is made in train/pipeline.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from runtime.dataset import Dataset
from runtime.recipe import Recipe
from runtime.version import __version__
from train.evaluate import Scores
from train.finetune import Epoch


class Rung(msgspec.Struct, frozen=True, kw_only=True):
    """One strategy that was tried, what it scored and what became of it."""

    name: str
    scores: dict[str, Scores]
    """By ``DOMAIN-SPLIT``; validation decides, test is for the record."""
    value: float
    """The recipe's metric on the images that decide."""
    log_loss: float
    """On the same images; decides between rungs of equal value."""
    seconds: float
    l2: float | None = None
    history: tuple[Epoch, ...] = ()
    kept: bool = False
    reason: str = ""


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """``training.json``: everything that led to the checkpoint."""

    name: str
    key: str
    """Digest of what the result depends on; the same key means nothing needs to be done."""
    rungs: tuple[Rung, ...]
    rung: str
    reason: str
    decided_on: str
    temperature: float
    checkpoint_sha256: str
    recipe_sha256: str
    dataset_sha256: str
    images: dict[str, int]
    device: str
    seconds: float
    versions: dict[str, str]


def training_key(recipe: Recipe, dataset: Dataset) -> str:
    """Digest of all that decides the result: settings, images, and a weights file's content."""
    weights = Path(recipe.model.weights)
    start = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else ""
    parts = (recipe.seed, recipe.input, recipe.model, recipe.train, dataset.field, __version__)
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


def rank(rung: Rung) -> tuple[float, float]:
    """By the recipe's metric, then by log-loss: small sets of images tie easily."""
    return rung.value, -rung.log_loss


def why_kept(chosen: Rung, rungs: Sequence[Rung], metric: str, decided_on: str) -> str:
    """One sentence: by what, and how far ahead of the next best."""
    others = [rung for rung in rungs if rung is not chosen]
    if not others:
        return "the only rung"
    best = max(others, key=rank)
    words = (
        f"{metric} {chosen.value:.4f} on {decided_on} images, "
        f"the next best ({best.name}) {best.value:.4f}"
    )
    if best.value == chosen.value:
        words += f": a tie, decided by log-loss, {chosen.log_loss:.4f} against {best.log_loss:.4f}"
    return words


def why_dropped(rung: Rung, chosen: Rung, metric: str) -> str:
    """One sentence: how far behind ``chosen``."""
    if rung.value == chosen.value:
        return f"no better than {chosen.name} (log-loss {rung.log_loss:.4f})"
    return f"{metric} {chosen.value - rung.value:.4f} below {chosen.name}"
