"""The gate: what an artifact may lose against the checkpoint, and the sentence about what it lost.

A pure decision: numbers and budgets in, verdict and reasons out. It does not know how anything was
measured (export/parity).

Points decide what was lost on the images there are; the paired interval of the accuracy decides
what these images leave open. Few images leave much open whatever the artifact is: where even one
that changes no answer could not pass, the interval does not decide, and the verdict says so.
"""

from collections.abc import Sequence
from typing import NamedTuple

from export.release import FormReport
from runtime import metrics
from runtime.manifest import Quality
from runtime.recipe import GateSettings

INT8_FORMS = {"TensorRT": ("int8", "int8-fp16"), "onnxruntime on a CPU": ("int8-cpu",)}
"""By the engine that runs them."""

_ROUNDING = 1e-12


class Verdict(NamedTuple):
    """Whether an artifact may be released, and why (not)."""

    passed: bool
    reason: str


def judge(quality: Quality, reference: Quality, budget: GateSettings) -> Verdict:
    """Compare ``quality`` with the checkpoint's own ``reference`` on the same images.

    Without labels only agreement and SQNR can be judged, and the reason says so.
    """
    checks = [
        _least("agreement", quality.agreement, budget.min_agreement, quality.agreement_interval),
        _signal(quality.sqnr_db, budget.min_sqnr_db),
    ]
    notes = []
    accuracy = _drop(reference.accuracy, quality.accuracy)
    if accuracy is None:
        notes.append("no labels to judge accuracy by")
    else:
        checks.append(_most("accuracy", accuracy, budget.max_accuracy_drop, _pairs(quality)))
        few = _too_few(quality.labelled, budget.max_credible_accuracy_drop)
        if few:
            notes.append(few)
        else:
            checks.append(_credible(quality, budget.max_credible_accuracy_drop))
    recall = _drop(reference.worst_recall, quality.worst_recall)
    if recall is not None:
        span = _span(quality.worst_recall_drop_interval)
        checks.append(_most("worst-class recall", recall, budget.max_worst_recall_drop, span))
    broken = [check.reason for check in checks if not check.passed]
    if broken:
        return Verdict(False, "; ".join(broken))
    found = "; ".join(check.reason for check in checks)
    return Verdict(True, "; ".join([f"within budget: {found}", *notes]))


def without_int8(reports: Sequence[FormReport]) -> tuple[str, ...]:
    """A sentence for each engine for which INT8 was asked and none passed.

    ``reports`` are those of the forms that were asked for. Such an engine would run a slower form
    than its owner expects, and must not do so in silence.
    """
    sentences = []
    for engine, forms in INT8_FORMS.items():
        asked = [report for report in reports if report.form in forms]
        if asked and not any(report.released for report in asked):
            why = "; ".join(f"{report.form} was refused: {report.reason}" for report in asked)
            sentences.append(f"no INT8 for {engine}: {why}")
    return tuple(sentences)


def _least(name: str, value: float, limit: float, interval: tuple[float, float] | None) -> Verdict:
    words = f"{name} {value:.2%}"
    if value < limit:
        return Verdict(False, f"{words} < {limit:.2%}")
    return Verdict(True, words + _span(interval))


def _signal(value: float, limit: float) -> Verdict:
    words = f"SQNR {value:.1f} dB"
    return Verdict(True, words) if value >= limit else Verdict(False, f"{words} < {limit:g} dB")


def _most(name: str, drop: float, limit: float, detail: str) -> Verdict:
    change = f"{'up' if drop < 0 else 'down'} {abs(drop):.2%}" if drop else "unchanged"
    words = f"{name} {change}"
    if drop > limit + _ROUNDING:
        return Verdict(False, f"{words} > {limit:.2%}{detail}")
    return Verdict(True, words + detail)


def _span(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:.2%}, {interval[1]:.2%}]"


def _pairs(quality: Quality) -> str:
    """The discordant pairs behind a change of accuracy."""
    if quality.p_value is None:
        return ""
    return (
        f" ({quality.lost} answers lost and {quality.won} won on {quality.labelled} labelled "
        f"images, p {quality.p_value:.2f})"
    )


def _credible(quality: Quality, limit: float) -> Verdict:
    """What the images leave open: at least what as many could never exclude."""
    interval = quality.accuracy_drop_interval
    assert interval is not None, "measured whenever the accuracy is"
    worst = max(interval[1], metrics.largest_unseen(quality.labelled))
    if worst > limit + _ROUNDING:
        return Verdict(
            False,
            f"the {quality.labelled} labelled images leave open that accuracy is down {worst:.2%} "
            f"> {limit:.2%}{_pairs(quality)}: give more test images, or raise "
            "max_credible_accuracy_drop",
        )
    return Verdict(True, f"with 95 % confidence not down by more than {worst:.2%}")


def _too_few(labelled: int, limit: float) -> str:
    open_to = metrics.largest_unseen(labelled)
    if open_to <= limit:
        return ""
    return (
        f"{labelled} labelled images are too few to prove more: even if no answer had changed, a "
        f"loss of {open_to:.1%} could not be excluded, {limit:.1%} is asked"
    )


def _drop(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else before - after
