"""Every bar of the project on one page, and the list of benchmarks: read from what was recorded.

It measures nothing and judges nothing: whether a bar holds was decided when it was measured.
"""

import importlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

import msgspec

from benchmarks.harness import RESULTS, Record, Table, bar_cells, grid
from runtime import atomic

PAGE = "README.md"
INDEX = RESULTS.parent / "README.md"
PLACE = re.compile(
    r"(<!-- begin generated: benchmarks ([a-z0-9_ ]+) -->)\n.*?(<!-- end generated -->)", re.DOTALL
)

GENERATED = "<!-- Generated from the JSON files beside it by `make docs` and every benchmark. -->"


def records(folder: Path = RESULTS) -> list[Record]:
    """What was recorded in ``folder``, by name."""
    paths = sorted(folder.glob("*.json"))
    return [msgspec.json.decode(path.read_bytes(), type=Record) for path in paths]


def write(modules: Mapping[str, ModuleType]) -> list[Path]:
    """Write the page of bars, and the index of ``modules``; return their paths."""
    pages = {
        RESULTS / PAGE: page(records()),
        INDEX: fill(INDEX.read_text(encoding="utf-8"), modules),
    }
    for path, text in pages.items():
        atomic.write_text(path, text)
    return list(pages)


def fill(text: str, modules: Mapping[str, ModuleType] | None = None) -> str:
    """``text`` with its marked places filled anew.

    A place is between ``<!-- begin generated: benchmarks WHAT -->`` and ``<!-- end generated -->``;
    ``WHAT`` is ``index``, or a benchmark and the number of its table from 1, ``inference 1``.
    """

    def filled(place: re.Match[str]) -> str:
        begin, what, end = place.groups()
        name, _, number = what.partition(" ")
        found = index(modules or {}, records()) if name == "index" else table(name, int(number))
        return f"{begin}\n{found}\n{end}"

    return PLACE.sub(filled, text)


def page(found: Iterable[Record]) -> str:
    """The page of bars, in Markdown."""
    found = list(found)
    bars = [(record, bar) for record in found for bar in record.report.bars]
    held = sum(bar.holds for _, bar in bars)
    table = Table(
        title="",
        columns=("bar", "asked", "measured", "verdict", "command", "date"),
        rows=tuple(
            (
                *bar_cells(bar), f"[`{record.command}`]({_page_of(record, RESULTS)})", record.date,
            )
            for record, bar in bars
        ),
    )  # fmt: skip
    silent = [f"[{r.name}]({_page_of(r, RESULTS)})" for r in found if not r.report.bars]
    parts = [
        "# What was promised, and what was measured",
        GENERATED,
        f"{held} of {len(bars)} bars hold. A bar that does not is not hidden: it stands here.",
        grid(table),
    ]
    if silent:
        parts.append(f"Recorded without a bar that a program can read: {', '.join(silent)}.")
    return "\n\n".join(parts) + "\n"


def index(modules: Mapping[str, ModuleType], found: Iterable[Record]) -> str:
    """A table of the benchmarks, in Markdown, for the page in the folder above ``RESULTS``."""
    recorded = {record.name: record for record in found}
    rows = [
        (
            f"[{name}]({_page_of(recorded[name], RESULTS.parent)})" if name in recorded else name,
            first_line(module),
            "by name" if getattr(module, "LONG", False) else "by default",
            recorded[name].date if name in recorded else "not recorded",
        )
        for name, module in modules.items()
    ]
    columns = ("benchmark", "what it measures", "runs", "recorded")
    return grid(Table(title="", columns=columns, rows=tuple(rows)))


def first_line(module: ModuleType) -> str:
    """The first line of what the module says of itself."""
    return (module.__doc__ or "").splitlines()[0]


def table(name: str, number: int = 1, folder: Path = RESULTS) -> str:
    """One recorded table in Markdown, and under it when and where it was made.

    ``number`` counts from 1.
    """
    record = msgspec.json.decode((folder / f"{name}.json").read_bytes(), type=Record)
    found = record.report.tables[number - 1]
    made = f"{record.machine['processor']}, {record.date}; made by `{record.command}`"
    return f"{grid(found)}\n\n*{found.title}; {made}.*"


def _page_of(record: Record, start: Path) -> str:
    """The page with the record's tables, from the folder ``start``."""
    module = importlib.import_module(f"benchmarks.{record.name}")
    page: Path = getattr(module, "PAGE", RESULTS / f"{record.name}.md")
    return os.path.relpath(page, start)
