"""The section ``answers``: which classes the checkpoint and every released form mistake for which.

It knows what was answered, not to which picture: single images are in export/report/flipped.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from export.report.facts import Facts
from export.report.page import Section, render
from runtime import metrics

FEW = 12
"""Classes up to which a matrix can be read; of more, the worst confusions are listed."""
WORST = 15
"""Confusions that are listed then."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Judged(NamedTuple):
    """Forms that give the same answer to every image, and what those answers are worth."""

    forms: tuple[str, ...]
    matrix: Ints
    """``[K, K]``: images of class ``row`` that were answered as class ``column``."""
    right: int
    interval: tuple[float, float]
    """Of the accuracy, by Wilson, at 95 %."""

    @property
    def images(self) -> int:
        """Those with a label."""
        return int(self.matrix.sum())

    @property
    def accuracy(self) -> float:
        return self.right / self.images

    @property
    def recalls(self) -> tuple[float | None, ...]:
        """Of each class; None for one that no image has."""
        return tuple(
            int(row[index]) / int(row.sum()) if row.sum() else None
            for index, row in enumerate(self.matrix)
        )


class Confusion(NamedTuple):
    """One class that is answered as another."""

    label: int
    answer: int
    images: int
    share: float
    """Of the images of ``label``."""


def make(facts: Facts) -> Section | None:
    """The section; None if no test image of the field has a label."""
    classes, labels = facts.dataset.classes, facts.answers.labels
    if not (labels >= 0).any():
        return None
    judged = judge(facts.answers.logits, labels)
    reference = judged[0]  # the checkpoint's: it is the first of the answers
    order = worst_first(reference.recalls) if len(classes) > FEW else range(len(classes))
    body = render(
        "answers.html",
        classes=classes,
        accuracies=[_accuracy(group) for group in judged],
        names=[_and(group.forms) for group in judged],
        recalls=[_recalls(index, classes[index], judged) for index in order],
        judged=judged,
        confusions=[worst_confusions(group.matrix) for group in judged],
        totals=reference.matrix.sum(axis=1),
        few=len(classes) <= FEW,
        unlabelled=int((labels < 0).sum()),
        worst=WORST,
        share=_share,
    )
    return Section("answers", "Answers by class", _lead(judged), body)


def confusion_matrix(predicted: Ints, labels: Ints, classes: int) -> Ints:
    """Counts ``[K, K]``, label by answer, of class indices ``[N]``; unknown labels do not count."""
    known = labels >= 0
    pairs = labels[known] * classes + predicted[known]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def judge(logits: Mapping[str, Floats], labels: Ints) -> tuple[Judged, ...]:
    """What each of ``logits`` ``[N, K]`` is worth by ``labels`` ``[N]``; equal ones are joined.

    At least one label must be known.
    """
    same: dict[bytes, list[str]] = {}
    for form, array in logits.items():
        same.setdefault(array.argmax(axis=1).tobytes(), []).append(form)
    return tuple(_judged(forms, logits[forms[0]], labels) for forms in same.values())


def worst_confusions(matrix: Ints) -> tuple[Confusion, ...]:
    """All that occur in ``matrix``, most images first, of equal ones the larger share first."""
    totals = matrix.sum(axis=1)
    found = [
        Confusion(int(label), int(answer), int(count), int(count) / int(totals[label]))
        for (label, answer), count in np.ndenumerate(matrix)
        if label != answer and count
    ]
    return tuple(sorted(found, key=lambda c: (-c.images, -c.share, c.label, c.answer)))


def worst_first(recalls: Sequence[float | None]) -> list[int]:
    """Indices of ``recalls`` from the smallest up; classes without images last."""
    return sorted(range(len(recalls)), key=lambda i: (recalls[i] is None, recalls[i] or 0.0, i))


def _judged(forms: Sequence[str], logits: Floats, labels: Ints) -> Judged:
    matrix = confusion_matrix(logits.argmax(axis=1), labels, logits.shape[1])
    right = int(np.trace(matrix))
    return Judged(tuple(forms), matrix, right, metrics.wilson_interval(right, int(matrix.sum())))


def _accuracy(group: Judged) -> tuple[str, ...]:
    low, high = group.interval
    interval = f"{100 * low:.1f}–{high:.1%}"
    return _and(group.forms), f"{group.right:,}", f"{group.accuracy:.1%}", interval


def _recalls(index: int, name: str, judged: Sequence[Judged]) -> tuple[str, ...]:
    images = int(judged[0].matrix[index].sum())
    return name, f"{images:,}", *(_share(group.recalls[index]) for group in judged)


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _lead(judged: Sequence[Judged]) -> str:
    reference, *others = judged
    low, high = reference.interval
    told = (
        f"Of {reference.images:,} labelled field test images {reference.right:,} are answered "
        f"rightly by {_and(reference.forms)} ({reference.accuracy:.1%}, 95% interval {low:.1%} to "
        f"{high:.1%})"
    )
    rest = [f"{g.right:,} by {_and(g.forms)} ({g.accuracy:.1%})" for g in others]
    return f"{_and([told, *rest])}."


def _and(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
