"""What an artifact may lose: figures from answers, a verdict from figures, and its sentence."""

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from export import table
from export.gate import judge, without_int8
from export.parity import measure
from export.release import FormReport, Release
from runtime.manifest import Adaptation, Quality
from runtime.recipe import GateSettings

BUDGET = GateSettings()
Logits = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def answers(classes: Ints, *, confidence: float = 4.0) -> Logits:
    """Logits of two classes that say ``classes``, a little different in each row."""
    logits = np.where(np.arange(2) == classes[:, None], confidence, 0.0)
    return (logits + np.random.default_rng(0).normal(0, 0.01, logits.shape)).astype(np.float32)


def compared(count: int, *, lost: int = 0, won: int = 0, wrong: int | None = None) -> Quality:
    """An artifact that loses and wins so many of ``count`` images, of class 0 and 1 in turn.

    The checkpoint gets ``wrong`` images wrong, by default a tenth.
    """
    labels = np.arange(count) % 2
    wrong = count // 10 if wrong is None else wrong
    before = labels.copy()
    before[:wrong] = 1 - before[:wrong]
    after = before.copy()
    after[:won] = labels[:won]
    after[wrong : wrong + lost] = 1 - labels[wrong : wrong + lost]
    return measure(answers(before), answers(after), labels, seed=0)


def verdict(
    count: int, *, lost: int = 0, won: int = 0, budget: GateSettings = BUDGET
) -> tuple[bool, str]:
    quality, reference = compared(count, lost=lost, won=won), compared(count)
    # The noise of these made-up logits is not the point.
    return judge(msgspec.structs.replace(quality, sqnr_db=30.0), reference, budget)


def test_figures_are_those_of_the_paired_answers() -> None:
    quality = compared(400, lost=6, won=2)
    assert (quality.lost, quality.won, quality.labelled) == (6, 2, 400)
    assert quality.p_value == pytest.approx(stats.binomtest(2, 8).pvalue)
    assert quality.agreement == 392 / 400
    expected = stats.binomtest(392, 400).proportion_ci(0.9, method="wilson")
    assert quality.agreement_interval == pytest.approx((expected.low, expected.high))
    assert quality.accuracy == pytest.approx(0.9 - 0.01)
    interval = quality.accuracy_drop_interval
    assert interval is not None
    # Six lost and two won: a standard error of sqrt(8) images around four.
    assert interval == pytest.approx(
        ((4 - 1.64 * 8**0.5) / 400, (4 + 1.64 * 8**0.5) / 400), abs=2e-3
    )
    worst = quality.worst_recall_drop_interval
    assert worst is not None
    assert worst[0] <= 0.9 - (quality.worst_recall or 0) <= worst[1]


def test_the_order_of_the_images_changes_no_figure() -> None:
    random = np.random.default_rng(1)
    reference, logits = random.normal(size=(2, 120, 3)).astype(np.float32)
    labels = random.integers(-1, 3, 120)
    order = random.permutation(120)
    one = measure(reference, logits, labels, seed=5)
    other = measure(reference[order], logits[order], labels[order], seed=5)
    assert one.sqnr_db == pytest.approx(other.sqnr_db)  # sums of floats know an order
    assert msgspec.structs.replace(other, sqnr_db=one.sqnr_db) == one
    assert one.accuracy_drop_interval == other.accuracy_drop_interval
    assert one.accuracy_drop_interval != measure(
        reference, logits, labels, seed=6
    ).accuracy_drop_interval  # fmt: skip


def test_a_row_that_is_not_finite_is_no_answer() -> None:
    labels = np.arange(50) % 2
    logits = answers(labels)
    logits[::10, 1] = np.nan
    logits[1, 0] = np.inf
    quality = measure(answers(labels), logits, labels, seed=0)
    assert quality.agreement == quality.accuracy == 44 / 50
    assert quality.sqnr_db == -200
    assert quality.auc is None
    assert quality.lost == 6
    assert msgspec.json.decode(msgspec.json.encode(quality), type=Quality) == quality


def test_a_form_within_budget_passes_with_the_numbers_that_decided() -> None:
    passed, reason = verdict(800, lost=6, won=4)
    assert passed
    assert reason.startswith(
        "within budget: agreement 98.75% [97.92%, 99.25%]; SQNR 30.0 dB; accuracy down 0.25% "
        "(6 answers lost and 4 won on 800 labelled images, p 0.75); with 95 % confidence not down "
        "by more than 0.88%; worst-class recall down 0.25% [-0.50%, 1.25%]"
    )


@pytest.mark.parametrize(
    ("lost", "won", "words"),
    [
        (5, 0, "accuracy down 1.25% > 1.00% (5 answers lost and 0 won on 400"),
        (14, 0, "agreement 96.50% < 98.00%; accuracy down 3.50% > 1.00%"),
    ],
)
def test_a_point_over_its_budget_is_refused(lost: int, won: int, words: str) -> None:
    passed, reason = verdict(400, lost=lost, won=won)
    assert not passed
    assert words in reason


def test_what_the_images_leave_open_can_refuse_where_points_do_not() -> None:
    budget = GateSettings(min_agreement=0.9, max_worst_recall_drop=0.1)
    passed, reason = verdict(400, lost=14, won=10, budget=budget)
    assert not passed, "one point lost is within budget, three cannot be excluded"
    assert reason.startswith(
        "the 400 labelled images leave open that accuracy is down 3.00% > 2.00%"
    )
    assert "(14 answers lost and 10 won on 400 labelled images, p 0.54)" in reason
    assert "raise max_credible_accuracy_drop" in reason
    # The same shares on more images leave less open.
    assert verdict(4000, lost=140, won=100, budget=budget)[0]
    patient = msgspec.structs.replace(budget, max_credible_accuracy_drop=0.04)
    assert verdict(400, lost=14, won=10, budget=patient)[0]


@pytest.mark.parametrize("count", [60, 148])
def test_few_images_refuse_nobody_and_say_that_they_are_few(count: int) -> None:
    passed, reason = verdict(count)
    assert passed
    bound = stats.binomtest(0, count).proportion_ci(0.9, method="exact").high
    assert f"{count} labelled images are too few to prove more" in reason
    assert f"a loss of {bound:.1%} could not be excluded, 2.0% is asked" in reason
    assert "confidence" not in reason


def test_enough_images_are_those_that_a_form_without_a_changed_answer_passes() -> None:
    passed, reason = verdict(149)
    assert passed
    assert "too few" not in reason
    assert "accuracy unchanged (0 answers lost and 0 won on 149 labelled images" in reason
    assert "not down by more than 1.99%" in reason, "no answer changed, yet 0 % is not proven"


@pytest.mark.parametrize("count", [40, 387, 656], ids=["quick", "solar", "solar-all"])
def test_no_shipped_recipe_has_too_few_images_for_an_honest_form(count: int) -> None:
    """As many answers won as lost, and as many changed as the budget for agreement lets pass."""
    pairs = int(0.02 * count / 2)
    passed, reason = verdict(count, lost=pairs, won=pairs)
    assert passed, reason


def test_few_images_do_not_excuse_what_was_lost_on_them() -> None:
    passed, reason = verdict(60, lost=1)
    assert not passed
    assert "accuracy down 1.67% > 1.00%" in reason


def test_without_labels_answers_and_signal_decide_and_that_is_said() -> None:
    logits = answers(np.arange(100) % 2)
    quality = measure(logits, logits + 1e-4 * logits[:, ::-1], np.full(100, -1), seed=0)
    assert (quality.accuracy, quality.accuracy_drop_interval, quality.p_value) == (None,) * 3
    assert (quality.worst_recall_drop_interval, quality.lost, quality.won) == (None,) * 3
    passed, reason = judge(quality, quality, BUDGET)
    assert passed
    assert "agreement 100.00% [97.37%, 100.00%]" in reason
    assert reason.endswith("no labels to judge accuracy by")


def test_budgets_hold_at_their_very_value() -> None:
    exact = msgspec.structs.replace(compared(1000, lost=10), sqnr_db=15.0)
    assert judge(exact, compared(1000), BUDGET).passed
    assert not judge(
        msgspec.structs.replace(exact, sqnr_db=14.99), compared(1000), BUDGET
    ).passed  # fmt: skip


def report(form: str, *, released: bool, speed: float | None = None) -> FormReport:
    reason = "within budget" if released else f"{form} lost too much"
    return FormReport(
        form=form, released=released, reason=reason, bytes=1, attempts=(), relative_speed=speed
    )


@pytest.mark.parametrize(
    ("released", "refused", "expected"),
    [
        ("fp32 fp16 int8 int8-cpu", "", []),
        ("fp32 int8 int8-cpu", "fp16 int8-fp16", []),
        ("fp32 int8-fp16", "int8", []),
        ("fp32 fp16", "", []),
        (
            "fp32 fp16 int8-cpu",
            "int8",
            ["no INT8 for TensorRT: int8 was refused: int8 lost too much"],
        ),
        (
            "fp32 fp16",
            "int8 int8-fp16 int8-cpu",
            [
                "no INT8 for TensorRT: int8 was refused: int8 lost too much; int8-fp16 was "
                "refused: int8-fp16 lost too much",
                "no INT8 for onnxruntime on a CPU: int8-cpu was refused: int8-cpu lost too much",
            ],
        ),
    ],
)  # fmt: skip
def test_an_engine_left_without_int8_is_named(
    released: str, refused: str, expected: Sequence[str]
) -> None:
    reports = [report(form, released=True) for form in released.split()]
    reports += [report(form, released=False) for form in refused.split()]
    assert list(without_int8(reports)) == list(expected)


def test_the_table_says_what_ships_and_is_slower(capsys: pytest.CaptureFixture[str]) -> None:
    release = Release(
        name="tiny", version="1", field="target", parity_db=120.0, seed=0, seconds=1.0, git=None,
        adaptation=Adaptation(rung="as is", verified=True, reason="so", labels_used=0),
        reference=compared(100), checkpoint_sha256="", recipe_sha256="", dataset_sha256="",
        judged_sha256="", gate=BUDGET, machine="x86_64", versions={},
        forms=(
            report("fp32", released=True, speed=1.0), report("fp16", released=False),
            report("int8-cpu", released=True, speed=0.82),
        ),
    )  # fmt: skip
    assert [row[-1] for row in table.rows(release)] == [
        "reference",
        "ships",
        "refused",
        "ships, slower",
    ]
    table.show(release)
    shown = capsys.readouterr().err
    assert "fp32 ships: within budget" in shown
    assert "fp16 is not in the bundle: fp16 lost too much" in shown
    assert "int8-cpu is slower than fp32 on this CPU (0.82x): x86_64 devices will not" in shown
