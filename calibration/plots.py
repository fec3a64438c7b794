"""Pictures of calibration: what every tensor held and INT8 represents of it, what each layer costs.

It gets figures that others measured. Import it where a picture is drawn: matplotlib takes a second
to load, and the device does without.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from calibration.sensitivity import LayerSensitivity
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
GRID, STRIPE = "#DADADA", "#F4F4F4"

LEAST_SHARE = 1e-6
"""Shares below it are drawn at the left edge: a value in a million is nothing."""


def write_ranges(path: Path, table: Table, held_out: Mapping[str, float]) -> None:
    """Write what draw_ranges draws of all tensors as a PNG file."""
    # In our style, too: ticks are only made now.
    with _style(), replacing_file(path) as temporary:
        draw_ranges(table, held_out).savefig(temporary, format="png")


def draw_ranges(table: Table, held_out: Mapping[str, float], *, most: int | None = None) -> Figure:
    """One row for each tensor of ``table``, or for the ``most`` that clip most, in graph order.

    ``held_out`` is the share of values outside the chosen range on images that the table has not
    seen, 0 to 1, by tensor; it may be empty.
    """
    names = list(table.tensors)
    if most is not None:
        names = clipping_most(table, held_out, most)
    tensors = [table.tensors[name] for name in names]
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
            _draw_stripes(panel, len(names))
        figure.legend(
            title=_title(table), title_fontproperties={"weight": "bold", "size": 11},
            loc="outside upper center", ncols=4, frameon=False,
        )  # fmt: skip
    return figure


def clipping_most(table: Table, held_out: Mapping[str, float], most: int) -> list[str]:
    """The ``most`` tensors with the largest share of values outside their range, on any images, in
    the order of the graph."""
    shares = {
        name: max(tensor.clipped, held_out.get(name, 0.0)) for name, tensor in table.tensors.items()
    }
    worst = set(sorted(shares, key=lambda name: -shares[name])[:most])
    return [name for name in table.tensors if name in worst]


def draw_sensitivity(layers: Sequence[LayerSensitivity], kept_float: Collection[str]) -> Figure:
    """One row for each of ``layers``, each alone in INT8: what is left of the signal, its price.

    Those of ``kept_float`` are marked.
    """
    rows = range(len(layers))
    kept = [layer.name in kept_float for layer in layers]
    colours = [ORANGE if one else BLUE for one in kept]
    with _style():
        figure = Figure(figsize=(WIDTH, 1.6 + 0.19 * len(layers)), dpi=DPI, layout="constrained")
        signal, price = figure.subplots(1, 2, width_ratios=(5, 3), sharey=True)
        for panel, values in (
            (signal, [layer.sqnr_db for layer in layers]),
            (price, [100 * layer.compute_share for layer in layers]),
        ):
            bars = panel.barh(rows, values, color=colours, height=0.7, zorder=2)
            for bar, one in zip(bars, kept, strict=True):
                if one:  # told apart in grey, too
                    bar.set_hatch("////")
                    bar.set_edgecolor("white")
            panel.tick_params(axis="y", length=0)
            panel.tick_params(axis="x", top=True, labeltop=True, labelbottom=True)
            _draw_stripes(panel, len(layers))
        signal.set_yticks(rows, [_short(layer.name) for layer in layers], fontsize=7.5)
        signal.set_ylim(len(layers) - 0.4, -0.6)
        signal.set_xlabel("SQNR of the logits with this layer alone in INT8, dB: less is worse")
        price.set_xlabel("% of all multiplications")
        handles = [
            Patch(color=BLUE, label="INT8"),
            Patch(facecolor=ORANGE, edgecolor="white", hatch="////", label="kept float"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    return figure


def _draw_stripes(panel: Axes, rows: int) -> None:
    for row in range(0, rows, 2):
        panel.axhspan(row - 0.5, row + 0.5, color=STRIPE, lw=0, zorder=0)


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
            "grid.color": GRID,
            "text.parse_math": False,  # a name may have a dollar sign
        }
    )
