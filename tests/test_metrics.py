"""Measures against scikit-learn and against what can be worked out by hand."""

import math
import warnings

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference

from runtime import metrics

Ints = npt.NDArray[np.int64]


def ints(*values: int) -> Ints:
    return np.array(values, dtype=np.int64)


labelled = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=50).map(
    lambda pairs: (ints(*[p for p, _ in pairs]), ints(*[y for _, y in pairs]))
)


@given(labelled)
@settings(max_examples=100, deadline=None)
def test_classification_measures(pair: tuple[Ints, Ints]) -> None:
    predicted, labels = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes that only the prediction names
        balanced = reference.balanced_accuracy_score(labels, predicted)
    assert metrics.accuracy(predicted, labels) == reference.accuracy_score(labels, predicted)
    assert metrics.balanced_accuracy(predicted, labels, 3) == pytest.approx(balanced)
    present = np.unique(labels)
    expected = reference.recall_score(labels, predicted, labels=present, average=None)
    recalls = metrics.recalls(predicted, labels, 3)
    assert recalls[present] == pytest.approx(expected)
    assert np.isnan(np.delete(recalls, present)).all()
    assert metrics.worst_recall(predicted, labels, 3) == pytest.approx(min(expected))


def test_unknown_labels_never_count() -> None:
    predicted, labels = ints(0, 1, 1, 0), ints(0, 1, -1, -1)
    assert metrics.accuracy(predicted, labels) == 1.0
    assert metrics.balanced_accuracy(predicted, labels, 2) == 1.0
    none = ints(-1, -1, -1, -1)
    assert math.isnan(metrics.accuracy(predicted, none))
    assert math.isnan(metrics.balanced_accuracy(predicted, none, 2))
    assert math.isnan(metrics.worst_recall(predicted, none, 2))


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=60))
@settings(max_examples=150, deadline=None)
def test_auc_with_ties(pairs: list[tuple[int, bool]]) -> None:
    scores = np.array([score for score, _ in pairs], dtype=np.float64)
    positive = np.array([side for _, side in pairs])
    if positive.all() or not positive.any():
        assert math.isnan(metrics.auc(scores, positive))
    else:
        assert metrics.auc(scores, positive) == pytest.approx(
            reference.roc_auc_score(positive, scores)
        )


def test_macro_auc() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(-1, 3, 200)
    probabilities = metrics.softmax(random.normal(size=(200, 3)))
    known = labels >= 0
    expected = reference.roc_auc_score(
        labels[known], probabilities[known], multi_class="ovr", average="macro"
    )
    assert metrics.macro_auc(probabilities, labels) == pytest.approx(expected)
    two, sides = metrics.softmax(random.normal(size=(200, 2))), labels % 2
    assert metrics.macro_auc(two, sides) == pytest.approx(reference.roc_auc_score(sides, two[:, 1]))
    assert math.isnan(metrics.macro_auc(two, np.zeros(200, dtype=np.int64)))


def test_softmax_is_stable_and_takes_a_temperature() -> None:
    assert metrics.softmax(np.array([[1e4, 0.0]])).tolist() == [[1.0, 0.0]]
    warm = metrics.softmax(np.array([[math.log(9.0), 0.0]]), temperature=2.0)
    assert warm == pytest.approx(np.array([[0.75, 0.25]]))
    assert metrics.softmax(np.zeros((2, 4), dtype=np.float32)).dtype == np.float64


def test_agreement() -> None:
    one = np.array([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    assert metrics.agreement(one, one * 3) == 1.0
    assert metrics.agreement(one, one[::-1]) == 0.0


def test_sqnr() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(1000, 4))
    logits -= logits.mean(axis=1, keepdims=True)
    noise = random.normal(size=(1000, 4))
    noise -= noise.mean(axis=1, keepdims=True)
    scale = np.sqrt(np.sum(logits**2) / np.sum(noise**2))
    assert metrics.sqnr_db(logits, logits + noise * scale / 10) == pytest.approx(20.0)
    # a constant added to every class of a row changes no answer
    assert metrics.sqnr_db(logits, logits + 0.25) > 250
    assert metrics.sqnr_db(logits, logits) == math.inf
    assert metrics.sqnr_db(np.zeros((2, 2)), np.eye(2)) == -math.inf


def test_paired_bootstrap() -> None:
    random = np.random.default_rng(0)
    before = random.random(400) < 0.9
    after = before.copy()
    after[:8] = ~after[:8]
    low, high = metrics.paired_bootstrap(before, after)
    assert (low, high) == metrics.paired_bootstrap(before, after)
    few = {metrics.paired_bootstrap(before, after, rounds=20, seed=seed) for seed in range(5)}
    assert len(few) > 1
    assert low < float(np.mean(after)) - float(np.mean(before)) < high
    # eight changed answers of 400: far narrower than two unpaired intervals would be
    assert high - low < 0.03
    assert metrics.paired_bootstrap(before, before) == (0.0, 0.0)
    assert np.isnan(metrics.paired_bootstrap(before[:0], after[:0])).all()


def test_the_bootstrap_interval_covers_the_truth() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        draw = random.random(300)
        before, after = draw < 0.9, (draw > 0.04) & (draw < 0.9)  # 4 % of the answers are lost
        low, high = metrics.paired_bootstrap(before, after, rounds=400, seed=seed)
        hits += low <= -0.04 <= high
    assert hits >= 180


def test_the_bootstrap_is_that_of_drawn_samples_in_any_order() -> None:
    random = np.random.default_rng(3)
    before, after = random.random(150) < 0.85, random.random(150) < 0.8
    draws = random.integers(0, 150, (20_000, 150))
    means = (after.astype(float) - before)[draws].mean(axis=1)
    expected = np.quantile(means, [0.05, 0.95])
    found = metrics.paired_bootstrap(before, after, rounds=20_000, confidence=0.9)
    assert found == pytest.approx(expected, abs=0.005)
    order = random.permutation(150)
    assert found == metrics.paired_bootstrap(
        before[order], after[order], rounds=20_000, confidence=0.9
    )


def test_the_worst_class_s_bootstrap_is_that_of_images_drawn_within_their_class() -> None:
    random = np.random.default_rng(4)
    labels = np.repeat([0, 1, 2], [200, 60, 25])
    before = np.where(random.random(285) < 0.85, labels, (labels + 1) % 3)
    after = np.where(random.random(285) < 0.1, (labels + 1) % 3, before)
    changes = []
    for _ in range(3000):
        rows = np.concatenate(
            [random.choice(np.flatnonzero(labels == k), (labels == k).sum()) for k in range(3)]
        )
        one, two = (metrics.worst_recall(p[rows], labels[rows], 4) for p in (before, after))
        changes.append(two - one)
    found = metrics.worst_recall_bootstrap(before, after, labels, 4, confidence=0.9)
    assert found == pytest.approx(np.quantile(changes, [0.05, 0.95]), abs=0.02)
    assert found == metrics.worst_recall_bootstrap(before, after, labels, 4, confidence=0.9)
    assert metrics.worst_recall_bootstrap(before, before, labels, 4) == (0.0, 0.0)
    unknown = np.full(285, -1)
    assert np.isnan(metrics.worst_recall_bootstrap(before, after, unknown, 4)).all()


@pytest.mark.parametrize("lost", [0, 1, 4, 9, 30])
@pytest.mark.parametrize("won", [0, 2, 4, 25])
def test_mcnemar_is_the_exact_binomial_test(lost: int, won: int) -> None:
    expected = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert metrics.mcnemar_p(lost, won) == pytest.approx(expected)


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (10, 10), (379, 387), (3, 7)])
def test_wilson(hits: int, total: int) -> None:
    expected = stats.binomtest(hits, total).proportion_ci(0.9, method="wilson")
    found = metrics.wilson_interval(hits, total, confidence=0.9)
    assert found == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("samples", [1, 60, 150, 2000])
def test_what_no_sample_showed_may_still_be_there(samples: int) -> None:
    expected = stats.binomtest(0, samples).proportion_ci(0.9, method="exact").high
    assert metrics.largest_unseen(samples) == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_temperature_is_found_again(temperature: float) -> None:
    random = np.random.default_rng(0)
    calibrated = random.normal(size=(20_000, 3)) * 2
    probabilities = metrics.softmax(calibrated)
    labels = (random.random((20_000, 1)) > probabilities.cumsum(axis=1)).sum(axis=1)
    found = metrics.fit_temperature(calibrated * temperature, labels)
    assert found == pytest.approx(temperature, rel=0.05)


def test_temperature_without_labels_and_at_its_limits() -> None:
    logits = np.array([[4.0, 0.0], [0.0, 4.0]])
    assert metrics.fit_temperature(logits, ints(-1, -1)) == 1.0
    # All right: the likelihood has no optimum, and scores must not all become 1.
    assert metrics.fit_temperature(logits, ints(0, 1)) == 1.0
    assert metrics.fit_temperature(logits, ints(1, 0)) == pytest.approx(20.0, rel=0.1)


def test_percentiles() -> None:
    seconds = np.arange(101) / 1e3
    expected = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    assert metrics.percentiles_ms(seconds) == pytest.approx(expected)
