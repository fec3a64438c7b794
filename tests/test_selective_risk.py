"""A device abstains below a score that was proven on validation images, or says that none was."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from export.selective import (
    CONFIDENCE,
    Scored,
    choose,
    labels_needed,
    measure_threshold,
    scored,
    upper_bound,
)
from runtime import metrics
from runtime.recipe import parse_recipe
from tests.conftest import ROOT


@dataclasses.dataclass(frozen=True)
class Model:
    """Answers with uniform scores, wrong with a probability that falls with the score."""

    worst: float
    """Chance to be wrong at a score of 0.5; it is 0 at 1."""

    def answers(self, random: np.random.Generator, count: int) -> Scored:
        scores = np.sort(random.uniform(0.5, 1, count))[::-1]
        return Scored(scores, random.random(count) < 2 * self.worst * (1 - scores))

    def error_from(self, threshold: float) -> float:
        """The true share of wrong answers among those from ``threshold`` on."""
        return self.worst * (1 - max(threshold, 0.5))


def test_the_bound_is_clopper_and_pearsons() -> None:
    for errors, count in ((0, 10), (1, 10), (7, 150), (40, 233), (9, 10)):
        expected = stats.beta(errors + 1, count - errors).ppf(0.95)
        assert upper_bound(errors, count, 0.05) == pytest.approx(expected, abs=1e-7)
    assert upper_bound(10, 10, 0.05) == 1.0


def test_the_chosen_threshold_holds_what_was_asked_for_with_the_confidence_stated() -> None:
    model, allowed = Model(worst=0.4), 0.1
    random = np.random.default_rng(0)
    broken = 0
    for _ in range(200):
        chosen = choose(model.answers(random, 4000), allowed)
        assert chosen.abstain_below > 0
        broken += model.error_from(chosen.abstain_below) > allowed
    assert broken <= stats.binom(200, 1 - CONFIDENCE).ppf(0.99)


def test_more_labels_let_more_be_answered() -> None:
    model = Model(worst=0.4)
    random = np.random.default_rng(0)
    coverage = []
    for count in (1000, 4000, 20000):
        chosen = choose(model.answers(random, count), 0.1).chosen
        assert chosen is not None
        coverage.append(chosen.coverage)
    assert coverage == sorted(coverage)
    assert coverage[-1] == pytest.approx(0.4), "half of them if all were known"


def test_a_score_at_the_threshold_is_answered_and_one_below_is_not() -> None:
    answers = Scored(np.repeat([0.9, 0.6], [300, 100]), np.repeat([False, True], [300, 100]))
    chosen = choose(answers, 0.05)
    assert chosen.abstain_below == 0.9
    assert chosen.chosen is not None
    assert chosen.chosen.coverage == 0.75
    assert chosen.chosen.error == 0
    assert "abstains below a score of 0.900: answers 75.0% of 400" in chosen.reason


def test_too_few_labels_are_said_with_how_many_it_takes() -> None:
    answers = Scored(np.linspace(1, 0.9, 100), np.zeros(100, bool))
    chosen = choose(answers, 0.01)
    assert chosen.abstain_below == 0
    assert chosen.chosen is None
    assert "100 labelled validation images are too few to prove that at most 1.0%" in chosen.reason
    assert f"it takes {labels_needed(0.01)}" in chosen.reason
    enough = labels_needed(0.01)
    assert choose(Scored(np.linspace(1, 0.9, enough), np.zeros(enough, bool)), 0.01).chosen
    fewer = Scored(np.linspace(1, 0.9, enough - 1), np.zeros(enough - 1, bool))
    assert choose(fewer, 0.01).chosen is None


def test_no_label_at_all_is_too_few() -> None:
    nothing = scored(np.zeros((5, 2)), np.full(5, -1), 1.0)
    chosen = choose(nothing, 0.1)
    assert chosen.curve == ()
    assert "0 labelled validation images are too few" in chosen.reason


def test_where_no_threshold_holds_it_never_abstains_and_says_what_is_left_open() -> None:
    wrong = np.random.default_rng(0).random(500) < 0.3
    chosen = choose(Scored(np.linspace(1, 0.5, 500), wrong), 0.05)
    assert chosen.abstain_below == 0
    least = min(point.bound for point in chosen.curve)
    assert "NEVER ABSTAINS: no threshold is proven" in chosen.reason
    assert f"the best leaves open {least:.1%}" in chosen.reason


def test_a_recipe_that_asks_for_nothing_gets_the_curve_alone() -> None:
    chosen = choose(Model(worst=0.4).answers(np.random.default_rng(0), 300), None)
    assert chosen.abstain_below == 0
    assert "max_error_accepted is not set" in chosen.reason
    coverage = [point.coverage for point in chosen.curve]
    assert coverage == sorted(coverage)
    assert coverage[-1] == 1


def test_the_temperature_is_part_of_the_score_and_unknown_labels_are_left_out() -> None:
    logits = np.array([[2.0, 0.0], [0.0, 3.0], [9.0, 0.0]])
    answers = scored(logits, np.array([0, 0, -1]), 2.0)
    expected = metrics.softmax(logits[:2], temperature=2.0).max(axis=1)
    np.testing.assert_allclose(answers.scores, np.sort(expected)[::-1])
    assert answers.wrong.tolist() == [True, False]


def test_what_had_no_say_is_measured_with_its_interval() -> None:
    answers = Scored(np.repeat([0.9, 0.6], [50, 50]), np.arange(100) % 10 == 0)
    tested = measure_threshold("int8", answers, 0.9)
    assert tested.coverage == 0.5
    assert tested.error == 0.1
    assert tested.error_interval == metrics.wilson_interval(5, 50)
    assert "int8: answers 50.0% of the test images, 10.0% [" in str(tested)
    assert str(measure_threshold("int8", answers, 0.99)) == "int8: answers no test image"


@pytest.mark.parametrize("allowed", [None, 0.001, 0.1])
def test_the_curve_is_drawn_whatever_came_of_it(allowed: float | None, tmp_path: Path) -> None:
    from export.plots import write_selective_risk

    answers = Model(worst=0.4).answers(np.random.default_rng(0), 300)
    chosen = choose(answers, allowed)
    write_selective_risk(tmp_path / "risk.png", chosen)
    with Image.open(tmp_path / "risk.png") as picture:
        assert picture.size[0] == 1350


def test_the_page_s_recipe_is_valid_and_its_numbers_of_labels_are_right() -> None:
    page = (ROOT / "docs" / "health.md").read_text()
    (text,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    recipe = parse_recipe('name = "line3"\n[data]\nsource = "clean"\n' + text, "health.md")
    assert recipe.export.max_error_accepted == 0.02
    assert f"2 % takes {labels_needed(0.02)} labelled" in page
    assert f"1 % takes {labels_needed(0.01)}" in page
