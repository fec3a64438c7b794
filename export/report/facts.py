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
from export.answers import ANSWERS, Answers, read_answers
from export.release import RELEASE, Release
from runtime.dataset import Dataset, read_dataset
from runtime.errors import ExportError
from runtime.recipe import Recipe
from train.record import Training

T = TypeVar("T")


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
    file: Path | None = None
    """The recipe's file, where its name is known."""


def read_facts(recipe: Recipe) -> Facts:
    """The records in ``recipe.build``.

    Raises ExportError, saying what to run, if one is missing, damaged or of another export.
    """
    build, calibration = recipe.build, recipe.build / "calibration"
    dataset = read_dataset(build / "train" / "images.json")
    release = _decoded(build / RELEASE, Release)
    choice = _decoded(calibration / "images.json", Choice, optional=True)
    sensitivities = _decoded(
        calibration / SENSITIVITY, dict[str, tuple[LayerSensitivity, ...]], optional=True
    )
    assert release is not None
    training = _decoded(build / "train" / "training.json", Training)
    assert training is not None
    if release.checkpoint_sha256 != training.checkpoint_sha256:
        raise ExportError(
            f"{build / RELEASE}: of another checkpoint than {build / 'train'} holds; "
            "run `make export` again"
        )
    table = calibration / "table.json"
    return Facts(
        recipe=recipe,
        release=release,
        training=training,
        dataset=dataset,
        answers=read_answers(build / ANSWERS, dataset),
        choice=choice,
        table=read_table(table) if table.exists() else None,
        sensitivities=sensitivities or {},
    )


def _decoded(path: Path, kind: type[T], *, optional: bool = False) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError as error:
        if optional:
            return None
        raise ExportError(f"{path}: not there; run `make export` first") from error
    except (OSError, msgspec.DecodeError) as error:
        raise ExportError(f"{path}: {error}; run `make export` again") from error
