"""Where decisions change: chosen on labels of both domains, or matched to expected rates."""

import numpy as np
import pytest

from runtime import metrics
from train.threshold import MIN_LABELS, choose_offsets, class_rates, match_rates, rates_off


def scores(shift: float, count: int = 400, positive: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Logits of two classes whose best threshold is ``shift`` away from 0."""
    random = np.random.default_rng(int(100 * positive))
    labels = (random.random(count) < positive).astype(np.int64)
    margin = random.normal(0, 1, count) + 2.0 * (2 * labels - 1) + shift
    return np.stack([np.zeros(count), margin], axis=1), labels


def test_the_threshold_comes_back_to_where_both_classes_are_told_apart() -> None:
    logits, labels = scores(3.0)
    offsets = choose_offsets([(logits, labels)], "balanced-accuracy")
    assert offsets[0] == 0
    assert offsets[1] == pytest.approx(-3.0, abs=0.3)
    before, after = (
        metrics.balanced_accuracy((logits + o).argmax(1), labels, 2) for o in (0 * offsets, offsets)
    )
    assert before < 0.75
    assert after > 0.95


def test_accuracy_and_balanced_accuracy_want_different_thresholds() -> None:
    random = np.random.default_rng(0)
    labels = (np.arange(1000) % 20 == 0).astype(np.int64)
    logits = np.stack([np.zeros(1000), random.normal(0, 1, 1000) + labels], axis=1)
    balanced = choose_offsets([(logits, labels)], "balanced-accuracy")
    plain = choose_offsets([(logits, labels)], "accuracy")
    assert plain[1] < balanced[1] - 1, "with few positives accuracy calls almost nothing positive"
    np.testing.assert_array_equal(choose_offsets([(logits, labels)], "none"), [0, 0])


def test_two_domains_have_the_same_say_whatever_their_size() -> None:
    large, small = scores(2.0, 4000), scores(-2.0, 200, 0.4)
    both = choose_offsets([large, small], "balanced-accuracy")[1]
    assert -1.5 < both < 1.5
    alone = choose_offsets([large], "balanced-accuracy")[1]
    assert alone == pytest.approx(-2.0, abs=0.3)


def test_too_few_labels_have_no_say() -> None:
    logits, labels = scores(3.0)
    few = labels.copy()
    few[MIN_LABELS - 1 :] = -1
    np.testing.assert_array_equal(choose_offsets([(logits, few)], "balanced-accuracy"), [0, 0])


def test_three_classes_each_find_their_offset() -> None:
    random = np.random.default_rng(1)
    labels = random.integers(0, 3, 900)
    logits = random.normal(0, 0.5, (900, 3)) + 2.0 * np.eye(3)[labels] + [0.0, 2.5, -2.5]
    offsets = choose_offsets([(logits, labels)], "balanced-accuracy")
    assert metrics.accuracy(logits.argmax(1), labels) < 0.75
    assert metrics.balanced_accuracy((logits + offsets).argmax(1), labels, 3) > 0.97


def test_class_rates_count_classes_that_nobody_predicts() -> None:
    assert class_rates(np.array([0, 0, 1, 0]), 3).tolist() == [0.75, 0.25, 0.0]


@pytest.mark.parametrize("expected", [(0.7, 0.3), (0.5, 0.3, 0.2), (0.1, 0.6, 0.2, 0.1)])
def test_predicted_rates_become_the_expected_ones(expected: tuple[float, ...]) -> None:
    random = np.random.default_rng(2)
    logits = random.normal(0, 1, (2000, len(expected))) + 3 * random.normal(0, 1, len(expected))
    offsets = match_rates(logits, np.array(expected))
    rates = class_rates((logits + offsets).argmax(1), len(expected))
    np.testing.assert_allclose(rates, expected, atol=0.01)


def test_rates_that_are_off_are_named() -> None:
    expected = np.array([0.3, 0.7])
    assert rates_off(np.array([0.2, 0.8]), expected, 2.0, ("bad", "good")) is None
    words = rates_off(np.array([0.94, 0.06]), expected, 2.0, ("bad", "good"))
    assert words is not None
    assert "'bad' is predicted for 94% of the field images, expected 30%" in words
    assert rates_off(np.array([0.0, 1.0]), expected, 2.0, ("bad", "good")) is not None
