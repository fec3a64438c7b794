"""``answers.npz``: what the checkpoint and every released form say to the field's test images.

Kept so that a report can be drawn again without asking anything.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.dataset import Dataset, Example
from runtime.errors import ExportError
from runtime.npz import read_npz

ANSWERS = "answers.npz"
CHECKPOINT = "checkpoint"
"""Its name among the forms."""

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class Answers(NamedTuple):
    """The field's test images with what was said to them, in the order of the dataset."""

    examples: tuple[Example, ...]
    labels: npt.NDArray[np.int64]
    """``[N]``, -1 where unknown."""
    logits: Mapping[str, npt.NDArray[np.float32]]
    """``[N, K]`` by form; CHECKPOINT first."""


def encode_answers(labels: Ints, logits: Mapping[str, Floats]) -> bytes:
    """The bytes of ``answers.npz``; see Answers."""
    file = io.BytesIO()
    arrays = {f"logits.{form}": array for form, array in logits.items()}
    np.savez(file, allow_pickle=False, labels=labels, **arrays)
    return file.getvalue()


def read_answers(path: Path, dataset: Dataset) -> Answers:
    """The answers at ``path`` with the images of ``dataset`` that they belong to.

    Raises ExportError, saying what to run, if they are missing, damaged or of other images.
    """
    examples = dataset.select(dataset.field, "test")
    try:
        arrays = read_npz(path.read_bytes())
        labels = arrays.pop("labels")
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"{path}: {error}; run `make export` again") from error
    logits = {name.removeprefix("logits."): array for name, array in arrays.items()}
    if CHECKPOINT not in logits or any(len(a) != len(examples) for a in (labels, *logits.values())):
        raise ExportError(f"{path}: of other images than the dataset has; run `make export` again")
    return Answers(examples, labels, logits)
