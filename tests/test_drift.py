"""Drift is raised no more often than stated while nothing changes, and when something does."""

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from runtime.monitoring.drift import Drift, DriftReport
from runtime.monitoring.kolmogorov_smirnov import p_value, steps_apart
from runtime.monitoring.reference import Projection, Reference

LABELS = ("crack", "scratch", "sound")
WIDE, DIRECTIONS = 12, 4


def answers(
    random: np.random.Generator, count: int, *, shift: float = 0.0, unsure: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities ``[count, 3]`` and features ``[count, 12]`` of a made-up model."""
    features = random.normal(0, 1, (count, WIDE)).astype(np.float32)
    features[:, 0] += shift
    logits = features[:, :3] * 3 / unsure
    exponent = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponent / exponent.sum(axis=1, keepdims=True), features


def projection() -> Projection:
    basis = np.eye(WIDE, DIRECTIONS, dtype=np.float32)
    return Projection(np.zeros(WIDE, np.float32), basis, float(np.sqrt(WIDE - DIRECTIONS)))


def reference(random: np.random.Generator, count: int = 400) -> Reference:
    probabilities, features = answers(random, count)
    project = projection()
    return Reference(LABELS, probabilities.astype(np.float32), project, project(features), {})


def window(drift: Drift, pairs: tuple[np.ndarray, np.ndarray]) -> DriftReport:
    *before, last = [drift.observe(*pair) for pair in zip(*pairs, strict=True)]
    assert not any(before), "a report comes when the window is full"
    assert last is not None
    return last


@pytest.mark.parametrize(("n", "m"), [(3, 5), (10, 12), (64, 64), (50, 300), (200, 620), (700, 90)])
def test_p_values_are_scipys(n: int, m: int) -> None:
    random = np.random.default_rng([n, m])
    for shift in (0.0, 0.1, 0.3, 0.6):
        one, other = np.sort(random.normal(shift, 1, n)), np.sort(random.normal(0, 1, m))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # it gives up exactness, seldom
            expected = stats.ks_2samp(one, other, method="exact")
        steps = steps_apart(one, other)
        assert steps / (n * m) == pytest.approx(expected.statistic, abs=1e-12)
        assert p_value(steps, n, m) == pytest.approx(expected.pvalue, rel=1e-6)


def test_small_p_values_keep_their_digits() -> None:
    """Of all orders of 40 and 50 values two put all of one sample first."""
    assert p_value(40 * 50, 40, 50) == pytest.approx(2 / math.comb(90, 40))


def test_equal_values_never_make_p_smaller() -> None:
    one, other = np.repeat([0.0, 1.0], [30, 20]), np.repeat([0.0, 1.0], [20, 30])
    steps = steps_apart(one, other)
    assert steps / 2500 == pytest.approx(0.2)
    assert p_value(steps, 50, 50) >= stats.chi2_contingency([[30, 20], [20, 30]]).pvalue


def test_1000_clean_windows_are_raised_at_most_at_the_stated_rate() -> None:
    """At 1 in 100, so that it shows; each against a reference of its own.

    As many as chance allows at that rate, 99 times of 100; none at all would be no test.
    """
    random = np.random.default_rng(0)
    raised = 0
    for _ in range(1000):
        drift = Drift(reference(random, 100), window=40, alpha=0.01)
        raised += window(drift, answers(random, 40)).drifted
    assert 0 < raised <= stats.binom(1000, 0.01).ppf(0.99)


def test_what_moved_most_comes_first_with_its_medians() -> None:
    random = np.random.default_rng(1)
    report = window(Drift(reference(random)), answers(random, 200, shift=1.5))
    assert report.drifted
    assert report.window == 200
    first = report.tests[0]
    assert first.of in ("feature 1", "score of crack")
    assert first.now > first.before
    assert first.p_value < report.threshold
    distances = [moved.distance for moved in report.tests]
    assert distances == sorted(distances, reverse=True)
    assert report.sentence.startswith(f"drift: {first.of}, median {first.now:.3g} in 200 answers")


def test_a_quiet_window_says_what_moved_most_all_the_same() -> None:
    random = np.random.default_rng(2)
    report = window(Drift(reference(random)), answers(random, 200))
    assert not report.drifted
    assert report.sentence.startswith("no drift; moved most: ")
    assert report.alpha / report.threshold == pytest.approx(3 + DIRECTIONS + 1)


def test_scores_that_lose_their_sharpness_are_drift_of_scores() -> None:
    random = np.random.default_rng(3)
    report = window(Drift(reference(random)), answers(random, 200, unsure=4))
    assert report.drifted
    assert report.tests[0].of.startswith("score of ")


def test_features_that_move_where_no_direction_was_fitted_are_drift_too() -> None:
    random = np.random.default_rng(4)
    probabilities, features = answers(random, 200)
    features[:, DIRECTIONS:] *= 2
    report = window(Drift(reference(random)), (probabilities, features))
    assert report.drifted
    assert report.tests[0].of == "other features"


def test_windows_do_not_overlap() -> None:
    random = np.random.default_rng(5)
    drift = Drift(reference(random), window=50)
    assert window(drift, answers(random, 50, shift=3)).drifted
    assert drift.collected == 0
    assert not window(drift, answers(random, 50)).drifted


def test_of_two_classes_one_is_tested() -> None:
    random = np.random.default_rng(6)
    scores = random.random((100, 1)).astype(np.float32)
    two = reference(random, 100)._replace(
        labels=("bad", "good"), probabilities=np.hstack([scores, 1 - scores])
    )
    drift = Drift(two, window=20)
    _, features = answers(random, 20)
    report = window(drift, (np.full((20, 2), 0.5), features))
    assert [moved.of for moved in report.tests if moved.of.startswith("score")] == ["score of bad"]


def test_of_many_classes_those_that_moved_most_are_shown_and_all_are_corrected_for() -> None:
    random = np.random.default_rng(7)
    many = reference(random, 100)._replace(
        labels=tuple(f"class {number}" for number in range(300)),
        probabilities=random.random((100, 300)).astype(np.float32),
    )
    scores = random.random((50, 300))
    scores[:, 41] *= 0.1
    report = window(Drift(many, window=50), (scores, answers(random, 50)[1]))
    assert report.drifted
    assert report.tests[0].of == "score of class 41"
    assert len(report.tests) == 10
    assert report.threshold == pytest.approx(report.alpha / 305)


def test_scores_are_compared_as_the_bundle_holds_them() -> None:
    """In float32: what rounds to 1 there is not another score than 1."""
    random = np.random.default_rng(8)
    sure = np.ones((300, 2), np.float32)
    features = answers(random, 300)[1]
    project = projection()
    held = Reference(("a", "b"), sure, project, project(features), {})
    nearly = np.full((100, 2), 1 - 1e-12)
    report = window(Drift(held, window=100), (nearly, answers(random, 100)[1]))
    moved = next(moved for moved in report.tests if moved.of == "score of a")
    assert moved.distance == 0
    assert moved.p_value == 1
