"""Soak: `fieldfit watch` for minutes or hours: errors, memory, slow frames against usual ones.

The program is the real one, in a process of its own, on a folder into which pictures fall at a
steady rate, some of them damaged. Each must get its verdict, the damaged ones NOT INSPECTED; its
memory is read from /proc once a second.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.harness import Options, Report, Table, at_most
from runtime.bundle import Bundle
from runtime.errors import DataError

LONG = True

MINUTES, QUICK_MINUTES = 10, 0.25
PER_SECOND = 10.0
DAMAGED_EVERY = 50
GROWTH_BAR, TAIL_BAR = 1.0, 3.0
"""MB an hour; p99 over p50 of an inspection."""

WARM_UP = 0.2
"""Share of the run before its memory counts: caches fill."""

STAGES = ("preprocess", "infer", "look")
_PATIENCE_S = 60.0


class Sample(NamedTuple):
    """Memory of the program and what it started."""

    seconds: float
    rss_mb: float


class Outcome(NamedTuple):
    """What a run came to."""

    sent: int
    verdicts: dict[str, str]
    """By file name."""
    inspection_ms: list[float]
    """Preprocessing, inference and checks of each frame that was inspected."""
    end_to_end_ms: list[float]
    """From the file's appearance to its line on stdout: kept on disk."""
    memory: list[Sample]
    exit_code: int
    said: str
    """On stderr."""


def measure(options: Options) -> Report:
    """Run, and report."""
    minutes = QUICK_MINUTES if options.quick else float(options.minutes or MINUTES)
    with tempfile.TemporaryDirectory(prefix="fieldfit-soak-") as folder:
        outcome = _run(options.bundle, Path(folder), minutes * 60)
    return report(outcome, minutes)


def report(outcome: Outcome, minutes: float) -> Report:
    """Tables and figures of ``outcome``."""
    wrong = errors(outcome)
    slope = slope_mb_per_hour(outcome.memory)
    inspection = _percentiles(outcome.inspection_ms)
    whole = _percentiles(outcome.end_to_end_ms)
    course = [round(sample.rss_mb, 1) for sample in _tenths(outcome.memory)]
    rows = (
        ("frames", f"{outcome.sent:,}"),
        ("wrong or missing verdicts", f"{len(wrong)}"),
        ("memory after each tenth, MB", ", ".join(f"{megabytes:.0f}" for megabytes in course)),
        ("memory grows by, MB an hour", f"{slope:.1f}"),
        ("inspection p50, p99, ms", f"{inspection[0]:.2f}, {inspection[1]:.2f}"),
        ("inspection p99 / p50", f"{inspection[1] / inspection[0]:.2f}"),
        ("file to kept verdict p50, p99, ms", f"{whole[0]:.1f}, {whole[1]:.1f}"),
        ("ended with", f"{outcome.exit_code}"),
    )
    table = Table(
        title=f"{minutes:g} minutes of fieldfit watch",
        columns=("what", "figure"),
        rows=rows,
        notes=(
            f"One in {DAMAGED_EVERY} files is damaged and must be NOT INSPECTED. Memory is "
            "resident, of the program and the processes that it starts; its slope is of the last "
            f"{1 - WARM_UP:.0%} of the run, by least squares: a short run says little about it.",
        ),
    )
    figures: dict[str, object] = {
        "minutes": minutes, "frames": outcome.sent, "errors": wrong,
        "rss_mb": course, "slope_mb_per_hour": slope,
        "inspection_ms": dict(zip(("p50", "p99"), inspection, strict=True)),
        "end_to_end_ms": dict(zip(("p50", "p99"), whole, strict=True)),
        "exit_code": outcome.exit_code,
    }  # fmt: skip
    bars = (
        at_most(f"soak of {minutes:g} minutes, wrong or missing verdicts", len(wrong), 0),
        at_most(f"soak of {minutes:g} minutes, growth of memory", slope, GROWTH_BAR, " MB/h"),
        at_most("soak, inspection p99 / p50", inspection[1] / inspection[0], TAIL_BAR),
    )
    return Report(title="Soak", tables=(table,), figures=figures, bars=bars)


def _tenths(memory: Sequence[Sample]) -> list[Sample]:
    return [memory[min(len(memory) * tenth // 10, len(memory) - 1)] for tenth in range(11)]


def errors(outcome: Outcome) -> list[str]:
    """A sentence for each verdict that is missing or wrong."""
    found = []
    for number in range(outcome.sent):
        verdict = outcome.verdicts.get(_name(number))
        damaged = number % DAMAGED_EVERY == DAMAGED_EVERY - 1
        if verdict is None:
            found.append(f"{_name(number)}: no verdict")
        elif (verdict == "NOT INSPECTED") != damaged:
            found.append(f"{_name(number)}: {verdict}")
    if outcome.exit_code != 0:
        found.append(f"it ended with {outcome.exit_code}: {outcome.said[-300:]}")
    return found


def slope_mb_per_hour(memory: Sequence[Sample]) -> float:
    """Of the straight line through the samples after the warm-up."""
    end = memory[-1].seconds
    late = [sample for sample in memory if sample.seconds >= WARM_UP * end]
    if len(late) < 2:
        return float("nan")
    seconds, megabytes = np.array(late).T
    return float(np.polyfit(seconds / 3600, megabytes, 1)[0])


def _run(bundle: Path, folder: Path, seconds: float) -> Outcome:
    inbox = folder / "inbox"
    inbox.mkdir()
    opened = Bundle.open(bundle)
    pictures, label = opened.golden()["images"], opened.manifest.labels[0]
    command = [
        sys.executable, "-m", "runtime", "watch", f"watch:{inbox}", "--bundle", str(bundle),
        "--ok", label, "--state", str(folder / "state"), "--evidence", str(folder / "evidence"),
        "--metrics", str(folder / "line.prom"),
    ]  # fmt: skip
    with (folder / "stderr").open("w+") as said, _started(command, said) as process:
        return _feed(process, inbox, pictures, seconds, said)


@contextlib.contextmanager
def _started(command: Sequence[str], said: IO[str]) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class _Reader(threading.Thread):
    """Takes the program's lines as they come."""

    def __init__(self, stream: IO[str], appeared: dict[str, float], inbox: Path) -> None:
        super().__init__(daemon=True)
        self._stream, self._appeared, self._inbox = stream, appeared, inbox
        self.verdicts: dict[str, str] = {}
        self.inspection_ms: list[float] = []
        self.end_to_end_ms: list[float] = []

    def run(self) -> None:
        for line in self._stream:
            now = time.monotonic()
            record = json.loads(line)
            name = Path(record["frame"]).name
            self.verdicts[name] = record["verdict"]
            stages = record["milliseconds"]
            if record["verdict"] != "NOT INSPECTED":
                self.inspection_ms.append(sum(stages[stage] for stage in STAGES))
                self.end_to_end_ms.append((now - self._appeared[name]) * 1e3)
            (self._inbox / name).unlink(missing_ok=True)


def _feed(
    process: "subprocess.Popen[str]",
    inbox: Path,
    pictures: npt.NDArray[np.uint8],
    seconds: float,
    said: IO[str],
) -> Outcome:
    assert process.stdout is not None
    appeared: dict[str, float] = {}
    reader = _Reader(process.stdout, appeared, inbox)
    reader.start()
    _drop(inbox, 0, pictures, appeared)
    _wait(process, lambda: _name(0) in reader.verdicts, said)
    memory: list[Sample] = []
    start, sent = time.monotonic(), 1
    while (elapsed := time.monotonic() - start) < seconds and process.poll() is None:
        if elapsed >= len(memory):
            memory.append(Sample(elapsed, _rss_mb(process.pid)))
        due = int(elapsed * PER_SECOND) + 1
        for number in range(sent, due):
            _drop(inbox, number, pictures, appeared)
        sent = max(sent, due)
        time.sleep(0.5 / PER_SECOND)
    with contextlib.suppress(DataError):  # what is missing is counted
        _wait(process, lambda: len(reader.verdicts) >= sent, said)
    process.send_signal(signal.SIGTERM)
    code = process.wait(_PATIENCE_S)
    reader.join(_PATIENCE_S)
    said.seek(0)
    return Outcome(
        sent, reader.verdicts, reader.inspection_ms, reader.end_to_end_ms, memory, code, said.read()
    )


def _wait(process: "subprocess.Popen[str]", done: Callable[[], bool], said: IO[str]) -> None:
    end = time.monotonic() + _PATIENCE_S
    while not done():
        if process.poll() is not None or time.monotonic() > end:
            said.seek(0)
            raise DataError(f"fieldfit watch gave no verdict in {_PATIENCE_S:g} s: {said.read()}")
        time.sleep(0.05)


def _drop(
    inbox: Path,
    number: int,
    pictures: npt.NDArray[np.uint8],
    appeared: dict[str, float],
) -> None:
    """Let a picture appear, whole; one in DAMAGED_EVERY is cut short."""
    data = io.BytesIO()
    Image.fromarray(pictures[number % len(pictures)].squeeze()).save(data, "PNG")
    content = data.getvalue()
    if number % DAMAGED_EVERY == DAMAGED_EVERY - 1:
        content = content[: len(content) // 2]
    hidden = inbox / f".{_name(number)}"
    hidden.write_bytes(content)
    appeared[_name(number)] = time.monotonic()
    hidden.rename(inbox / _name(number))


def _name(number: int) -> str:
    return f"{number:08}.png"


def _rss_mb(pid: int) -> float:
    """Resident memory of a process and all below it, in MB."""
    total = 0.0
    for process in [pid, *_below(pid)]:
        with contextlib.suppress(OSError, ValueError):
            pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
            total += pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    return total


def _below(pid: int) -> list[int]:
    found = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, tasks.read_text().split()):
                found += [child, *_below(child)]
    return found


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    p50, p99 = np.percentile(values, [50, 99])
    return float(p50), float(p99)
