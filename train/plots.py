"""Pictures of a training: robustness, the ladder, curves; PNG files, drawn without a display.

It gets figures that others measured and knows nothing of how. Import it where a picture is drawn:
matplotlib takes a second to load.
"""

import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from runtime.atomic import replacing_file
from train.adversarial import DISCRIMINATOR, TRUSTED

WIDTH = 9.0
"""Inches; with ``DPI`` 1350 pixels, made to be read at 900."""
DPI = 150
PANELS = 4
"""Degradations beside each other."""

# Okabe and Ito 2008: told apart with any colour vision, and in grey by their markers.
BLACK, ORANGE, GREEN, BLUE = "#000000", "#E69F00", "#009E73", "#0072B2"
RED, PURPLE, SKY = "#D55E00", "#CC79A7", "#56B4E9"
COLOURS = (PURPLE, BLUE, ORANGE, SKY, RED, BLACK)
GRID = "#E4E4E4"


LEAST_SPAN = 0.1
"""Of the metric's axis: a smaller one would make differences look large that are none."""


class Step(NamedTuple):
    """One rung as the ladder was climbed; the first is the source model."""

    name: str
    kept: bool
    """Whether it took the place of what was kept before it."""
    field: float | None
    """The recipe's metric on held-out field images; None without labels."""
    interval: tuple[float, float] | None
    """Of that metric."""
    source: float | None
    """The same metric on the source's images."""
    negative_flips: float | None
    """Share of source images that were right and are wrong now."""
    reason: str


class Point(NamedTuple):
    """One epoch of a training."""

    epoch: int
    loss: float
    score: float | None
    """On validation images, higher is better; None where nothing can tell."""
    parts: Mapping[str, float]
    """Parts of the loss and what else was watched, by name."""


def write_robustness(
    path: Path,
    before: Mapping[str, Sequence[float]],
    after: Mapping[str, Sequence[float]],
    name: str,
) -> None:
    """Write what draw_robustness draws as a PNG file."""
    save(draw_robustness(before, after, name), path)


def draw_robustness(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], name: str
) -> Figure:
    """One panel for each degradation: error in [0, 1] against severity 1 to S.

    ``before`` are the errors of the source model, ``after`` those of the kept model ``name``, both
    by degradation.
    """
    lines = -(-len(before) // PANELS)
    with style():
        figure = Figure(figsize=(WIDTH, 0.9 + 1.7 * lines), dpi=DPI, layout="constrained")
        grid = figure.subplots(lines, PANELS, sharex=True, sharey=True, squeeze=False)
        panels = list(grid.flat)
        for panel, kind in zip(panels, before, strict=False):
            severities = range(1, len(before[kind]) + 1)
            panel.plot(severities, before[kind], "o--", color=ORANGE, ms=4, label="source model")
            panel.plot(severities, after[kind], "s-", color=BLUE, ms=4, label=name)
            panel.set_title(kind)
            panel.set_xticks(severities)
            panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panels[0].set_ylim(bottom=0.0)
        for panel in panels[len(before) :]:
            panel.set_visible(False)
        for panel in panels[max(0, len(before) - PANELS) : len(before)]:
            panel.xaxis.set_tick_params(labelbottom=True)
            panel.set_xlabel("severity")
        for row in grid:
            row[0].set_ylabel("error")
        title = "Error on degraded source images: lower is better"
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, title=title, title_fontsize=11, loc="outside upper center", ncols=2,
            frameon=False,
        )  # fmt: skip
    return figure


def write_ladder(path: Path, steps: Sequence[Step], *, metric: str) -> None:
    """Write what draw_ladder draws as a PNG file."""
    save(draw_ladder(steps, metric=metric), path)


def draw_ladder(steps: Sequence[Step], *, metric: str) -> Figure:
    """How the ladder was climbed, from the source model at the bottom upwards.

    ``metric`` is the name of what ``Step.field`` and ``Step.source`` hold.
    """
    with style():
        figure = Figure(figsize=(WIDTH, 1.4 + 0.85 * len(steps)), dpi=DPI, layout="constrained")
        panel, words = figure.subplots(1, 2, width_ratios=(10, 9), sharey=True)
        climbed = [(s.field, y) for y, s in enumerate(steps) if s.kept and s.field is not None]
        if climbed:
            panel.plot(*zip(*climbed, strict=True), color=GREEN, lw=6, alpha=0.25)
        for height, step in enumerate(steps):
            _draw_step(panel, step, height)
            _write_step(words, step, height)
        top = max(height for height, step in enumerate(steps) if step.kept)
        for half in (panel, words):
            half.axhspan(top - 0.45, top + 0.45, color=GREEN, alpha=0.1, lw=0)
        panel.set_yticks(range(len(steps)), [step.name for step in steps], fontsize=10)
        panel.get_yticklabels()[top].set_fontweight("bold")
        low, high = panel.get_xlim()
        spare = max(0.0, LEAST_SPAN - (high - low)) / 2
        panel.set_xlim(low - spare, high + spare)
        panel.set_ylim(-0.5, len(steps) - 0.5)
        panel.set_xlabel(f"{metric} on validation images, with its interval")
        panel.grid(axis="y", visible=False)
        panel.spines["left"].set_visible(False)
        panel.tick_params(axis="y", length=0)
        words.set_axis_off()
        figure.suptitle(ladder_title(steps[0], steps[top], metric), fontsize=11, weight="bold")
        handles = [
            Line2D([], [], color=GREEN, marker="o", label="field, kept"),
            Line2D([], [], color=RED, marker="X", label="field, not kept"),
            Line2D([], [], color=BLACK, marker="D", mfc="none", ls="", label="source"),
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False)
    return figure


def _draw_step(panel: Axes, step: Step, height: int) -> None:
    colour, marker = (GREEN, "o") if step.kept else (RED, "X")
    if step.interval is not None:
        panel.plot(step.interval, (height, height), color=colour, lw=2)
    if step.field is None:
        anchor = panel.get_yaxis_transform()
        panel.text(0.03, height, "no field labels", transform=anchor, color=colour, va="center")
    else:
        panel.plot(step.field, height, marker, color=colour, ms=9)
        panel.annotate(
            f"{step.field:.3f}", (step.field, height), (0, 9), textcoords="offset points",
            ha="center", color=colour,
        )  # fmt: skip
    if step.source is not None:
        panel.plot(step.source, height, "D", color=BLACK, mfc="none", ms=7)


def _write_step(words: Axes, step: Step, height: int) -> None:
    verdict, colour = ("✓ kept", GREEN) if step.kept else ("✗ not kept", RED)
    if height == 0:
        verdict, colour = "start", BLACK
    elif step.negative_flips is not None:
        verdict += f" · negative flips {step.negative_flips:.1%}"
    reason = textwrap.wrap(step.reason, 52, max_lines=3, placeholder=" …")
    # Words keep out of the layout: a wide one would push its panel aside.
    place: dict[str, Any] = {"in_layout": False}
    words.text(0.02, height + 0.12, verdict, color=colour, weight="bold", va="bottom", **place)
    words.text(0.02, height + 0.06, "\n".join(reason), va="top", fontsize=8, **place)


def ladder_title(first: Step, kept: Step, metric: str) -> str:
    """What became of it, in a sentence: ``first`` is the source model."""
    if kept is first:
        return f"“{first.name}” stays: nothing passed the gate"
    pairs = (("field", first.field, kept.field), ("source", first.source, kept.source))
    changes = [
        f"{domain} {metric} {old:.3f} → {new:.3f}"
        for domain, old, new in pairs
        if old is not None and new is not None
    ]
    return f"“{kept.name}” is kept" + (": " + ", ".join(changes) if changes else "")


def write_curves(path: Path, histories: Mapping[str, Sequence[Point]], *, metric: str) -> None:
    """Write what draw_curves draws as a PNG file."""
    save(draw_curves(histories, metric=metric), path)


def draw_curves(histories: Mapping[str, Sequence[Point]], *, metric: str) -> Figure:
    """One row for each training by name: its loss, its validation ``metric``, its parts.

    Every history has at least one epoch; parts that only some epochs have begin later.
    """
    with style():
        figure = Figure(figsize=(WIDTH, 0.6 + 2.2 * len(histories)), dpi=DPI, layout="constrained")
        grid = figure.subplots(len(histories), 3, squeeze=False)
        for row, (name, points) in zip(grid, histories.items(), strict=True):
            epochs = [point.epoch for point in points]
            row[0].plot(epochs, [point.loss for point in points], ".-", color=BLUE)
            row[0].set_title("loss")
            row[0].set_ylabel(name, weight="bold")
            _draw_scores(row[1], points, metric)
            _draw_parts(row[2], points)
        for panel in grid.flat:
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        for panel in grid[-1]:
            panel.set_xlabel("epoch")
    return figure


def _draw_scores(panel: Axes, points: Sequence[Point], metric: str) -> None:
    """Hidden where nothing could tell a good epoch."""
    scored = [(point.epoch, point.score) for point in points if point.score is not None]
    panel.set_visible(bool(scored))
    if scored:
        panel.plot(*zip(*scored, strict=True), ".-", color=GREEN)
        epoch, best = max(scored, key=lambda one: one[1])
        panel.plot(epoch, best, "o", color=GREEN, ms=8, mfc="none")
        panel.set_title(f"{metric}, best {best:.3f}")


def _draw_parts(panel: Axes, points: Sequence[Point]) -> None:
    """One line for each part that any epoch has; hidden if there is none."""
    names = list(dict.fromkeys(name for point in points for name in point.parts))
    panel.set_visible(bool(names))
    panel.set_title("parts of the loss")
    if DISCRIMINATOR in names:
        panel.axhspan(*TRUSTED, color=PURPLE, alpha=0.15, lw=0, label="healthy accuracy")
    for name, colour, marker in zip(names, cycle(COLOURS), cycle("os^vD"), strict=False):
        known = [(point.epoch, point.parts[name]) for point in points if name in point.parts]
        panel.plot(*zip(*known, strict=True), f"{marker}-", ms=3, color=colour, label=name)
    if names:
        panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` as a PNG file, whole or not at all."""
    # In our style, too: ticks are only made now.
    with style(), replacing_file(path) as temporary:
        figure.savefig(temporary, format="png")


def style() -> AbstractContextManager[None]:
    """Our look for what is made within; settings of the process come back after it."""
    return mpl.rc_context(
        {
            "font.family": "DejaVu Sans",  # comes with matplotlib
            "font.size": 9.0,
            "axes.titlesize": 9.0,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": GRID,
            "text.parse_math": False,  # a name may have a dollar sign
        }
    )
