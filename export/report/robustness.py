"""How errors grow with what may befall an image, before and after: by degradation and severity.

Errors were measured by train/similarity, on degraded source images.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from export.report.facts import Facts
from export.report.figure import svg
from export.report.page import Section, render
from export.report.retention import measured
from train import plots
from train.similarity import Similarity


class Cell(NamedTuple):
    """Error at one severity."""

    after: str
    before: str
    shade: int
    """Of the error, in per cent: how much red."""


class Row(NamedTuple):
    """One degradation."""

    kind: str
    cells: tuple[Cell, ...]
    relative: str
    """Error over all severities in units of the source model's."""
    better: bool


def make(facts: Facts) -> Section | None:
    """The sweep of the kept model beside the source model's; None where there was none."""
    name, kept = next((r.name, r.similarity) for r in facts.training.rungs if r.kept)
    before = measured(facts.training)[0][1]
    if kept is None or kept.errors is None or before.errors is None:
        return None
    rows = [
        row(kind, before.errors[kind], errors, (kept.corruption_errors or {})[kind])
        for kind, errors in kept.errors.items()
    ]
    body = render(
        "robustness.html",
        drawing=_draw(before.errors, kept.errors, name) if kept is not before else "",
        adapted=kept is not before,
        images=kept.images["sweep"],
        severities=range(1, 1 + max(len(errors) for errors in kept.errors.values())),
        rows=rows,
        name=name,
    )
    return Section("robustness", "Robustness", _lead(kept, adapted=kept is not before), body)


def row(kind: str, before: Sequence[float], after: Sequence[float], relative: float) -> Row:
    """Errors ``[S]`` at severities 1 to S as they are shown; half a per cent rounds up."""
    cells = [
        Cell(f"{a:.0%}", f"{b:.0%}", round(100 * a)) for b, a in zip(before, after, strict=True)
    ]
    return Row(kind, tuple(cells), f"{relative:.2f}", relative <= 1)


def _draw(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], name: str
) -> Markup:
    alt = f"Error against severity, a panel for each degradation, source model and {name}; as below"
    return svg(plots.draw_robustness(before, after, name), alt)


def _lead(kept: Similarity, *, adapted: bool) -> str:
    errors = {kind: sum(e) / len(e) for kind, e in (kept.errors or {}).items()}
    worst = max(errors, key=lambda kind: errors[kind])
    hardest = f"{worst} is hardest, {errors[worst]:.0%} wrong on average"
    if not adapted or kept.mean_corruption_error is None:
        return f"What ships was tried on degraded images: {hardest}."
    share = f"{kept.mean_corruption_error:.2f}"
    return f"On degraded images it makes {share} times the source model's errors; {hardest}."
