"""A picture of a calibration table: what every tensor held, and what INT8 will represent of it.

It gets figures that others measured. Import it where a picture is drawn: matplotlib takes a second
to load, and the device does without.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from calibration.table import Table, TensorRange
from runtime.atomic import replacing_file

WIDTH = 9.0
"""Inches; with ``DPI`` 1350 pixels, made to be read at 900."""
DPI = 150
ROW = 0.155
"""Inches of height for a tensor: as low as its name can still be read."""
NAME = 34
"""Characters of a tensor's name; the middle of longer ones is left out."""

# Okabe and Ito 2008: told apart with any colour vision, and in grey by shape.
GREY, BLUE, ORANGE, PURPLE = "#8C8C8C", "#0072B2", "#E69F00", "#CC79A7"

LEAST_SHARE = 1e-6
"""Shares below it are drawn at the left edge: a value in a million is nothing."""


def write_ranges(path: Path, table: Table, held_out: Mapping[str, float]) -> None:
    """One row for each tensor of ``table``, in the order of the graph.

    ``held_out`` is the share of values outside the chosen range on images that the table has not
    seen, 0 to 1, by tensor; it may be empty.
    """
    names = list(table.tensors)
    tensors = list(table.tensors.values())
    with _style():
        height = 1.5 + ROW * len(names)
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        ranges, shares = figure.subplots(1, 2, width_ratios=(5, 3), sharey=True)
        _draw_ranges(ranges, tensors)
        _draw_shares(
            shares, "outside, calibration images", [t.clipped for t in tensors], "o", ORANGE
        )
        if held_out:
            unseen = [held_out.get(name, 0.0) for name in names]
            _draw_shares(shares, "outside, images held out", unseen, "D", PURPLE)
        ranges.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=6.5)
        ranges.set_ylim(len(names) - 0.4, -0.6)  # the graph's input on top
        for panel in (ranges, shares):
            panel.tick_params(axis="y", length=0)
            panel.tick_params(axis="x", top=True, labeltop=True, labelbottom=True)
            for row in range(0, len(names), 2):
                panel.axhspan(row - 0.5, row + 0.5, color="#F4F4F4", lw=0, zorder=0)
        figure.legend(
            title=_title(table), title_fontproperties={"weight": "bold", "size": 11},
            loc="outside upper center", ncols=4, frameon=False,
        )  # fmt: skip
        with replacing_file(path) as temporary:
            figure.savefig(temporary, format="png")


def _draw_ranges(panel: Axes, tensors: list[TensorRange]) -> None:
    rows = range(len(tensors))
    for label, colour, width, pairs in (
        ("observed", GREY, 1.2, [tensor.observed for tensor in tensors]),
        ("represented in INT8", BLUE, 4.5, [tensor.chosen for tensor in tensors]),
    ):
        lows, highs = zip(*pairs, strict=True)
        panel.hlines(rows, lows, highs, color=colour, lw=width, label=label, zorder=2)
        if colour == GREY:
            for ends in (lows, highs):
                panel.plot(ends, rows, "|", color=colour, ms=5, mew=1.2, zorder=2)
    reach = [max(abs(value) for value in tensor.observed) for tensor in tensors]
    linear = 10 ** math.floor(math.log10(min((r for r in reach if r > 0), default=1.0)))
    panel.set_xscale("symlog", linthresh=linear)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.axvline(0.0, color="black", lw=0.6, zorder=1)
    panel.set_xlabel(f"value (linear within ±{linear:g}, logarithmic outside)")


def _draw_shares(panel: Axes, label: str, shares: list[float], marker: str, colour: str) -> None:
    """Tensors without any value outside have no mark."""
    seen = [(max(share, LEAST_SHARE), row) for row, share in enumerate(shares) if share > 0]
    xs, rows = zip(*seen, strict=True) if seen else ((), ())
    panel.plot(xs, rows, marker, color=colour, ms=4, mec="black", mew=0.3, ls="", label=label)
    panel.set_xscale("log")
    panel.set_xlim(LEAST_SHARE / 1.5, 1.0)
    ticks = (LEAST_SHARE, 1e-4, 1e-2, 1.0)
    panel.set_xticks(ticks, ["0.0001 %", "0.01 %", "1 %", "100 %"])
    panel.minorticks_off()
    panel.set_xlabel("values outside what INT8 represents")


def _short(name: str) -> str:
    half = NAME // 2
    return name if len(name) <= NAME else f"{name[:half]}…{name[1 - half :]}"


def _title(table: Table) -> str:
    worst = max(table.tensors, key=lambda name: table.tensors[name].clipped)
    clipped = table.tensors[worst].clipped
    what = f"{_short(worst)} clips most, {clipped:.2%}" if clipped else "nothing is clipped"
    return f"{len(table.tensors)} tensors, method {table.key.method}: {what}"


def _style() -> AbstractContextManager[None]:
    """Our look for what is made within; settings of the process come back after it."""
    return mpl.rc_context(
        {
            "font.family": "DejaVu Sans",  # comes with matplotlib
            "font.size": 9.0,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.grid": True,
            "axes.grid.axis": "x",
            "axes.axisbelow": True,
            "grid.color": "#DADADA",
            "text.parse_math": False,  # a name may have a dollar sign
        }
    )
