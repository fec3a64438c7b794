"""The order of training's steps: images, source model, ladder, checkpoint, record, report.

It composes; what is tried and kept is decided in train/ladder. Test images are scored for the
record only: no choice ever sees them.
"""

import platform
import time

import msgspec
import numpy as np
import torch

from runtime import atomic, metrics
from runtime.dataset import Dataset, Split, write_dataset
from runtime.recipe import Recipe
from runtime.version import __version__
from train import console, distributed
from train.bring import Brought, bring
from train.checkpoint import CheckpointFacts, write_checkpoint
from train.data import prepare
from train.device import choose_device
from train.domains import Track
from train.evaluate import Scores, portrait, score, sweep_rows
from train.ladder import Climb, Ladder
from train.material import CACHE, Material
from train.record import Rung, Skipped, Training, finished, training_key
from train.report import ClimbTable, write_report
from train.similarity import Similarity, measure
from train.source import SourceRecord, source_model
from train.trial import Candidate, Tried

__all__ = ["CACHE", "train"]


def train(recipe: Recipe) -> tuple[Training, bool]:
    """Adapt the model of ``recipe`` and write ``build/NAME/train/``.

    Returns the record, and whether anything had to be done. Raises RecipeError or DataError for
    what the user can mend; KeyboardInterrupt leaves a state that the next call goes on from.
    """
    start = time.monotonic()
    folder = recipe.build / "train"
    brought = _bring(recipe)  # before any image is opened: what does not fit shows at once
    with distributed.main_first():  # the others find its caches
        dataset = prepare(
            recipe, cache=CACHE, known=brought.classes if brought else (),
            track=_track("reading images"), draw=_track("simulating field photos"),
        )  # fmt: skip
    if distributed.main():
        write_dataset(folder / "images.json", dataset)
    _describe(dataset)
    key = training_key(recipe, dataset)
    if (done := finished(folder, key)) is not None:
        return done, False
    device = choose_device()
    console.say(f"training on {device.reason}")
    torch.manual_seed(recipe.seed)  # weights = "random"
    material = Material(recipe, dataset, device, folder, key)
    source, made = source_model(material, brought)
    climb = Ladder(material, source, made.seconds, ClimbTable(recipe.train.metric)).climb()
    training = _record(material, made, climb, start)
    if distributed.main():
        training = _write(material, climb, training)
    distributed.barrier()
    return training, True


def _bring(recipe: Recipe) -> Brought | None:
    if recipe.source.checkpoint is None:
        return None
    return bring(recipe.source, recipe.model, recipe.input)


def _write(material: Material, climb: Climb, training: Training) -> Training:
    """Checkpoint first: a record without it would be a lie."""
    folder = material.folder
    facts = CheckpointFacts(
        name=training.name, classes=material.dataset.classes, model=material.recipe.model,
        input=material.recipe.input, recipe_sha256=training.recipe_sha256,
        dataset_sha256=training.dataset_sha256, rung=training.rung,
        temperature=training.temperature, verified=training.verified, adaptation=training.reason,
        labels_used=training.labels_used if climb.kept.rung else 0,
    )  # fmt: skip
    digest = write_checkpoint(folder / "checkpoint.safetensors", climb.kept.model, facts)
    training = msgspec.structs.replace(training, checkpoint_sha256=digest)
    write_report(folder, training, material.dataset.classes)
    data = msgspec.json.format(msgspec.json.encode(training), indent=1)
    atomic.write_bytes(folder / "training.json", data)
    for left in (*folder.glob("resume-*.safetensors"), *folder.glob("rung-*.safetensors")):
        left.unlink()
    return training


def _record(material: Material, made: SourceRecord, climb: Climb, start: float) -> Training:
    recipe, dataset = material.recipe, material.dataset
    first = climb.tried[0].candidate
    return Training(
        name=recipe.name,
        key=material.key,
        metric=recipe.train.metric,
        source=made,
        rungs=tuple(_rung(material, tried, first, climb) for tried in climb.tried),
        skipped=tuple(Skipped(name=s.name, rung=s.rung, reason=s.reason) for s in climb.skipped),
        rung=climb.kept.name,
        verified=climb.verified,
        reason=climb.reason,
        ended=climb.ended,
        labels_used=material.labels_used,
        labels_held_out=len(material.rows("target", "validation", labelled=True)),
        temperature=_temperature(material, climb.kept),
        checkpoint_sha256="",
        recipe_sha256=recipe.sha256,
        dataset_sha256=dataset.sha256,
        images=_counts(dataset),
        device=material.device.reason,
        processes=distributed.size(),
        seconds=time.monotonic() - start,
        versions={
            "fieldfit": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
    )


def _rung(material: Material, tried: Tried, first: Candidate, climb: Climb) -> Rung:
    candidate, verdict = tried
    reason = "the source model" if verdict is None else verdict.reason
    return Rung(
        name=candidate.name,
        rung=candidate.rung,
        kept=candidate is climb.kept,
        passed=verdict is not None and verdict.passed,
        reason=climb.reason if candidate is climb.kept else reason,
        verdict=verdict,
        scores=scores_of(material, candidate),
        similarity=_similarity(material, candidate, first),
        details=candidate.details,
        seconds=candidate.seconds,
    )


def scores_of(material: Material, candidate: Candidate) -> dict[str, Scores]:
    """By ``DOMAIN-SPLIT``, at the threshold that ships."""
    return {
        view: score(candidate.head.logits(candidate.seen.views[view]), material.labels[rows])
        for view, rows in material.views.items()
    }


def _similarity(material: Material, candidate: Candidate, first: Candidate) -> Similarity:
    before, after = (portrait(c.seen, c.swept, c.head) for c in (first, candidate))
    rows = material.rows("source", "test")
    return measure(
        before, after,
        source_labels=material.labels[rows] if len(rows) else None,
        sweep_labels=material.labels[sweep_rows(material)],
        labels_used=material.labels_used if candidate.rung else 0,
        seconds=candidate.seconds, seed=material.recipe.seed,
    )  # fmt: skip


def _temperature(material: Material, kept: Candidate) -> float:
    """Fitted on validation images of the field, or of the source where those have no labels."""
    for domain in (material.dataset.field, "source"):
        rows = material.rows(domain, "validation")
        labels = material.labels[rows]
        if len(np.unique(labels[labels >= 0])) > 1:
            logits = kept.head.logits(kept.seen.views[f"{domain}-validation"])
            return metrics.fit_temperature(logits, labels)
    return 1.0


def _track(label: str) -> Track:
    return lambda items: console.track(items, label)


def _counts(dataset: Dataset) -> dict[str, int]:
    counts: dict[str, int] = {}
    for example in dataset.examples:
        name = f"{example.domain}-{example.split}"
        counts[name] = counts.get(name, 0) + 1
    return counts


def _describe(dataset: Dataset) -> None:
    splits: tuple[Split, ...] = ("train", "validation", "test")
    rows = []
    for domain in ("source", "target"):
        for name in (*dataset.classes, None):
            counts = [
                sum(e.label == name for e in dataset.select(domain, split)) for split in splits
            ]
            if sum(counts):
                rows.append([f"{domain}: {(name or 'no label')[:50]}", *map(str, counts)])
    console.table("images", ["domain and class", *splits], rows)
    for aside in dataset.set_aside[:10]:
        console.say(f"set aside: {aside.path}: {aside.reason}")
    if len(dataset.set_aside) > 10:
        console.say(f"... and {len(dataset.set_aside) - 10} more, all listed in images.json")
    if dataset.duplicates:
        first = ", ".join(dataset.duplicates[0])
        console.say(f"{len(dataset.duplicates)} images occur more than once, e.g. {first}")
