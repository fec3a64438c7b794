"""Pictures of an export: how many wrong answers a threshold lets through, and what it costs.

It gets figures that others measured. Import it where a picture is drawn: matplotlib takes a second
to load.
"""

import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from export.selective import CONFIDENCE, Abstention
from train.plots import BLUE, DPI, GREEN, ORANGE, RED, SKY, WIDTH, save, style


def write_selective_risk(path: Path, abstention: Abstention) -> None:
    """Write what draw_selective_risk draws as a PNG file."""
    figure = draw_selective_risk(abstention)
    with style():
        figure.suptitle("\n".join(textwrap.wrap(abstention.reason, 110)), fontsize=10)
    save(figure, path)


def draw_selective_risk(abstention: Abstention) -> Figure:
    """Error among the answers given against the share of images that are answered.

    The curve of ``abstention`` has at least one point.
    """
    coverage = [point.coverage for point in abstention.curve]
    with style():
        figure = Figure(figsize=(WIDTH, 4.6), dpi=DPI, layout="constrained")
        panel = figure.subplots()
        panel.plot(
            coverage, [point.error for point in abstention.curve], ".-", color=BLUE,
            label=f"wrong on {abstention.labelled} labelled validation images",
        )  # fmt: skip
        panel.plot(
            coverage,
            [point.bound for point in abstention.curve],
            "--",
            color=SKY,
            label=f"at most, with {CONFIDENCE:.0%} confidence over all candidates",
        )
        if abstention.max_error is not None:
            panel.axhline(abstention.max_error, color=ORANGE, lw=1.5, label="allowed")
        if abstention.chosen is not None:
            panel.plot(
                abstention.chosen.coverage, abstention.chosen.bound, "o", color=GREEN, ms=11,
                mfc="none", mew=2.5, zorder=5,
                label=f"chosen: abstains below {abstention.abstain_below:.3f}",
            )  # fmt: skip
        for number, tested in enumerate(abstention.tested):
            if tested.error is not None and tested.error_interval is not None:
                low, high = tested.error_interval
                panel.errorbar(
                    tested.coverage, tested.error,
                    yerr=[[tested.error - low], [high - tested.error]], fmt="X", ms=6, capsize=3,
                    lw=1, color=RED, label="" if number else "there, on test images, each form",
                )  # fmt: skip
        panel.set_xlim(0, 1.01)
        panel.set_ylim(0, max(0.05, *(min(1.0, point.bound) for point in abstention.curve[3:]), 0))
        panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panel.set_xlabel("answered")
        panel.set_ylabel("wrong among the answers given")
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure
