"""Time things against each other, and write the figures down with the machine they come from.

It does not know what is timed. Shared machines drift, so candidates run in turn (A B A B ...) and
are compared round by round, in CPU time of this process: the claim is always a ratio.
"""

import datetime
import functools
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import onnxruntime

from runtime import atomic
from runtime.machine import describe
from runtime.version import __version__

RESULTS = Path(__file__).parent / "results"


class Options(NamedTuple):
    """What a person may choose for a benchmark."""

    bundle: Path
    quick: bool = False
    """A few seconds instead of a minute or two: shows that it runs, proves nothing."""
    cuts: int | None = None
    """How often power_cuts cuts; None is its own choice."""
    minutes: int | None = None
    """How long soak runs; None is its own choice."""


class Clocks(NamedTuple):
    """Where times come from, in seconds; tests bring their own."""

    cpu: Callable[[], float] = time.process_time
    """All threads of this process, blind to other processes."""
    wall: Callable[[], float] = time.perf_counter


CLOCKS = Clocks()


class Spread(msgspec.Struct, frozen=True):
    """The middle of many values, and the tenth below and above which few of them lie."""

    median: float
    p10: float
    p90: float

    def __str__(self) -> str:
        return f"{digits(self.median)} ({digits(self.p10)} to {digits(self.p90)})"


class Times(msgspec.Struct):
    """What one call of a candidate took in every round, in seconds."""

    cpu: list[float] = []
    wall: list[float] = []


class Seconds(NamedTuple):
    """What one turn of a candidate took."""

    cpu: float
    wall: float


class Bar(msgspec.Struct, frozen=True):
    """A promise with a number: what was asked, what came of it."""

    what: str
    bar: str
    value: str
    holds: bool


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """Rows for people. The first column names, the others are figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a benchmark returns: tables for people, the same figures unrounded for programs."""

    title: str
    tables: tuple[Table, ...]
    figures: dict[str, object]
    bars: tuple[Bar, ...] = ()


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A report with what is needed to repeat it."""

    name: str
    command: str
    date: str
    machine: dict[str, str]
    report: Report


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    least: int = 5,
    warmup: int = 3,
    settle: int = 0,
    calls: int = 1,
    clocks: Clocks = CLOCKS,
) -> dict[str, Times]:
    """Let ``candidates`` take turns for about ``seconds`` in all, at least ``least`` rounds.

    A turn is ``settle`` calls that are not counted, then ``calls`` that are timed together. What
    ran before has filled the caches with its own data: settle first to time what runs again and
    again, do not to time what runs now and then. ``warmup`` calls of each come before all.
    """
    for call in candidates.values():
        for _ in range(warmup):
            call()

    def turn(call: Callable[[], object]) -> Seconds:
        for _ in range(settle):
            call()
        cpu, wall = clocks.cpu(), clocks.wall()
        for _ in range(calls):
            call()
        wall = clocks.wall() - wall
        return Seconds((clocks.cpu() - cpu) / calls, wall / calls)

    turns = {name: functools.partial(turn, call) for name, call in candidates.items()}
    return take_turns(turns, seconds=seconds, least=least, wall=clocks.wall)


def take_turns(
    turns: Mapping[str, Callable[[], Seconds]],
    *,
    seconds: float,
    least: int = 5,
    wall: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Let candidates that measure themselves, in processes of their own, take turns.

    As ``interleave``: for about ``seconds`` in all, at least ``least`` rounds.
    """
    times = {name: Times(cpu=[], wall=[]) for name in turns}
    end = wall() + seconds
    rounds = 0
    while rounds < least or wall() < end:
        for name, turn in turns.items():
            taken = turn()
            times[name].cpu.append(taken.cpu)
            times[name].wall.append(taken.wall)
        rounds += 1
    return times


def at_least(what: str, value: float | Spread, bar: float, unit: str = "") -> Bar:
    """``value``, or its median, must not be below ``bar``."""
    return Bar(what, f"at least {bar:g}{unit}", *_held(value, unit, lambda found: found >= bar))


def at_most(what: str, value: float | Spread, bar: float, unit: str = "") -> Bar:
    """``value``, or its median, must not be above ``bar``."""
    return Bar(what, f"at most {bar:g}{unit}", *_held(value, unit, lambda found: found <= bar))


def _held(value: float | Spread, unit: str, holds: Callable[[float], bool]) -> tuple[str, bool]:
    if isinstance(value, Spread):
        return f"{value}{unit}", holds(value.median)
    return f"{value if isinstance(value, int) else digits(value)}{unit}", holds(value)


def spread(values: Iterable[float], *, scale: float = 1.0) -> Spread:
    """Median, 10th and 90th percentile of ``values`` times ``scale``."""
    p10, median, p90 = np.percentile(np.array(list(values)) * scale, [10, 50, 90])
    return Spread(float(median), float(p10), float(p90))


def ratio(one: Sequence[float], other: Sequence[float]) -> Spread:
    """``one / other`` round by round: how many times longer ``one`` takes."""
    return spread(a / b for a, b in zip(one, other, strict=True))


def difference(one: Sequence[float], other: Sequence[float], *, scale: float = 1.0) -> Spread:
    """``one - other`` round by round, times ``scale``."""
    return spread((a - b for a, b in zip(one, other, strict=True)), scale=scale)


def machine(load: str) -> dict[str, str]:
    """What figures depend on beside the code; no path and no name of a host."""
    here = describe()
    return {
        "processor": f"{here.cpu}, {here.cores} cores for this process",
        "8-bit instructions": ", ".join(here.int8_instructions) or "none",
        "system": f"{platform.system()} {platform.machine()}",
        "load": load,
        "python": platform.python_version(),
        "fieldfit": __version__,
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
        "revision": _revision(),
    }


def run(name: str, measure: Callable[[], Report], command: str) -> Record:
    """``measure()`` with the command, the date, the machine, and how busy that was meanwhile."""
    before = os.getloadavg()[0]
    report = measure()
    # Our own one or two threads are part of the load; what lies above them was others' work.
    load = f"{before:.1f} before, {os.getloadavg()[0]:.1f} after, of {os.cpu_count()} cores"
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return Record(name=name, command=command, date=date, machine=machine(load), report=report)


def write(record: Record, folder: Path = RESULTS, page: Path | None = None) -> list[Path]:
    """Write ``NAME.json`` and ``NAME.md`` to ``folder``; return their paths.

    ``page`` is another place for the second.
    """
    data = msgspec.json.format(msgspec.json.encode(record), indent=1)
    paths = [folder / f"{record.name}.json", page or folder / f"{record.name}.md"]
    atomic.write_bytes(paths[0], data + b"\n")
    atomic.write_text(paths[1], markdown(record))
    return paths


def markdown(record: Record) -> str:
    """The tables of ``record``, and under them how they were made."""
    parts = [f"# {record.report.title}"]
    tables = list(record.report.tables)
    if record.report.bars:
        tables.append(bars_table(record.report.bars))
    for table in tables:
        parts += [f"## {table.title}", grid(table), *table.notes]
    facts = "; ".join(f"{name} {value}" for name, value in record.machine.items())
    parts.append(f"Made by `{record.command}` on {record.date}. {facts}.")
    return "\n\n".join(parts) + "\n"


def verdict(holds: bool) -> str:
    """The one wording of bars."""
    return "holds" if holds else "does not hold"


def bars_table(bars: Sequence[Bar]) -> Table:
    """What was asked and what came of it."""
    return Table(
        title="Bars",
        columns=("bar", "asked", "measured", "verdict"),
        rows=tuple(map(bar_cells, bars)),
    )


def bar_cells(bar: Bar) -> tuple[str, str, str, str]:
    """What, asked, measured, verdict; one that does not hold is not to be overlooked."""
    said = verdict(bar.holds)
    return bar.what, bar.bar, bar.value, said if bar.holds else f"**{said}**"


def grid(table: Table) -> str:
    """``table`` in Markdown, without its title and notes."""
    columns = list(zip(*table.rows, strict=True))[1:] or [()] * (len(table.columns) - 1)
    marks = ("---", *("---:" if _figures(column) else "---" for column in columns))
    lines = [table.columns, marks, *table.rows]
    # A bar inside a cell would begin a new one.
    return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in cells)} |" for cells in lines)


def _figures(cells: Iterable[str]) -> bool:
    """Whether what a column holds is to be compared by its digits."""
    return any(cell[:1].isdigit() or cell[:1] in "+-" for cell in cells if cell)


def digits(value: float) -> str:
    """Three significant digits: more would be noise."""
    places = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{places}f}"


def _revision() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
