"""The section ``selective``: below which score a device abstains, what that saves and costs.

It does not know how the threshold is chosen (export/selective).
"""

from export.plots import draw_selective_risk
from export.report.facts import Facts
from export.report.figure import svg
from export.report.page import Section, render
from export.selective import CONFIDENCE, Abstention, Tested


def make(facts: Facts) -> Section | None:
    """The section; None where no answer was ever scored: without labels nothing is wrong."""
    abstention = facts.release.abstention
    if abstention is None or not abstention.curve:
        return None
    body = render(
        "selective.html",
        abstention=abstention,
        confidence=f"{CONFIDENCE:.0%}",
        tested=[(tested, holds(tested, abstention.max_error)) for tested in abstention.tested],
        drawing=svg(draw_selective_risk(abstention), describe(abstention)),
    )
    return Section(
        "selective", "When it abstains", lead(abstention, facts.release.reference.accuracy), body
    )


def lead(abstention: Abstention, accuracy: float | None) -> str:
    """What a user of the device notices, in a sentence, by test images where they can tell.

    ``accuracy`` is the checkpoint's on test images, if all are answered.
    """
    if abstention.chosen is None:
        return "It never abstains: every image gets an answer."
    sentence = (
        f"Where its score is below {abstention.abstain_below:.3f} a device says that it does not "
        "know"
    )
    first = next(iter(abstention.tested), None)
    if first is None or first.error is None or accuracy is None:
        return f"{sentence}."
    return (
        f"{sentence}: {first.form} answers {first.coverage:.0%} of the test images, and "
        f"{first.error:.1%} of those answers are wrong; if it answered all, {1 - accuracy:.1%} "
        "would be."
    )


def holds(tested: Tested, allowed: float | None) -> str:
    """Whether what was promised on validation images is so on test images, and how surely."""
    if tested.error is None or tested.error_interval is None or allowed is None:
        return ""
    low, high = tested.error_interval
    if tested.error <= allowed:
        return "holds" if high <= allowed else f"holds; the images leave open up to {high:.1%}"
    return "does not hold" if low > allowed else "is above; the images leave open that it holds"


def describe(abstention: Abstention) -> str:
    """The drawing in words."""
    first, last = abstention.curve[0], abstention.curve[-1]
    words = (
        f"Share of wrong answers against the share of images that are answered: "
        f"{first.error:.1%} at {first.coverage:.0%} answered, {last.error:.1%} where all are"
    )
    if abstention.chosen is None:
        return words
    return f"{words}; chosen is {abstention.chosen.coverage:.0%}"
