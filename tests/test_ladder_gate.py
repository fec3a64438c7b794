"""The gate between rungs: intervals against a plain bootstrap, and every condition it can break."""

import numpy as np
import pytest

from runtime import metrics
from runtime.recipe import LadderGate, Metric
from train.gate import Held, Truth, _draws, _resampled, judge, metric_value, paired_gain

BUDGET = LadderGate()
METRICS: tuple[Metric, ...] = ("auc", "balanced-accuracy", "accuracy")


def logits(labels: np.ndarray, quality: float, seed: int, classes: int = 2) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.asarray(
        random.normal(0, 1, (len(labels), classes)) + quality * np.eye(classes)[labels]
    )


def labels_of(count: int = 240, classes: int = 2) -> np.ndarray:
    return np.arange(count, dtype=np.int64) % classes


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("metric", METRICS)
def test_resampled_metrics_are_those_of_the_resampled_images(metric: Metric, classes: int) -> None:
    """Against the plain way: repeat the rows and call runtime.metrics."""
    labels = labels_of(60, classes)
    answers = logits(labels, 1.0, 0, classes).round(1)  # rounding makes ties
    counts = _draws(labels, seed=3)[0][:5]
    values = _resampled(answers, labels, metric, counts)
    for value, count in zip(values, counts, strict=True):
        rows = np.repeat(np.arange(60), count.astype(int))
        assert value == pytest.approx(metric_value(answers[rows], labels[rows], metric), abs=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_the_interval_covers_a_real_gain_and_not_a_missing_one(metric: Metric) -> None:
    labels = labels_of()
    before = logits(labels, 0.5, 1)
    better = paired_gain(before, before + 1.5 * np.eye(2)[labels], labels, metric,
                         confidence=0.9, seed=0)  # fmt: skip
    assert 0 < better.low < better.value < better.high
    same = paired_gain(before, before.copy(), labels, metric, confidence=0.9, seed=0)
    assert same.low == same.value == same.high == 0, "pairing: the same answers differ by nothing"


def test_an_interval_is_right_as_often_as_it_says() -> None:
    """Two models of equal quality: a one-sided 95 % bound above 0 in about 5 % of the cases."""
    labels = labels_of(200)
    wrongly = 0
    for seed in range(120):
        one, other = logits(labels, 1.0, 2 * seed), logits(labels, 1.0, 2 * seed + 1)
        gain = paired_gain(one, other, labels, "auc", confidence=0.9, seed=seed)
        wrongly += gain.low > 0
    assert wrongly <= 14  # 5 % of 120 is 6; 14 is beyond its 99.8 % quantile


FIELD, SOURCE = labels_of(240), labels_of(300)
TRUTH = Truth(FIELD, SOURCE, np.array([0.5, 0.5]), ("bad", "good"))
POOR = logits(FIELD, 0.3, 5)
GOOD = POOR + 2.0 * np.eye(2)[FIELD]
HOME = logits(SOURCE, 3.0, 6)


def changed(rows: int) -> np.ndarray:
    """The source model's answers with its first right ones turned round."""
    answers = HOME.copy()
    right = np.flatnonzero(HOME.argmax(1) == SOURCE)[:rows]
    answers[right] = answers[right][:, ::-1]
    return answers


def verdict(field: np.ndarray, home: np.ndarray | None, truth: Truth = TRUTH, **more: object):  # type: ignore[no-untyped-def]
    source = None if truth.source is None else HOME
    first = Held(POOR, source)
    return judge(Held(field, home), first, first, truth, BUDGET, "auc", **more)  # type: ignore[arg-type]


def test_a_proven_gain_that_forgets_nothing_passes() -> None:
    result = verdict(GOOD, HOME)
    assert result.passed
    assert result.verified
    assert result.gain is not None
    assert result.gain.low > 0
    assert "auc +0." in result.reason
    assert "on 240 labelled field images" in result.reason


def test_the_same_model_again_proves_nothing() -> None:
    result = verdict(POOR, HOME)
    assert not result.passed
    assert "no proven gain" in result.reason


@pytest.mark.parametrize(
    ("home", "words"),
    [
        (changed(30), "source AUC -0."),
        (changed(12), "source balanced accuracy -0.040, may fall by 0.02"),
        (changed(12), "source negative flips 0.040, at most 0.03"),
        (HOME[:, ::-1], "source negative flips"),
    ],
)
def test_what_was_known_must_still_be_known(home: np.ndarray, words: str) -> None:
    result = verdict(GOOD, home)
    assert not result.passed
    assert words in result.reason


def test_flips_count_even_where_accuracy_is_kept() -> None:
    """As many mended as broken: accuracy stays, but users see another answer."""
    home = changed(12)
    wrong = np.flatnonzero(HOME.argmax(1) != SOURCE)[:12]
    home[wrong] = home[wrong][:, ::-1]
    result = verdict(GOOD, home)
    broken = {check.name for check in result.checks if not check.passed}
    assert "source negative flips" in broken


def test_a_model_that_names_one_class_is_refused() -> None:
    lopsided = GOOD + np.array([0.0, 5.0])  # the ranking, and so the AUC, is as good
    result = verdict(lopsided, HOME)
    assert not result.passed
    assert "of the field images, expected 50%" in result.reason


def test_a_further_rung_must_be_worth_it() -> None:
    """Proven against the source model, but hardly better than what a simpler rung has reached."""
    first = Held(POOR, HOME)
    kept = Held(GOOD, HOME)
    same = judge(Held(GOOD, HOME), kept, first, TRUTH, BUDGET, "auc")
    assert not same.passed
    assert "auc +0.000 over what was kept before, at least 0.01" in same.reason
    better = judge(Held(GOOD + 2.0 * np.eye(2)[FIELD], HOME), kept, first, TRUTH, BUDGET, "auc")
    assert better.passed, better.reason
    assert better.gain is not None
    assert better.gain.value > 0.2, "the proof is against the source model"


def test_prior_matching_is_not_held_to_the_source_s_threshold() -> None:
    assert not verdict(GOOD, changed(30)).passed
    assert verdict(GOOD, changed(30), guard_source=False).passed


@pytest.mark.parametrize(("labels", "verified"), [(240, True), (50, True), (49, False)])
def test_fewer_labels_than_demanded_leave_it_unverified(labels: int, verified: bool) -> None:
    known = FIELD.copy()
    known[labels:] = -1
    result = verdict(GOOD, HOME, TRUTH._replace(field=known))
    assert result.passed
    assert result.verified == verified


def test_without_labels_class_rates_or_degraded_twins_must_speak_for_it() -> None:
    blind = TRUTH._replace(field=np.full(240, -1))
    nothing = verdict(GOOD, HOME, blind)
    assert not nothing.passed
    assert "neither class rates nor degraded twins speak for it" in nothing.reason
    twins = verdict(GOOD, HOME, blind, twins=(0.7, 0.8))
    assert twins.passed
    assert not twins.verified
    assert not verdict(GOOD, HOME, blind, twins=(0.8, 0.8)).passed
    lopsided = Held(POOR + np.array([0.0, 9.0]), HOME)
    rates = judge(Held(POOR, HOME), lopsided, lopsided, blind, BUDGET, "auc")
    assert rates.passed
    assert "predicted class rates were off" in rates.reason


def test_without_source_images_it_says_what_could_not_be_measured() -> None:
    result = verdict(GOOD, None, TRUTH._replace(source=None))
    assert result.passed
    assert "could not be measured: no source images" in result.reason


def test_the_metric_is_runtime_s() -> None:
    answers = logits(FIELD, 1.0, 9)
    assert metric_value(answers, FIELD, "accuracy") == metrics.accuracy(answers.argmax(1), FIELD)
