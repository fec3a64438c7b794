"""The head of rung 1: its optimum, its pull to the source head, cross-validation; and CORAL."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from train import head as head_module
from train.coral import recolour
from train.head import Head, choose_strength, fit_head, join_targets, log_loss


def problem(count: int = 200, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    x = random.normal(0, 1, (count, 12)).astype(np.float32)
    x /= np.sqrt(np.mean(np.square(x)))
    noise = random.normal(0, 1, (count, classes))
    return x, (x @ random.normal(0, 1, (12, classes)) + noise).argmax(1).astype(np.int64)


def test_the_head_finds_the_optimum_that_scikit_learn_finds() -> None:
    x, y = problem()
    sample = np.random.default_rng(2).uniform(0.5, 2.0, 200).astype(np.float32)
    sample /= sample.mean()
    l2 = 1e-2
    ours = fit_head(x, y, sample, classes=3, l2=l2, epochs=400).logits(x)
    # scikit-learn minimises C * sum(loss) + 1/2 |w|²; ours is mean(loss) + l2 |w|².
    reference = LogisticRegression(C=1 / (2 * l2 * 200), tol=1e-8, max_iter=2000)
    reference.fit(x, y, sample_weight=sample)
    theirs = x @ reference.coef_.T + reference.intercept_
    np.testing.assert_allclose(ours - ours.mean(1, keepdims=True),
                               theirs - theirs.mean(1, keepdims=True), atol=0.02)  # fmt: skip


def test_a_strong_pull_leaves_the_source_head_where_it_was() -> None:
    x, y = problem()
    start = Head(np.random.default_rng(3).normal(0, 1, (3, 12)).astype(np.float32),
                 np.zeros(3, np.float32))  # fmt: skip
    ones = np.ones(len(y), np.float32)
    held = fit_head(x, y, ones, classes=3, l2=1e4, epochs=200, start=start)
    np.testing.assert_allclose(held.weight, start.weight, atol=1e-3)
    free = fit_head(x, y, ones, classes=3, l2=1e-4, epochs=200, start=start)
    assert log_loss(free.logits(x), y) < log_loss(held.logits(x), y)
    distances = [
        float(np.linalg.norm(fit_head(x, y, ones, classes=3, l2=l2, epochs=200, start=start).weight
                             - start.weight))
        for l2 in (1e-3, 1e-2, 1e-1, 1.0)
    ]  # fmt: skip
    assert distances == sorted(distances, reverse=True), "a stronger pull holds it nearer"


def test_rows_read_in_chunks_from_half_precision_give_the_same_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features larger than memory are a float16 map on disk, read again in every pass."""
    x, y = problem(300)
    np.save(tmp_path / "x.npy", x.astype(np.float16))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    rows = np.arange(0, 300, 2)
    ones = np.ones(len(rows), np.float32)
    whole = fit_head(mapped, y[rows], ones, classes=3, l2=1e-2, epochs=300, rows=rows)
    monkeypatch.setattr(head_module, "CHUNK", 32)
    parts = fit_head(mapped, y[rows], ones, classes=3, l2=1e-2, epochs=300, rows=rows)
    np.testing.assert_allclose(whole.weight, parts.weight, atol=5e-3)
    copied = fit_head(np.asarray(mapped[rows]), y[rows], ones, classes=3, l2=1e-2, epochs=300)
    np.testing.assert_allclose(whole.weight, copied.weight, atol=5e-3)


def test_probabilities_as_targets_are_the_labels_where_they_are_certain() -> None:
    x, y = problem()
    ones = np.ones(len(y), np.float32)
    hard = fit_head(x, y, ones, classes=3, l2=1e-2, epochs=300)
    soft = fit_head(x, np.eye(3, dtype=np.float32)[y], ones, classes=3, l2=1e-2, epochs=300)
    np.testing.assert_allclose(hard.weight, soft.weight, atol=5e-3)
    joined = join_targets(y[:2], y[2:4], 3)
    np.testing.assert_array_equal(joined, np.eye(3)[y[:4]])


def field(count: int, noise: float) -> tuple[np.ndarray, np.ndarray, Head]:
    """A field whose classes differ where the start head does not look, and its labels."""
    random = np.random.default_rng(4)
    y = np.arange(count, dtype=np.int64) % 2
    x = random.normal(0, 1, (count, 40)).astype(np.float32)
    x[:, 0] += (2 * y - 1) * 1.5
    flip = random.random(count) < noise
    start = np.zeros((2, 40), np.float32)
    start[:, 1] = (-0.5, 0.5)
    return x, np.where(flip, 1 - y, y), Head(start, np.zeros(2, np.float32))


@pytest.mark.parametrize(("noise", "strongest"), [(0.0, False), (0.5, True)])
def test_cross_validation_pulls_harder_the_less_labels_tell(noise: float, strongest: bool) -> None:
    x, y, start = field(120, noise)
    nothing = np.zeros(0, np.int64)
    strength, losses = choose_strength(
        x, (nothing, np.zeros((0, 2), np.float32), np.zeros(0, np.float32)),
        (np.arange(120), y, np.ones(120, np.float32)),
        strengths=(1e-3, 1e-2, 3.0), folds=5, start=start, seed=0,
    )  # fmt: skip
    assert losses[strength] == min(losses.values())
    assert (strength == 3.0) == strongest, losses


def test_recoloured_features_have_the_field_s_mean_and_covariance() -> None:
    random = np.random.default_rng(5)
    source = (random.normal(0, 1, (4000, 6)) * np.arange(1, 7)).astype(np.float32)
    mixing = random.normal(0, 1, (6, 6))
    target = (random.normal(0, 1, (4000, 6)) @ mixing + 3).astype(np.float32)
    moved = recolour(source, target, ridge=1e-6)
    np.testing.assert_allclose(moved.mean(0), target.mean(0), atol=1e-3)
    np.testing.assert_allclose(np.cov(moved.T), np.cov(target.T), rtol=0.02, atol=0.02)
    still = recolour(source, source)
    np.testing.assert_allclose(still, source, atol=1e-3)
