"""Every bar of the project on one page, and the list of benchmarks: read from what was recorded.

It measures nothing and judges nothing: whether a bar holds was decided when it was measured.
"""

import importlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

import msgspec

from benchmarks.harness import RESULTS, Record, Table, bar_cells, grid
from runtime import atomic

PAGE = "README.md"

GENERATED = "<!-- Generated from the JSON files beside it by `make docs` and every benchmark. -->"


def records(folder: Path = RESULTS) -> list[Record]:
    """What was recorded in ``folder``, by name."""
    paths = sorted(folder.glob("*.json"))
    return [msgspec.json.decode(path.read_bytes(), type=Record) for path in paths]


def write(folder: Path = RESULTS) -> Path:
    """Write the page of bars to ``folder`` and return its path."""
    atomic.write_text(folder / PAGE, page(records(folder)))
    return folder / PAGE


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
            "by name" if getattr(module, "LONG", False) else "always",
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
