"""The section ``flipped``: test images that a form answers otherwise than the checkpoint does.

And the checkpoint's own worst mistakes. It shows single images; how often classes are mistaken is
in export/report/answers.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from export.answers import CHECKPOINT
from export.report.facts import Facts
from export.report.page import Section, render
from export.report.thumbnails import thumbnail
from runtime import metrics

SHOWN = 24
"""Flipped images of a form; the others are counted."""
MISTAKES = 12
"""Of the checkpoint's mistakes, the surest."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Direction = Literal["lost", "both wrong", "unknown", "won"]

HARM: dict[Direction, str] = {
    "lost": "was right, now wrong",
    "both wrong": "was wrong, wrong now too",
    "unknown": "no label",
    "won": "was wrong, now right",
}
"""Directions in words, the most harmful first."""


class Answer(NamedTuple):
    """A class and its score."""

    class_index: int
    score: float


class Flip(NamedTuple):
    """An image that two models answer differently."""

    row: int
    direction: Direction
    passed: bool
    """Whether a part that is not OK is answered as OK: on a line, the dearest mistake."""
    before: Answer
    after: Answer


class Mistake(NamedTuple):
    """An image that is answered wrong."""

    row: int
    answer: Answer


class Card(NamedTuple):
    """One image of the page, and what was said to it."""

    picture: Markup
    file: str
    label: str
    answers: tuple[tuple[str, str, float], ...]
    """Who says what, with which score."""
    verdicts: tuple[str, ...]
    kind: str
    """Of the verdicts: good, bad, or soft."""


class Flipped(NamedTuple):
    """The flips of one form."""

    form: str
    told: str
    cards: tuple[Card, ...]
    left: int
    """Flips that are not shown."""


def make(facts: Facts) -> Section:
    """The section; without a flip it says so."""
    answers, temperature = facts.answers, facts.training.temperature
    reference = answers.logits[CHECKPOINT]
    ok = [facts.dataset.classes.index(name) for name in facts.recipe.export.ok]
    found = {
        form: find_flips(reference, logits, answers.labels, temperature, ok=ok)
        for form, logits in answers.logits.items()
        if form != CHECKPOINT
    }
    same = [form for form, flips in found.items() if not flips]
    mistakes = find_mistakes(reference, answers.labels, temperature)
    body = render(
        "flipped.html",
        forms=[_flipped(form, flips, facts) for form, flips in found.items() if flips],
        same=same,
        images=len(reference),
        unseen=metrics.largest_unseen(len(reference)),
        mistakes=[_mistake(mistake, facts) for mistake in mistakes[:MISTAKES]],
        wrong=len(mistakes),
        labelled=int((answers.labels >= 0).sum()),
    )
    counts = [f"{len(flips)} by {form}" for form, flips in found.items() if flips]
    counts += [f"none by {', '.join(same)}"] if same else []
    lead = (
        f"Answered otherwise than by the checkpoint, of {len(reference):,} field test images: "
        f"{', '.join(counts)}."
    )
    return Section("flipped", "Images whose answer changed", lead, body)


def find_flips(
    reference: Floats, logits: Floats, labels: Ints, temperature: float, *, ok: Sequence[int] = ()
) -> tuple[Flip, ...]:
    """Rows in which ``reference`` and ``logits`` ``[N, K]`` name different classes, worst first.

    ``labels`` ``[N]`` are -1 where unknown. What was right comes before what was wrong already, a
    part that is answered as one of the classes ``ok`` without being one before others, and then
    the surer answer before the less sure.
    """
    before, after = _answers(reference, temperature), _answers(logits, temperature)
    flips = [
        Flip(row, _direction(one, other, label), _passed(label, other.class_index, ok), one, other)
        for row, (one, other, label) in enumerate(zip(before, after, labels.tolist(), strict=True))
        if one.class_index != other.class_index
    ]
    order = list(HARM)
    return tuple(
        sorted(flips, key=lambda f: (order.index(f.direction), not f.passed, -f.after.score, f.row))
    )


def find_mistakes(logits: Floats, labels: Ints, temperature: float) -> tuple[Mistake, ...]:
    """Rows of ``logits`` ``[N, K]`` whose answer is not the known label, the surest first."""
    answers = _answers(logits, temperature)
    wrong = [
        Mistake(row, answer)
        for row, (answer, label) in enumerate(zip(answers, labels.tolist(), strict=True))
        if label not in (-1, answer.class_index)
    ]
    return tuple(sorted(wrong, key=lambda mistake: (-mistake.answer.score, mistake.row)))


def _answers(logits: Floats, temperature: float) -> list[Answer]:
    scores = metrics.softmax(logits, temperature=temperature).max(axis=1)
    classes = logits.argmax(axis=1)
    return [Answer(*pair) for pair in zip(classes.tolist(), scores.tolist(), strict=True)]


def _direction(before: Answer, after: Answer, label: int) -> Direction:
    if label == -1:
        return "unknown"
    if label == before.class_index:
        return "lost"
    return "won" if label == after.class_index else "both wrong"


def _passed(label: int, answer: int, ok: Sequence[int]) -> bool:
    return label != -1 and label not in ok and answer in ok


def _flipped(form: str, flips: Sequence[Flip], facts: Facts) -> Flipped:
    counts = Counter(flip.direction for flip in flips)
    told = "; ".join(f"{words}: {counts[d]}" for d, words in HARM.items() if counts[d])
    told = f"{told[0].upper()}{told[1:]}."
    if passed := sum(flip.passed for flip in flips):
        told += f" On a line, {passed} DEFECT of these would pass as OK."
    abstention = facts.release.abstention
    if abstention is not None and abstention.abstain_below > 0:
        given = sum(flip.after.score >= abstention.abstain_below for flip in flips)
        told += (
            f" A device abstains below a score of {abstention.abstain_below:.3f}: of these "
            f"answers it would give {given or 'none'}."
        )
    cards = tuple(_flip(form, flip, facts) for flip in flips[:SHOWN])
    return Flipped(form, told, cards, len(flips) - len(cards))


def _flip(form: str, flip: Flip, facts: Facts) -> Card:
    kind = {"won": "good", "unknown": "soft"}.get(flip.direction, "bad")
    verdicts = [HARM[flip.direction], *(["DEFECT passes as OK"] if flip.passed else [])]
    return _card(flip.row, facts, {CHECKPOINT: flip.before, form: flip.after}, kind, verdicts)


def _mistake(mistake: Mistake, facts: Facts) -> Card:
    return _card(mistake.row, facts, {CHECKPOINT: mistake.answer})


def _card(
    row: int, facts: Facts, said: dict[str, Answer], kind: str = "", verdicts: Sequence[str] = ()
) -> Card:
    example, classes = facts.answers.examples[row], facts.dataset.classes
    file, label = Path(example.path).name, example.label or "unknown"
    named = tuple((who, classes[answer.class_index], answer.score) for who, answer in said.items())
    spoken = ", ".join(f"{who} says {answer}" for who, answer, _ in named)
    alt = f"{file}, label {label}: {spoken}"
    picture = thumbnail(example.path, example.sha256, facts.recipe.input, alt)
    return Card(picture, file, label, named, tuple(verdicts), kind)
