"""The gate between rungs: what a candidate must prove on held-out images before it is kept.

A pure decision: answers of two models and budgets in, verdict and reasons out. It knows neither
images nor how the candidate was made. (export/gate judges artifacts against their checkpoint.)
"""

from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from runtime import metrics
from runtime.recipe import LadderGate, Metric
from train.similarity import negative_flips
from train.threshold import class_rates, rates_off

Floats = npt.NDArray[np.floating]
Float64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

ROUNDS = 1000
"""Resamples of the bootstrap."""

CHUNK = 50
"""Rounds computed at a time: bounds memory where there are many images."""

FLIPS = "source negative flips"
"""Name of the check that users notice most."""

FEW = 20
"""Labelled held-out field images below which no gain is judged at all."""


class Held(NamedTuple):
    """What one model says to the held-out images that decide; logits are those that ship."""

    field: Floats
    """``[N, K]``"""
    source: Floats | None
    """``[M, K]``; None where there are no source images."""


class Truth(NamedTuple):
    """What is known of the same images."""

    field: Ints
    """``[N]``, -1 unknown."""
    source: Ints | None
    """``[M]``"""
    expected: Floats
    """``[K]`` class rates to expect in the field."""
    names: tuple[str, ...]
    """Of the classes, for words."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One condition: what was measured, what was demanded."""

    name: str
    passed: bool
    words: str
    value: float | None = None
    limit: float | None = None


class Gain(msgspec.Struct, frozen=True, kw_only=True):
    """Change of a metric on the same images, and its paired bootstrap interval."""

    metric: Metric
    value: float
    low: float
    high: float
    images: int


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a candidate replaces the model it was judged against, and why (not)."""

    passed: bool
    verified: bool
    """Enough labelled field images stood behind it."""
    reason: str
    gain: Gain | None
    checks: tuple[Check, ...]


def judge(
    candidate: Held,
    kept: Held,
    source_model: Held,
    truth: Truth,
    budget: LadderGate,
    metric: Metric,
    *,
    twins: tuple[float, float] | None = None,
    guard_source: bool = True,
    seed: int = 0,
) -> Verdict:
    """Whether ``candidate`` replaces ``kept``.

    Both the gain and what must not be lost are proven against ``source_model``: that adapting
    helped, and that it did not forget. Of those that are proven the better one by ``min_gain`` is
    worth having, however uncertain the difference between the two is. ``twins`` are
    the shares of images that ``kept`` and the candidate answer like their degraded twins: the only
    evidence where there are no field labels. ``guard_source=False`` is for prior matching, which
    changes no weight and sets the threshold for the field alone: nothing is forgotten, and with
    the source's own threshold the source's answers are what they were.
    """
    checks: list[Check] = []
    gain = None
    known = truth.field >= 0
    labelled = int(known.sum())
    verified = labelled >= budget.min_labels
    if labelled >= FEW and len(np.unique(truth.field[known])) > 1:
        gain = paired_gain(
            source_model.field, candidate.field, truth.field, metric,
            confidence=budget.confidence, seed=seed,
        )  # fmt: skip
        checks.append(_gain_check(gain))
        if kept is not source_model:
            checks.append(_step_check(candidate, kept, truth, metric, budget))
    else:
        checks.append(_evidence_check(candidate, kept, truth, budget, twins))
        verified = False
    if truth.source is not None and guard_source:
        assert candidate.source is not None
        assert source_model.source is not None
        checks += retention(candidate.source, source_model.source, truth.source, budget)
    off = _rates_off(candidate, truth, budget)
    words = off or "predicted class rates as expected"
    checks.append(Check(name="predicted rates", passed=off is None, words=words))
    broken = [check.words for check in checks if not check.passed]
    reason = "; ".join(broken or [check.words for check in checks])
    if truth.source is None:
        reason += "; what the source model knew could not be measured: no source images"
    return Verdict(
        passed=not broken, verified=verified, reason=reason, gain=gain, checks=tuple(checks)
    )


def _gain_check(gain: Gain) -> Check:
    words = (
        f"{gain.metric} {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] on {gain.images} "
        "labelled field images"
    )
    if gain.low <= 0:
        words = f"no proven gain: {words}, the lower end must be above 0"
    return Check(name="gain", passed=gain.low > 0, words=words, value=gain.low, limit=0.0)


def _step_check(
    candidate: Held, kept: Held, truth: Truth, metric: Metric, budget: LadderGate
) -> Check:
    """Against what was kept before: enough to be worth the change."""
    before, after = (metric_value(model.field, truth.field, metric) for model in (kept, candidate))
    words = f"{metric} {after - before:+.3f} over what was kept before"
    passed = after - before >= budget.min_gain
    if not passed:
        words += f", at least {budget.min_gain:g} is worth a further rung"
    return Check(
        name="step", passed=passed, words=words, value=after - before, limit=budget.min_gain
    )


def _evidence_check(
    candidate: Held,
    kept: Held,
    truth: Truth,
    budget: LadderGate,
    twins: tuple[float, float] | None,
) -> Check:
    """Without labels: class rates that were off are no longer, or degraded twins agree more."""
    name = "evidence without labels"
    before, after = (_rates_off(model, truth, budget) for model in (kept, candidate))
    if before and not after:
        return Check(name=name, passed=True, words="predicted class rates were off, now expected")
    if twins is not None and twins[1] > twins[0]:
        words = f"answers for degraded twins agree more: {twins[0]:.1%} -> {twins[1]:.1%}"
        return Check(name=name, passed=True, words=words)
    words = "no field labels, and neither class rates nor degraded twins speak for it"
    return Check(name=name, passed=False, words=words)


def _rates_off(model: Held, truth: Truth, budget: LadderGate) -> str | None:
    rates = class_rates(model.field.argmax(axis=1), model.field.shape[1])
    return rates_off(rates, truth.expected, budget.max_rate_ratio, truth.names)


def retention(after: Floats, before: Floats, labels: Ints, budget: LadderGate) -> list[Check]:
    """What logits ``after [M, K]`` may have lost of ``before``, the source model's, on the source.

    At most ``max_auc_drop`` of AUC, ``max_balanced_accuracy_drop`` at the thresholds that ship, and
    ``max_negative_flips`` answers that were right.
    """
    classes = before.shape[1]
    auc = [metrics.macro_auc(metrics.softmax(x), labels) for x in (before, after)]
    balanced = [
        metrics.balanced_accuracy(x.argmax(axis=1), labels, classes) for x in (before, after)
    ]
    flips = negative_flips(before.argmax(axis=1), after.argmax(axis=1), labels)
    return [
        _drop("source AUC", auc[0] - auc[1], budget.max_auc_drop),
        _drop(
            "source balanced accuracy",
            balanced[0] - balanced[1],
            budget.max_balanced_accuracy_drop,
        ),
        _limit(FLIPS, flips, budget.max_negative_flips, f"{FLIPS} {flips:.3f}, at most"),
    ]


def _drop(name: str, drop: float, limit: float) -> Check:
    words = f"{name} {-drop:+.3f}, may fall by"
    return _limit(name, drop, limit, words)


def _limit(name: str, value: float, limit: float, words: str) -> Check:
    # NaN (a class is missing among the held-out images) is no proof.
    passed = bool(value <= limit + 1e-9)
    # None, since JSON has no NaN.
    known = None if np.isnan(value) else value
    return Check(name=name, passed=passed, words=f"{words} {limit:g}", value=known, limit=limit)


def metric_value(logits: Floats, labels: Ints, metric: Metric) -> float:
    """``metric`` of ``logits [N, K]`` on known ``labels [N]``; NaN if it cannot be known."""
    predicted = logits.argmax(axis=1)
    if metric == "accuracy":
        return metrics.accuracy(predicted, labels)
    if metric == "balanced-accuracy":
        return metrics.balanced_accuracy(predicted, labels, logits.shape[1])
    return metrics.macro_auc(metrics.softmax(logits), labels)


def paired_gain(
    before: Floats,
    after: Floats,
    labels: Ints,
    metric: Metric,
    *,
    confidence: float,
    seed: int,
) -> Gain:
    """How much ``metric`` changed on the same images, with a percentile bootstrap interval.

    Images are resampled within their class, the same draw for both models: pairing removes the
    variation that they share. (Efron and Tibshirani 1993, chapters 8 and 13.)
    """
    known = labels >= 0
    labels = labels[known]
    before, after = before[known], after[known]
    differences = np.concatenate(
        [
            _resampled(after, labels, metric, counts) - _resampled(before, labels, metric, counts)
            for counts in _draws(labels, seed)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    value = metric_value(after, labels, metric) - metric_value(before, labels, metric)
    return Gain(
        metric=metric, value=float(value), low=float(low), high=float(high), images=len(labels)
    )


def _draws(labels: Ints, seed: int) -> list[Float64]:
    """How often each image occurs in each resample: ROUNDS rows in chunks ``[CHUNK, N]``."""
    random = np.random.default_rng((seed, 7))
    chunks = []
    for _ in range(ROUNDS // CHUNK):
        counts = np.zeros((CHUNK, len(labels)))
        for name in np.unique(labels):
            members = np.flatnonzero(labels == name)
            share = np.full(len(members), 1 / len(members))
            counts[:, members] = random.multinomial(len(members), share, size=CHUNK)
        chunks.append(counts)
    return chunks


def _resampled(logits: Floats, labels: Ints, metric: Metric, counts: Float64) -> Float64:
    """``metric`` in each resample ``[R]`` with image counts ``[R, N]``."""
    right = (logits.argmax(axis=1) == labels).astype(np.float64)
    if metric == "accuracy":
        return np.asarray(counts @ right / len(labels))
    classes = [k for k in range(logits.shape[1]) if (labels == k).any()]
    if metric == "balanced-accuracy":
        recalls = [
            counts[:, labels == k] @ right[labels == k] / (labels == k).sum() for k in classes
        ]
        return np.asarray(np.mean(recalls, axis=0))
    scores = metrics.softmax(logits)
    if logits.shape[1] == 2:
        return _weighted_auc(scores[:, 1], labels == 1, counts)
    return np.asarray(
        np.mean([_weighted_auc(scores[:, k], labels == k, counts) for k in classes], axis=0)
    )


def _weighted_auc(scores: Floats, positive: npt.NDArray[np.bool_], counts: Float64) -> Float64:
    """AUC with image counts ``[R, N]``, ties counted half, as runtime.metrics.auc."""
    _, group = np.unique(scores, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    sorted_counts, sorted_positive = counts[:, order], positive[order]
    up = np.add.reduceat(sorted_counts * sorted_positive, starts, axis=1)
    down = np.add.reduceat(sorted_counts * ~sorted_positive, starts, axis=1)
    below = np.cumsum(down, axis=1) - down
    wins = (up * (below + down / 2)).sum(axis=1)
    return np.asarray(wins / (up.sum(axis=1) * down.sum(axis=1)))
