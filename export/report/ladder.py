"""What was adapted, and how the ladder was climbed: every rung with its reason, and the curves.

It words what training recorded.
"""

import math
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from export.report.facts import Facts
from export.report.figure import svg
from export.report.page import Section, render
from runtime.recipe import Metric
from train import plots
from train.gate import FLIPS, Gain
from train.record import Rung, Training
from train.report import histories, ladder_steps, training_curves


class Row(NamedTuple):
    """One rung that was tried; figures are words, a dash where unknown."""

    name: str
    verdict: str
    passed: bool
    field: str
    source: str
    gain: str
    flips: str
    seconds: str
    reason: str
    notes: tuple[str, ...]


def make(facts: Facts) -> Section:
    """How the checkpoint of ``facts`` came to be."""
    training, recipe = facts.training, facts.recipe
    steps = ladder_steps(training)
    kept = next(i for i, rung in enumerate(training.rungs) if rung.kept)
    lead = plots.ladder_title(steps[0], steps[kept], training.metric)
    if kept == 0:
        lead = f"“{steps[0].name}” stays: {steps[0].reason}"
    body = render(
        "ladder.html",
        training=training,
        recipe=recipe,
        domains=[Path(name).name for name in (recipe.data.source, recipe.data.target) if name],
        adapted=facts.release.field == "target",
        rows=[_row(rung, training.metric) for rung in training.rungs],
        ladder=_draw_ladder(training),
        curves=_draw_curves(training),
        histories=histories(training),
    )
    return Section("ladder", "Adaptation", f"{lead}.", body)


def _draw_ladder(training: Training) -> Markup:
    """Nothing of a ladder with one rung."""
    steps = ladder_steps(training)
    if len(steps) == 1:
        return Markup()
    alt = "How the field and the source fared on each rung, as in the table below."
    return svg(plots.draw_ladder(steps, metric=training.metric), alt)


def _draw_curves(training: Training) -> Markup:
    curves = training_curves(training)
    if not curves:
        return Markup()
    alt = f"Loss and validation {training.metric} by epoch of {', '.join(curves)}."
    return svg(plots.draw_curves(curves, metric=training.metric), alt)


def _row(rung: Rung, metric: Metric) -> Row:
    checks = rung.verdict.checks if rung.verdict else ()
    flips = {check.name: check.value for check in checks}.get(FLIPS)
    gain = rung.verdict.gain if rung.verdict else None
    word = "start" if rung.verdict is None else "passed" if rung.passed else "not kept"
    return Row(
        name=rung.name,
        verdict="kept" if rung.kept else word,
        passed=rung.passed or rung.kept,
        field=_score(rung, "target", metric),
        source=_score(rung, "source", metric),
        gain="–" if gain is None else _gain(gain, metric),
        flips="–" if flips is None else f"{flips:.1%}",
        seconds=f"{rung.seconds:.0f} s",
        reason=rung.reason,
        notes=tuple(note for note in rung.details.notes if note not in rung.reason),
    )


def _gain(gain: Gain, metric: Metric) -> str:
    other = "" if gain.metric == metric else f" {gain.metric}"
    return f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]{other}"


def _score(rung: Rung, domain: str, metric: Metric) -> str:
    scores = rung.scores.get(f"{domain}-validation")
    value = -math.inf if scores is None else scores.metric(metric)
    return f"{value:.3f}" if math.isfinite(value) else "–"
