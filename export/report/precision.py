"""The section ``precision``: what each form is, which layers stayed float and why, what it costs.

It does not know how the precision ladder is climbed (export/precision_ladder).
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from markupsafe import Markup

from calibration.plots import draw_sensitivity
from calibration.sensitivity import LayerSensitivity
from export.engines import EngineProof
from export.release import Attempt, FormReport, Release
from export.report.facts import Facts
from export.report.figure import svg
from export.report.page import Section, render

DRAWN = 30
"""Layers in the drawing, the worst ones; the table has all."""

AS_CONVERTED = "as converted"
"""What the only attempt of a form without a ladder is called."""


class Row(NamedTuple):
    """A form in the table of sizes and speeds."""

    form: str
    released: bool
    bytes: int
    share: float
    """Of the size of fp32."""
    speed: float | None
    """Against fp32."""
    cpu_ms: float | None
    """Median of one call."""
    engine: str
    """How many of its convolutions have its precision; milliseconds where a GPU ran it."""


class Step(NamedTuple):
    """One rung that a form tried."""

    name: str
    attempt: Attempt
    made: tuple[str, ...]
    """What was tried for accuracy, one after the other."""


class Climb(NamedTuple):
    """How one form got its precision."""

    report: FormReport
    steps: tuple[Step, ...]
    account: str
    layers: tuple[LayerSensitivity, ...]
    drawing: Markup


def make(facts: Facts) -> Section:
    """The section; every release has forms."""
    release = facts.release
    climbs = [
        _climb(report, facts.sensitivities.get(report.form, ()))
        for report in release.forms
        if report.attempts
    ]
    body = render(
        "precision.html",
        rows=rows(release),
        release=release,
        climbs=climbs,
        drawn=DRAWN,
        unbuilt={r.form: r.engine.reason for r in release.forms if r.engine and not r.engine.built},
        gpu_reason=gpu_reason(release.forms),
        engines=[r.engine for r in release.forms if r.engine is not None and r.engine.built],
        precisions=precisions,
    )
    return Section("precision", "Precision, size and speed", lead(release), body)


def rows(release: Release) -> tuple[Row, ...]:
    """Every form that was made, in the order of the release."""
    whole = next(report.bytes for report in release.forms if report.form == "fp32")
    return tuple(
        Row(
            form=report.form,
            released=report.released,
            bytes=report.bytes,
            share=report.bytes / whole,
            speed=report.relative_speed,
            cpu_ms=report.cpu_ms.get("p50"),
            engine=report.engine.summary if report.engine else "",
        )
        for report in release.forms
        if report.bytes
    )


def lead(release: Release) -> str:
    """The smallest and the fastest form of a CPU, in a sentence."""
    shipped = [row for row in rows(release) if row.released]
    smallest = min(shipped, key=lambda row: row.bytes)
    fastest = max(shipped, key=lambda row: row.speed or 0.0)
    *others, last = [row.form for row in shipped]
    sentence = f"{', '.join(others)} and {last} ship" if others else f"{last} ships"
    if smallest.share < 1:
        sentence += f"; {smallest.form} is {1 / smallest.share:.1f} times smaller than fp32"
    if fastest.speed is not None and fastest.speed > 1:
        sentence += f"; {fastest.form} is {fastest.speed:.1f} times as fast on one CPU thread"
    return f"{sentence}."


def account(layers: Sequence[LayerSensitivity], kept_float: Collection[str]) -> str:
    """What leaving ``kept_float`` in float saves and costs; empty if nothing was measured."""
    kept = [layer for layer in layers if layer.name in kept_float]
    if not layers:
        return ""
    if not kept:
        return f"All {len(layers)} layers are INT8."
    error = sum(layer.error_share for layer in kept)
    price = sum(layer.compute_share for layer in kept)
    return (
        f"{len(kept)} of {len(layers)} layers stayed float: in INT8 they would make {error:.0%} of "
        f"the error of all layers alone, and they have {price:.0%} of the multiplications."
    )


def precisions(engine: EngineProof) -> tuple[str, ...]:
    """The precisions that any of its convolutions has, the most frequent first."""
    counted: dict[str, int] = {}
    for build in engine.builds:
        for name, count in build.precisions.items():
            counted[name] = counted.get(name, 0) + count
    return tuple(sorted(counted, key=lambda name: -counted[name]))


def gpu_reason(forms: Sequence[FormReport]) -> str:
    """Why nothing was run on a GPU; empty if something was, or nothing was built."""
    engines = [report.engine for report in forms if report.engine is not None]
    if any(engine.gpu for engine in engines):
        return ""
    return next((engine.gpu_reason for engine in engines if engine.gpu_reason), "")


def describe(layers: Sequence[LayerSensitivity], drawn: int) -> str:
    """The drawing in words."""
    worst = layers[0]
    return (
        f"The {min(drawn, len(layers))} layers that disturb the answers most, each alone in INT8, "
        f"worst first: {worst.name} leaves {worst.sqnr_db:.1f} dB with {worst.compute_share:.1%} "
        f"of the multiplications; marked are those that were kept float"
    )


def _climb(report: FormReport, layers: tuple[LayerSensitivity, ...]) -> Climb:
    kept = report.attempts[-1].kept_float
    shown = layers[:DRAWN]
    return Climb(
        report=report,
        steps=tuple(
            Step(
                attempt.rung or AS_CONVERTED, attempt, tuple(filter(None, attempt.made.split("; ")))
            )
            for attempt in report.attempts
        ),
        account=account(layers, kept),
        layers=layers,
        drawing=svg(draw_sensitivity(shown, kept), f"{report.form}: {describe(layers, DRAWN)}")
        if layers
        else Markup(),
    )
