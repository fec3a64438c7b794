"""The similarity report against independent forms, hand-made cases and the model itself."""

import itertools
import math

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from runtime import metrics
from train import similarity
from train.similarity import Answers, Portrait, Similarity, Sweep, measure

Floats = npt.NDArray[np.float32]
CLASSES = ("good", "defective")


def normal(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ints(*values: int) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


LABELS = np.random.default_rng(9).integers(-1, 2, 60)
SWEEP_LABELS = LABELS[:20]


def portrait(noise: float = 0.0) -> Portrait:
    """Answers of a model that is right more often than not; ``noise`` makes it another one."""
    right = np.eye(2, dtype=np.float32)[LABELS.clip(min=0)]
    logits = right + normal(1, 60, 2) + noise * normal(2, 60, 2)
    features = normal(3, 60, 7) + noise * normal(4, 60, 7)
    steps = np.arange(1, 6, dtype=np.float32)[:, None, None]
    degraded = {
        name: logits[:20] + steps * normal(seed, 5, 20, 2)
        for seed, name in enumerate(("blur", "exposure"))
    }
    target = Answers(normal(5, 40, 2), normal(6, 40, 7) + 2)
    return Portrait(Answers(logits, features), target, Sweep(logits[:20], degraded))


def compare(before: Portrait, after: Portrait) -> Similarity:
    return measure(
        before, after, source_labels=LABELS, sweep_labels=SWEEP_LABELS,
        labels_used=50, seconds=1.5, seed=0,
    )  # fmt: skip


def test_the_source_model_against_itself_has_changed_in_nothing() -> None:
    model = portrait()
    found = compare(model, model)
    assert found.agreement == 1.0
    assert found.negative_flips == 0.0
    assert found.churn == 0.0
    assert found.cka == pytest.approx(1.0, abs=1e-12)
    assert found.target_cka == pytest.approx(1.0, abs=1e-12)
    assert found.corruption_errors == {"blur": 1.0, "exposure": 1.0}
    assert found.mean_corruption_error == 1.0


def test_a_report_holds_what_each_measure_says_alone() -> None:
    before, after = portrait(), portrait(noise=1.0)
    found = compare(before, after)
    assert before.source is not None
    assert after.source is not None
    assert after.sweep is not None
    old, new = before.source.logits.argmax(axis=1), after.source.logits.argmax(axis=1)
    known = LABELS >= 0
    assert found.source_accuracy == np.mean(new[known] == LABELS[known])
    assert found.source_balanced_accuracy == balanced_accuracy_score(LABELS[known], new[known])
    margins = after.source.logits[:, 1] - after.source.logits[:, 0]
    assert found.source_auc == pytest.approx(roc_auc_score(LABELS[known], margins[known]))
    assert found.agreement == np.mean(old == new)
    assert found.churn == np.mean(old != new)
    assert found.predicted_rates["source"] == (np.mean(new == 0), np.mean(new == 1))
    blurred = after.sweep.degraded["blur"].argmax(axis=2)
    labelled = SWEEP_LABELS >= 0
    wrong = [np.mean(row[labelled] != SWEEP_LABELS[labelled]) for row in blurred]
    assert found.errors is not None
    assert found.errors["blur"] == pytest.approx(wrong)
    assert found.corruption_errors is not None
    assert found.mean_corruption_error == np.mean(list(found.corruption_errors.values()))
    assert found.images == {"source": 60, "target": 40, "sweep": 20}
    assert (found.labels_used, found.seconds) == (50, 1.5)


def test_without_source_images_only_the_field_is_known() -> None:
    model = portrait()._replace(source=None, sweep=None)
    found = measure(
        model, model, source_labels=None, sweep_labels=None, labels_used=0, seconds=0.0, seed=0
    )
    known = {name for name, value in msgspec.to_builtins(found).items() if value is not None}
    assert known == {"images", "target_cka", "predicted_rates", "labels_used", "seconds"}
    assert set(found.predicted_rates) == {"target"}
    text = similarity.markdown("solar", CLASSES, found, [("head", found)])
    assert "what was forgotten cannot be measured" in text
    assert "| agreement | – | – |" in text


def test_without_known_labels_answers_are_still_compared() -> None:
    none = np.full(60, -1)
    found = measure(
        portrait(), portrait(1.0), source_labels=none, sweep_labels=none[:20],
        labels_used=0, seconds=0.0, seed=0,
    )  # fmt: skip
    assert found.source_accuracy is None
    assert found.source_auc is None
    assert found.negative_flips is None
    assert found.errors is None
    assert found.mean_corruption_error is None
    assert found.agreement is not None
    assert 0.0 < found.agreement < 1.0
    assert found.twin_agreement is not None


def test_a_report_survives_its_record() -> None:
    found = compare(portrait(), portrait(0.5))
    assert msgspec.json.decode(msgspec.json.encode(found), type=Similarity) == found


def test_flips_and_churn_by_hand() -> None:
    labels = ints(0, 0, 1, 1, -1, 1)
    before = ints(0, 1, 1, 0, 0, 1)
    after = ints(1, 0, 1, 0, 1, 0)
    # Right before and wrong after: the first and the last of five known ones.
    assert similarity.negative_flips(before, after, labels) == 2 / 5
    assert similarity.negative_flips(after, before, labels) == 1 / 5
    assert similarity.churn(before, after) == 4 / 6
    assert math.isnan(similarity.negative_flips(before, after, np.full(6, -1)))


def hsic_cka(x: Floats, y: Floats) -> float:
    """CKA by Gram matrices and the centring matrix: Kornblith et al. 2019, equations 3 and 4."""
    centre = np.eye(len(x)) - 1 / len(x)

    def hsic(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
        return float(np.trace(a @ centre @ b @ centre))

    k, m = (f.astype(np.float64) @ f.astype(np.float64).T for f in (x, y))
    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


@pytest.mark.parametrize(("d", "e"), [(3, 8), (40, 5), (60, 60)])
def test_cka_is_the_ratio_of_hsic(d: int, e: int) -> None:
    x = normal(d, 30, d) + 5
    y = x[:, :1] * normal(e, 1, e) + normal(e + 1, 30, e)
    found = similarity.linear_cka(x, y)
    assert found == pytest.approx(hsic_cka(x, y), rel=1e-9)
    assert 0.0 < found < 1.0


def test_cka_ignores_rotation_scale_and_offset_and_nothing_else() -> None:
    x = normal(0, 50, 6)
    rotation, _ = np.linalg.qr(normal(1, 6, 6))
    assert similarity.linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1.0, abs=1e-6)
    assert similarity.linear_cka(x, x * np.array([10, 1, 1, 1, 1, 1])) < 0.9
    assert math.isnan(similarity.linear_cka(x, np.ones((50, 2))))


@pytest.mark.parametrize(("n", "m", "d"), [(80, 120, 5), (80, 400, 100)])
def test_domains_that_are_apart_have_distance_2(n: int, m: int, d: int) -> None:
    assert similarity.proxy_a_distance(normal(0, n, d), normal(1, m, d) + 6, seed=0) == 2.0


@pytest.mark.parametrize(("n", "m", "d"), [(400, 400, 5), (200, 800, 300)])
def test_domains_that_are_one_have_distance_near_0(n: int, m: int, d: int) -> None:
    distances = [
        similarity.proxy_a_distance(normal(2 * s, n, d), normal(2 * s + 1, m, d), seed=s)
        for s in range(4)
    ]
    assert max(distances) < 0.3
    assert np.mean(distances) < 0.15


def test_the_same_images_in_both_domains_cannot_be_told_apart() -> None:
    x = normal(0, 100, 20)
    assert similarity.proxy_a_distance(x, x, seed=0) < 0.1


def test_distance_of_overlapping_domains_is_that_of_fishers_discriminant() -> None:
    source, target = normal(0, 1000, 4), normal(1, 1000, 4)
    target[:, 2] += 1.5
    fit = LinearDiscriminantAnalysis()
    half = np.concatenate([source[:500], target[:500]])
    held = np.concatenate([source[500:], target[500:]])
    sides = np.repeat([0, 1], 500)
    accuracy = fit.fit(half, sides).score(held, sides)
    expected = 2 * (1 - 2 * (1 - accuracy))
    assert similarity.proxy_a_distance(source, target, seed=3) == pytest.approx(expected, abs=0.1)


def test_distances_need_two_images_of_each_domain() -> None:
    one, many = normal(0, 1, 4), normal(1, 9, 4)
    assert math.isnan(similarity.proxy_a_distance(one, many, seed=0))
    assert math.isnan(similarity.mmd2(many, one, seed=0))


def naive_mmd2(x: Floats, y: Floats) -> float:
    both = [row.astype(np.float64) for row in np.concatenate([x, y])]
    pairs = itertools.combinations(both, 2)
    median = float(np.median([np.sum((a - b) ** 2) for a, b in pairs]))

    def kernel(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
        distance = float(np.sum((a - b) ** 2))
        widths = (0.25, 0.5, 1.0, 2.0, 4.0)
        return sum(math.exp(-distance / (width * median)) for width in widths) / 5

    first, second = both[: len(x)], both[len(x) :]
    total = -2 * float(np.mean([kernel(a, b) for a in first for b in second]))
    for rows in (first, second):
        total += float(np.mean([kernel(a, b) for a, b in itertools.permutations(rows, 2)]))
    return total


@pytest.mark.parametrize("shift", [0.0, 0.7, 5.0])
def test_mmd_is_the_double_loop(shift: float) -> None:
    x, y = normal(0, 12, 3), normal(1, 17, 3) + shift
    assert similarity.mmd2(x, y, seed=0) == pytest.approx(naive_mmd2(x, y), rel=1e-9)


def test_mmd_is_unbiased_and_grows_with_the_shift() -> None:
    chance = [similarity.mmd2(normal(s, 40, 4), normal(s + 100, 40, 4), seed=0) for s in range(30)]
    assert min(chance) < 0.0 < max(chance)
    assert abs(np.mean(chance)) < 0.005
    shifted = [similarity.mmd2(normal(0, 40, 4), normal(1, 40, 4) + d, seed=0) for d in (1, 2, 4)]
    assert max(chance) < shifted[0] < shifted[1] < shifted[2]
    assert similarity.mmd2(np.ones((3, 2)), np.ones((4, 2)), seed=0) == 0.0


def test_many_images_are_drawn_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "KERNEL_IMAGES", 10)
    x, y = normal(0, 60, 3), normal(1, 60, 3) + 1
    one, again, other = (similarity.mmd2(x, y, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


def test_twins_by_hand() -> None:
    clean = np.array([[0.9, 0.1], [0.4, 0.6]])
    degraded = np.array([[[0.8, 0.2], [0.4, 0.6]], [[0.3, 0.7], [0.6, 0.4]]])
    agreement, change = similarity.twin_change(clean, degraded)
    assert agreement == 0.5
    assert change == pytest.approx((0.1 + 0.0 + 0.6 + 0.2) / 4)


def test_corruption_error_by_hand() -> None:
    labels = ints(0, 1, 1, -1)
    right = np.array([[2, 0], [0, 2], [0, 2], [0, 2]], dtype=np.float32)
    one_wrong = np.array([[2, 0], [0, 2], [2, 0], [0, 2]], dtype=np.float32)
    before = similarity.severity_errors(np.stack([right, one_wrong, -right]), labels)
    assert before == pytest.approx((0.0, 1 / 3, 1.0))
    after = similarity.severity_errors(np.stack([right, right, -one_wrong]), labels)
    assert after == pytest.approx((0.0, 0.0, 2 / 3))
    assert similarity.corruption_error(before, after, images=3) == pytest.approx(0.5)


def test_where_the_source_model_makes_no_error_half_an_error_is_added() -> None:
    assert similarity.corruption_error((0.0, 0.0), (0.0, 0.0), images=20) == 1.0
    # One error in 20 images: (1 + 0.5) / 0.5.
    assert similarity.corruption_error((0.0, 0.0), (0.0, 0.05), images=20) == pytest.approx(3.0)


def test_the_table_has_a_row_for_each_measure_and_a_column_for_each_model() -> None:
    model = portrait()
    before, after = compare(model, model), compare(model, portrait(1.0))
    columns, rows = similarity.rows(before, [("head", after)])
    assert columns == ["measure", "source model", "head"]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["agreement"] == ["100.0%", f"{after.agreement:.1%}"]
    assert cells["mCE"] == ["1.000", f"{after.mean_corruption_error:.3f}"]
    assert "–" not in {cell for row in rows for cell in row}


def test_the_text_explains_every_figure_and_shows_every_degradation() -> None:
    model = portrait()
    before, after = compare(model, model), compare(model, portrait(1.0))
    text = similarity.markdown("solar", CLASSES, before, [("head", after)])
    for line in similarity.LINES:
        assert f"| {line.name} | " in text
        assert f"- **{line.name}**: " in text
    assert after.errors is not None
    for name, errors in after.errors.items():
        assert f"| {name} | 1.000 | " in text
        assert " ".join(f"{error:.0%}" for error in errors) in text
    assert similarity.DIAGNOSTICS in text
    assert f"| defective, field | {before.predicted_rates['target'][1]:.1%} |" in text
    assert "One clean image more or less is 1.67%." in text


def test_it_warns_where_cka_and_agreement_disagree() -> None:
    same = compare(portrait(), portrait())
    forgotten = msgspec.structs.replace(same, cka=0.86, agreement=0.84)
    moved = msgspec.structs.replace(same, cka=0.6, agreement=0.97)
    assert similarity.warnings([("head", same)]) == []
    (first,) = similarity.warnings([("head", forgotten)])
    assert first.startswith("head: CKA 0.860, agreement 84.0%. Its features look unchanged")
    (second,) = similarity.warnings([("head", moved)])
    assert "by other features" in second
    text = similarity.markdown("solar", CLASSES, same, [("head", forgotten)])
    assert f"## Warnings\n\n- {first}" in text
    assert "## Warnings" not in similarity.markdown("solar", CLASSES, same, [("head", same)])


def test_it_warns_of_a_model_that_names_one_class_only() -> None:
    model = compare(portrait(), portrait())
    collapsed = msgspec.structs.replace(model, predicted_rates={"target": (0.03, 0.97)})
    (sentence,) = similarity.warnings([("adversarial", collapsed)])
    assert sentence.startswith("adversarial: puts 97.0% of field images into one class.")


def test_probabilities_of_twins_are_those_of_the_logits() -> None:
    model = portrait()
    assert model.sweep is not None
    degraded = np.stack([metrics.softmax(x) for x in model.sweep.degraded.values()])
    positive = degraded[..., 1] - metrics.softmax(model.sweep.clean)[:, 1]
    assert compare(model, model).twin_change == pytest.approx(np.abs(positive).mean())
