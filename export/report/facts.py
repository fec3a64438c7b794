"""What a report is made from: the records that training, calibration and export left in a build.

It reads and checks that they belong together; it neither draws nor words.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from calibration.images import Choice
from calibration.sensitivity import SENSITIVITY, LayerSensitivity
from calibration.table import Table, read_table
from export.answers import ANSWERS, CHECKPOINT, Answers, read_answers
from export.precision_ladder import EMITTERS
from export.release import RELEASE, Release
from runtime.bundle import MANIFEST
from runtime.dataset import Dataset, read_dataset
from runtime.errors import ExportError
from runtime.manifest import Manifest, decode
from runtime.metrics import agreement
from runtime.recipe import Recipe, load_recipe
from train.record import Training

T = TypeVar("T")

Sensitivities = dict[str, tuple[LayerSensitivity, ...]]


class Facts(NamedTuple):
    """Everything that a report may show. What a recipe did not make is None or empty."""

    recipe: Recipe
    release: Release
    training: Training
    dataset: Dataset
    answers: Answers
    choice: Choice | None
    """The calibration images."""
    table: Table | None
    sensitivities: Mapping[str, tuple[LayerSensitivity, ...]]
    """Each layer alone in INT8, worst first, by form."""
    manifest: Manifest | None
    """Of the bundle; None if this release was not written as one."""
    file: Path
    """The recipe's."""


def read_facts(file: Path) -> Facts:
    """The records in the build folder of the recipe at ``file``.

    Raises RecipeError if that is none, DataError or ExportError, saying what to run, if a record is
    missing, damaged or of another training or export.
    """
    recipe = load_recipe(file)
    build = recipe.build
    dataset = read_dataset(build / "train" / "images.json")
    training = _needed(build / "train" / "training.json", Training, made_by="train")
    release = _needed(build / RELEASE, Release, made_by="export")
    answers = read_answers(build / ANSWERS, dataset)
    if difference := _difference(release, training, dataset, answers):
        raise ExportError(f"{build / RELEASE}: {difference}; run `make export` again")
    choice, table, sensitivities = _calibration(build / "calibration", release)
    return Facts(
        recipe=recipe,
        release=release,
        training=training,
        dataset=dataset,
        answers=answers,
        choice=choice,
        table=table,
        sensitivities=sensitivities,
        manifest=_manifest(build),
        file=file,
    )


def _difference(
    release: Release, training: Training, dataset: Dataset, answers: Answers
) -> str | None:
    """What says that these were not made together."""
    if release.checkpoint_sha256 != training.checkpoint_sha256:
        return "of another checkpoint than training left"
    if release.dataset_sha256 != dataset.sha256:
        return "of other images, labels or splits than training has"
    said = answers.logits[CHECKPOINT]
    found = {form: agreement(said, logits) for form, logits in answers.logits.items()}
    told = {r.form: r.attempts[-1].quality.agreement for r in release.forms if r.released}
    return None if found == {CHECKPOINT: 1.0, **told} else f"of other answers than {ANSWERS} holds"


def _calibration(
    folder: Path, release: Release
) -> tuple[Choice | None, Table | None, Sensitivities]:
    """What INT8 was written from; a release without INT8 may find that of an earlier one there."""
    path = folder / "table.json"
    if not path.exists() or not any(report.form in EMITTERS for report in release.forms):
        return None, None, {}
    sensitivities = _decoded(folder / SENSITIVITY, Sensitivities) or {}
    return _decoded(folder / "images.json", Choice), read_table(path), sensitivities


def _manifest(build: Path) -> Manifest | None:
    """Of the bundle that holds this release: one that is refused leaves an earlier bundle."""
    bundle = build / "bundle"
    written = (bundle / RELEASE).is_file()
    if not written or (bundle / RELEASE).read_bytes() != (build / RELEASE).read_bytes():
        return None
    return decode((bundle / MANIFEST).read_bytes())


def _needed(path: Path, kind: type[T], *, made_by: str) -> T:
    found = _decoded(path, kind)
    if found is None:
        raise ExportError(f"{path}: not there; run `make {made_by}` first")
    return found


def _decoded(path: Path, kind: type[T]) -> T | None:
    """None if it is not there."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise ExportError(f"{path}: {error}; run `make export` again") from error
