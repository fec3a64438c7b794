"""How a climb is shown: a table that grows while it climbs, and files to look at afterwards.

It words what was found; it measures and decides nothing.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from runtime import atomic
from runtime.recipe import Metric
from train import console
from train.gate import FLIPS
from train.similarity import markdown

if TYPE_CHECKING:
    from train import plots
    from train.history import History
    from train.record import Rung, Training

WIDTHS = (30, 9, 9, 9)
"""Of the columns of the growing table, before the verdict."""


class Line(NamedTuple):
    """One rung as it is judged; figures are of validation images, None where unknown."""

    rung: int
    name: str
    field: float | None
    source: float | None
    flips: float | None
    verdict: str
    reason: str


class ClimbTable:
    """Prints the ladder line by line while it is climbed."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.begun = False

    def __call__(self, line: Line) -> None:
        """Print ``line``, below a heading if it is the first."""
        if not self.begun:
            self.begun = True
            console.say(f"\nthe ladder ({self.metric}, validation images)")
            console.say(_row("rung", "field", "source", "flips", "verdict"))
        figures = (_figure(value) for value in (line.field, line.source))
        flips = "-" if line.flips is None else f"{line.flips:.1%}"
        console.say(_row(f"{line.rung} {line.name}", *figures, flips, line.verdict))
        if line.reason:
            console.say(f"    {line.reason}")


def _row(name: str, *cells: str) -> str:
    words = [name.ljust(WIDTHS[0])]
    words += [cell.rjust(width) for cell, width in zip(cells[:3], WIDTHS[1:], strict=True)]
    return "".join(words) + "  " + cells[3]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def write_report(folder: Path, training: "Training", classes: tuple[str, ...]) -> list[Path]:
    """``similarity.md`` and pictures of the climb, the robustness and the curves; what was written.

    Pictures of what there is: without source images there is no robustness to show.
    """
    from train import plots  # matplotlib takes a second to load

    written = [folder / "similarity.md"]
    first, *others = [r for r in training.rungs if r.similarity is not None]
    assert first.similarity is not None
    after = [(r.name, r.similarity) for r in others if r.similarity is not None]
    text = markdown(training.name, classes, first.similarity, after)
    atomic.write_text(written[0], text.replace("\n", f"\n\n{_verdict(training)}\n", 1))
    if others:
        written.append(folder / "ladder.png")
        plots.write_ladder(written[-1], ladder_steps(training), metric=training.metric)
    kept = next(r for r in training.rungs if r.kept)
    if kept is not first and kept.similarity and kept.similarity.errors and first.similarity.errors:
        written.append(folder / "robustness.png")
        plots.write_robustness(
            written[-1], first.similarity.errors, kept.similarity.errors, kept.name
        )
    if curves := training_curves(training):
        written.append(folder / "curves.png")
        plots.write_curves(written[-1], curves, metric=training.metric)
    return written


def ladder_steps(training: "Training") -> "list[plots.Step]":
    """Every rung that was tried, as it is drawn."""
    return [_step(rung, training.metric) for rung in training.rungs]


def _step(rung: "Rung", metric: Metric) -> "plots.Step":
    from train import plots

    values = {
        domain: rung.scores[f"{domain}-validation"].metric(metric)
        for domain in ("source", "target")
        if f"{domain}-validation" in rung.scores
    }
    known = {domain: value for domain, value in values.items() if math.isfinite(value)}
    gain = rung.verdict.gain if rung.verdict else None
    interval = None
    if gain is not None and gain.metric == metric and "target" in known:
        before = known["target"] - gain.value
        interval = before + gain.low, before + gain.high
    checks = {check.name: check.value for check in rung.verdict.checks} if rung.verdict else {}
    return plots.Step(
        name=rung.name, kept=rung.verdict is None or rung.passed, field=known.get("target"),
        interval=interval, source=known.get("source"), negative_flips=checks.get(FLIPS),
        reason=rung.reason,
    )  # fmt: skip


def histories(training: "Training") -> "dict[str, History]":
    """Every training of the network by name; ways back to the source model share one."""
    found = {"source model": training.source.history}
    for rung in training.rungs:
        found.setdefault(rung.name.partition(",")[0], rung.details.history)
    return {name: history for name, history in found.items() if history and history.epochs}


def training_curves(training: "Training") -> "dict[str, list[plots.Point]]":
    """The epochs of histories(), as they are drawn."""
    from train import plots

    return {
        name: [plots.Point(e.epoch, e.loss, e.score, e.parts) for e in history.epochs]
        for name, history in histories(training).items()
    }


def _verdict(training: "Training") -> str:
    mark = "verified" if training.verified else "**UNVERIFIED**"
    return f"Kept: {training.rung}, {mark}: {training.reason}. The ladder ended: {training.ended}."
