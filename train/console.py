"""What a person sees while the workstation works: progress bars, tables, one line of news.

Everything here goes to stderr; stdout is for results. It does not know what is being done.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

T = TypeVar("T")

# Of the processes that a torchrun started, the first one speaks for all.
_silent = "TORCHELASTIC_RUN_ID" in os.environ and os.environ["RANK"] != "0"
console = Console(stderr=True, highlight=False, quiet=_silent)
if not console.is_terminal:
    console.width = 100  # a log file has no width; 80 would break the tables


def say(text: str) -> None:
    """One line of news; long ones wrap."""
    console.print(text, markup=False, soft_wrap=not console.is_terminal)


def progress() -> Progress:
    """A progress display with elapsed and remaining time and a free ``note`` beside the bar."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=console.is_terminal,
    )


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` under a progress bar."""
    if total is None and isinstance(items, Sequence):
        total = len(items)
    with progress() as bar:
        yield from _advance(items, bar, label, total)


def _advance(items: Iterable[T], bar: Progress, label: str, total: int | None) -> Iterator[T]:
    task = bar.add_task(label, total=total, note="")
    for item in items:
        yield item
        bar.advance(task)


@contextlib.contextmanager
def fraction(label: str) -> Iterator[Callable[[float, str], None]]:
    """A bar for work that reports its share done in [0, 1] and the name of its phase."""
    with progress() as bar:
        task = bar.add_task(label, total=100, note="")
        yield lambda share, phase: bar.update(task, completed=round(100 * share), note=phase)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A small table; the first column is left-aligned, the others right."""
    grid = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    for index, column in enumerate(columns):
        grid.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        grid.add_row(*row)
    console.print(grid)
