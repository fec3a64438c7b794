"""The gate: what an artifact may lose against the checkpoint, and the sentence if it lost more.

A pure decision: numbers and budgets in, verdict and reasons out.
"""

from typing import NamedTuple

from runtime.manifest import Quality
from runtime.recipe import GateSettings


class Verdict(NamedTuple):
    """Whether an artifact may be released, and why (not)."""

    passed: bool
    reason: str


def judge(quality: Quality, reference: Quality, budget: GateSettings) -> Verdict:
    """Compare ``quality`` with the checkpoint's own ``reference`` on the same images.

    Without labels only agreement and SQNR can be judged, and the reason says so.
    """
    broken = []
    if quality.agreement < budget.min_agreement:
        broken.append(f"agreement {quality.agreement:.2%} < {budget.min_agreement:.2%}")
    if quality.sqnr_db < budget.min_sqnr_db:
        broken.append(f"SQNR {quality.sqnr_db:.1f} dB < {budget.min_sqnr_db:g} dB")
    accuracy = _drop(reference.accuracy, quality.accuracy)
    if accuracy is not None and accuracy > budget.max_accuracy_drop + 1e-12:
        broken.append(f"accuracy down {accuracy:.2%} > {budget.max_accuracy_drop:.2%}")
    recall = _drop(reference.worst_recall, quality.worst_recall)
    if recall is not None and recall > budget.max_worst_recall_drop + 1e-12:
        broken.append(f"worst-class recall down {recall:.2%} > {budget.max_worst_recall_drop:.2%}")
    if broken:
        return Verdict(False, "; ".join(broken))
    if accuracy is None:
        return Verdict(True, "agreement and SQNR within budget; no labels to judge accuracy by")
    return Verdict(True, "within budget")


def _drop(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else before - after
