"""Below which score a device abstains, so that what it does say is wrong seldom enough.

Selective classification with guaranteed risk (Geifman and El-Yaniv 2017): the lowest score is
taken at which, with the confidence asked for, no more of the answers given are wrong than allowed.
Their search halves an interval, and goes astray where few images leave much open: here it is a
fixed list of candidates, each with its share of the doubt. A pure decision on scores of validation
images; test images only ever measure it.
"""

import math
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from runtime import metrics

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

CONFIDENCE = 0.95
"""That the error among the answers given is no larger than its bound."""

CANDIDATES = 10
"""Thresholds that are tried: those that answer a tenth of the images, two tenths, and so on."""

POINTS = 60
"""Of the curve."""


DOUBT = (1 - CONFIDENCE) / CANDIDATES
"""That a candidate's error is larger than its bound."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """What a threshold does to the images it was tried on."""

    threshold: float
    """Answers with this score or a higher one are given."""
    coverage: float
    """Share of the images that are answered."""
    error: float
    """Share of those that are wrong."""
    bound: float
    """Largest share that may really be wrong, with CONFIDENCE over all candidates."""


class Tested(msgspec.Struct, frozen=True, kw_only=True):
    """What the chosen threshold does on test images, which had no say in it."""

    form: str
    coverage: float
    error: float | None
    """Among the answers given; None if there is none."""
    error_interval: tuple[float, float] | None
    """Wilson's, 95 %."""

    def __str__(self) -> str:
        if self.error is None or self.error_interval is None:
            return f"{self.form}: answers no test image"
        low, high = self.error_interval
        return (
            f"{self.form}: answers {self.coverage:.1%} of the test images, {self.error:.1%} "
            f"[{low:.1%}, {high:.1%}] of them wrong"
        )


class Abstention(msgspec.Struct, frozen=True, kw_only=True):
    """The threshold and why; the curve that it was chosen from."""

    max_error: float | None
    """What the recipe asks for."""
    abstain_below: float
    """0 where it never abstains."""
    reason: str
    labelled: int
    """Validation images that it was chosen on."""
    chosen: Point | None = None
    curve: tuple[Point, ...] = ()
    """By rising coverage, on validation images."""
    tested: tuple[Tested, ...] = ()


class Scored(NamedTuple):
    """Answers by falling score."""

    scores: Floats
    """``[N]``, after temperature scaling."""
    wrong: Bools


def scored(logits: Floats, labels: Ints, temperature: float) -> Scored:
    """The labelled ones of ``logits [N, K]``, sorted; labels are -1 where unknown."""
    known = labels >= 0
    probabilities = metrics.softmax(logits[known], temperature=temperature)
    scores = probabilities.max(axis=1)
    order = np.argsort(-scores, kind="stable")
    return Scored(scores[order], (probabilities.argmax(axis=1) != labels[known])[order])


def choose(answers: Scored, max_error: float | None) -> Abstention:
    """The lowest threshold of which ``answers`` prove that no more than ``max_error`` are wrong.

    Where none is asked for, or none can be proven, it never abstains, and the reason says so.
    """
    count = len(answers.scores)
    curve = _points(answers, POINTS)

    def never(reason: str) -> Abstention:
        return Abstention(
            max_error=max_error, abstain_below=0.0, reason=reason, labelled=count, curve=curve
        )

    if max_error is None:
        return never("never abstains: [export] max_error_accepted is not set")
    needed = labels_needed(max_error)
    if count < needed:
        return never(
            f"NEVER ABSTAINS: {count} labelled validation images are too few to prove that at most "
            f"{max_error:.1%} of the answers given are wrong; even without one error it takes "
            f"{needed}"
        )
    tried = _points(answers, CANDIDATES)
    held = [point for point in tried if point.bound <= max_error]
    if not held:
        least = min(tried, key=lambda point: point.bound)
        return never(
            f"NEVER ABSTAINS: no threshold is proven to let at most {max_error:.1%} of the answers "
            f"given be wrong; the best leaves open {least.bound:.1%}, at {least.coverage:.1%} "
            f"answered, on {count} labelled validation images"
        )
    found = held[-1]
    reason = (
        f"abstains below a score of {found.threshold:.3f}: answers {found.coverage:.1%} of {count} "
        f"labelled validation images, {found.error:.1%} of them wrong, with {CONFIDENCE:.0%} "
        f"confidence at most {found.bound:.1%} ({max_error:.1%} allowed)"
    )
    return Abstention(
        max_error=max_error, abstain_below=found.threshold, reason=reason, labelled=count,
        chosen=found, curve=curve,
    )  # fmt: skip


def measure_threshold(form: str, answers: Scored, threshold: float) -> Tested:
    """What ``threshold`` does to ``answers`` that had no say in it."""
    given = answers.wrong[answers.scores >= threshold]
    errors = int(given.sum())
    return Tested(
        form=form,
        coverage=len(given) / len(answers.wrong),
        error=errors / len(given) if len(given) else None,
        error_interval=metrics.wilson_interval(errors, len(given)) if len(given) else None,
    )


def labels_needed(max_error: float) -> int:
    """The fewest labelled images that can prove ``max_error``: without one error among them."""
    return math.ceil(math.log(DOUBT) / math.log1p(-max_error))


def upper_bound(errors: int, count: int, doubt: float) -> float:
    """Clopper and Pearson's (1934): the share with which ``errors`` or fewer have chance ``doubt``.

    The true share is larger than it with at most that probability.
    """
    if errors >= count:
        return 1.0
    ways = np.array(
        [
            math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
            for k in range(errors + 1)
        ]
    )
    hits = np.arange(errors + 1)
    low, high = errors / count, 1.0
    while high - low > 1e-9:
        share = (low + high) / 2
        chance = np.exp(ways + hits * math.log(share) + (count - hits) * math.log1p(-share)).sum()
        low, high = (share, high) if chance > doubt else (low, share)
    return high


def _point(answers: Scored, count: int) -> Point:
    """The threshold that answers ``count`` images, and any others that score the same."""
    threshold = answers.scores[count - 1]
    given = int(np.sum(answers.scores >= threshold))
    errors = int(answers.wrong[:given].sum())
    return Point(
        threshold=float(threshold), coverage=given / len(answers.scores), error=errors / given,
        bound=upper_bound(errors, given, DOUBT),
    )  # fmt: skip


def _points(answers: Scored, most: int) -> tuple[Point, ...]:
    """At most ``most`` thresholds by rising coverage, up to all that are answered."""
    total = len(answers.scores)
    counts = {math.ceil(total * step / most) for step in range(1, most + 1)} - {0}
    return tuple(_point(answers, count) for count in sorted(counts))
