"""``python -m export compare A B``: two bundles side by side, in the terminal and as a page.

It knows neither checkpoints nor images: what is compared is what each bundle carries.
"""

import argparse
from pathlib import Path

from export.comparison import Comparison, Interval, Side, compare, spoken
from export.release import read_release
from export.report.page import render
from runtime import atomic
from runtime.bundle import Bundle
from train import console

PAGE = "compare.html"

COLUMNS = ("figure", "A", "B", "B - A", "better")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("a", type=Path, metavar="A", help="a bundle's folder or zip")
    parser.add_argument("b", type=Path, metavar="B", help="another, e.g. of the release before")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", default=Path(PAGE),
        help=f"where the page goes; {PAGE} if left out",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Compare, show, and write the page.

    Raises BundleError for what is no bundle, or one that carries no release.
    """
    sides = read_side(options.a), read_side(options.b)
    comparison = compare(*sides)
    show(*sides, comparison)
    write_page(options.out, *sides, comparison)
    console.say(f"wrote {options.out}")
    return 0


def read_side(path: Path) -> Side:
    """The bundle at ``path``, a folder or a zip, and the release that it carries.

    Raises BundleError if it is none, or carries none.
    """
    bundle = Bundle.open(path)
    return Side(str(path), bundle.manifest, read_release(bundle))


def show(one: Side, other: Side, comparison: Comparison) -> None:
    """Print every figure of both, what may be made of them, and who is better on what."""
    console.table(
        f"A is {one.name} ({one.path}), B is {other.name} ({other.path})",
        COLUMNS,
        [
            [f"{line.of}: {line.what}", line.one, line.other, line.change, line.verdict]
            for line in comparison.lines
        ],
    )
    changed = [record for record in comparison.records[2:] if record[0] in "-+"]
    if changed:
        console.say("what differs in their making:")
    for record in changed:
        console.say(record)
    for doubt in comparison.doubts:
        console.say(f"note: {doubt}")
    console.say(comparison.headline)


def write_page(path: Path, one: Side, other: Side, comparison: Comparison) -> None:
    """Write ``comparison`` as one page that needs nothing else, whole or not at all."""
    groups = {
        of: [line for line in comparison.lines if line.of == of]
        for of in dict.fromkeys(line.of for line in comparison.lines)
    }
    wins = {
        side: {proven: spoken(comparison.lines, side, proven=proven) for proven in (True, False)}
        for side in ("A", "B")
    }
    page = render(
        "compare.html", sides={"A": one, "B": other}, comparison=comparison, groups=groups,
        wins=wins, place=place,
    )  # fmt: skip
    atomic.write_text(path, page)


def place(intervals: tuple[Interval, Interval]) -> tuple[Interval, Interval]:
    """Where the two intervals begin and end in a strip that is 100 wide and just holds both."""
    low = min(interval[0] for interval in intervals)
    span = max(interval[1] for interval in intervals) - low or 1.0

    def placed(interval: Interval) -> Interval:
        return 2 + 96 * (interval[0] - low) / span, 2 + 96 * (interval[1] - low) / span

    return placed(intervals[0]), placed(intervals[1])
