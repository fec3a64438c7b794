"""Power cuts, kills and stopped brokers: is a verdict that was acknowledged ever lost?

Each cut shuts an ext4 file system down while one process appends and another marks records as
sent, as the loop and its sender do, then looks at what is there (see power_cuts for what a cut
is). The same with ``synchronous=NORMAL`` shows that cuts do harm. End to end, the loop is killed
and a real mosquitto stopped, and who reads there must have every number. How fast it is on disks
that take their time to sync is measured with a library that makes syncing take so long.
"""

import contextlib
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
from tqdm import tqdm

from benchmarks.broker import Broker, Reader
from benchmarks.harness import Options, Report, Table
from benchmarks.power_cuts import Disk
from runtime.errors import DataError
from runtime.line.mqtt import WINDOW, Patience, Sender
from runtime.line.outbox import Outbox, Synchronous, Unkept, is_whole
from runtime.line.verdict import Finding, Verdict

LONG = True

CUTS, QUICK_CUTS = 2000, 5
KILLS, STOPS, QUICK_KILLS, QUICK_STOPS = 100, 30, 4, 2
DEVICE = "d" * 32
FINDING = Finding(
    time="2026-01-01T00:00:00.000Z", boot="0" * 36, monotonic=1.0, source="camera 1", frame="1",
    verdict="DEFECT", label="crack", score=0.98, bundle="solar", version="1.0.0",
    engine="onnxruntime CPU, int8-cpu", milliseconds={"decode": 1.0, "infer": 2.0},
)  # fmt: skip

NORMAL = "power cuts, synchronous=NORMAL"
SYNCS_MS = (0, 2, 5, 20, 50)
_BACK_LOG = 200
"""Records that are left unsent, so that there is something to lose."""
_MOST, _LONGEST_S = 60, 0.03
"""Records before a cut, and seconds from the last of them to the cut, at most."""
_SOON = Patience(first=0.05, longest=0.5, aside=1.0)

Violation = Literal["file damaged", "acknowledged record lost", "number given twice or left out"]
VIOLATIONS: tuple[Violation, ...] = (
    "file damaged", "acknowledged record lost", "number given twice or left out",
)  # fmt: skip


class Cut(NamedTuple):
    """What one cut did."""

    violations: tuple[Violation, ...]
    acknowledged: int
    """Before the cut began."""
    lost: int
    """Of those."""
    late: int
    """Acknowledged when the file system was shut down already, and not there: see the notes."""


class Word(NamedTuple):
    """What a process that works on an outbox says."""

    what: Literal["kept", "marking"]
    seq: int
    at: float
    """By ``time.monotonic``, which all processes share."""


def measure(options: Options) -> Report:
    """Cut, kill, stop and time.

    Raises UpdateError where ext4 cannot be mounted from a file, FleetError without mosquitto and
    DataError without a C compiler.
    """
    cuts = QUICK_CUTS if options.quick else options.cuts or CUTS
    kills = QUICK_KILLS if options.quick else KILLS
    stops = QUICK_STOPS if options.quick else STOPS
    with tempfile.TemporaryDirectory(prefix="outbox-cuts-") as name:
        folder = Path(name)
        speeds = [_speed(folder, sync, 0.5 if options.quick else 4) for sync in SYNCS_MS]
        full = _shown("power cuts", _cuts(folder, "FULL", cuts), cuts)
        normal = _shown(NORMAL, _cuts(folder, "NORMAL", max(cuts // 40, 5)), max(cuts // 40, 5))
        ends = end_to_end(folder / "ends", kills, stops)
    return _report({"power cuts": full, NORMAL: normal}, ends, speeds)


def _shown(title: str, cuts: Iterator[Cut], total: int) -> list[Cut]:
    return list(tqdm(cuts, desc=title, total=total, leave=False, disable=None))


# --- power cuts


def _cuts(folder: Path, synchronous: Synchronous, cuts: int) -> Iterator[Cut]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.outbox_cuts"])
    draw = random.Random(11)
    given: set[int] = set()
    """Numbers that were acknowledged and may not have been marked as sent."""
    with Disk(folder) as disk:
        path = disk.folder / "outbox.db"
        for _ in range(cuts):
            ear, mouth = context.Pipe(duplex=False)
            workers = [
                context.Process(target=act, args=(path, synchronous, mouth))
                for act in (append, mark)
            ]
            for worker in workers:
                worker.start()
            mouth.close()
            words: list[Word] = []
            begun = draw.randint(1, _MOST)
            while sum(word.what == "kept" for word in words) < begun:
                words.append(ear.recv())
            time.sleep(draw.uniform(0, _LONGEST_S))
            while ear.poll():
                words.append(ear.recv())
            began = time.monotonic()
            with disk.cut():
                for worker in workers:
                    worker.kill()
                    worker.join()
            with contextlib.suppress(EOFError):
                while True:
                    words.append(ear.recv())
            ear.close()
            yield look(path, words, given, began)


def append(path: Path, synchronous: Synchronous, mouth: Connection) -> None:
    """The loop: append for ever, saying each number that was given."""
    with Outbox(path, DEVICE, synchronous=synchronous, tell=_say_nothing) as outbox:
        while isinstance(verdict := outbox.append(FINDING), Verdict):
            mouth.send(Word("kept", verdict.seq, time.monotonic()))
    time.sleep(1000)  # its disk is gone


def mark(path: Path, synchronous: Synchronous, mouth: Connection) -> None:
    """The sender: mark the oldest as sent, saying so before."""
    draw = random.Random(os.getpid())
    with Outbox(path, DEVICE, synchronous="NORMAL", tell=_say_nothing) as outbox:
        while True:
            surplus = max(0, outbox.rows - _BACK_LOG)
            seqs = [row.seq for row in outbox.unsent(min(surplus, draw.randint(1, WINDOW)))]
            for seq in seqs:
                mouth.send(Word("marking", seq, time.monotonic()))
            outbox.sent(*seqs)
            time.sleep(0.001)


def _say_nothing(sentence: str) -> None:
    """What is said here is looked at in the file."""


def look(path: Path, words: list[Word], given: set[int], cut_at: float) -> Cut:
    """What is there after ``words`` were said and the power was cut at ``cut_at``.

    ``given`` goes from one cut to the next. Most of what waits is then taken out, so that looking
    does not take ever longer.
    """
    kept = {word.seq for word in words if word.what == "kept" and word.at < cut_at}
    late = {word.seq for word in words if word.what == "kept"} - kept
    marked = {word.seq for word in words if word.what == "marking"}
    said: list[str] = []
    with Outbox(path, DEVICE, tell=said.append) as outbox:
        counts = outbox.counts()
        rows = outbox.unsent(counts.rows + 1)
        outbox.sent(*(row.seq for row in rows[:-_BACK_LOG]))
    there = {row.seq for row in rows if is_whole(row, DEVICE)}
    missing = (given | kept) - marked - there
    found: list[Violation] = []
    if said or len(there) != len(rows):
        found.append("file damaged")
    if missing:
        found.append("acknowledged record lost")
    first = min(there, default=counts.last + 1)
    left_out = {*range(first, counts.last + 1)} - there - marked
    if counts.last < max(kept, default=0) or left_out:
        found.append("number given twice or left out")
    given.clear()
    given.update(row.seq for row in rows[-_BACK_LOG:])
    return Cut(tuple(found), len(kept), len(missing), len(late - marked - there))


# --- end to end


class Ends(NamedTuple):
    """What came of a number of kills and stops."""

    kills: int
    stops: int
    acknowledged: int
    recorded: int
    lost: int
    arrived: int
    """Messages, with duplicates."""


def end_to_end(folder: Path, kills: int, stops: int) -> Ends:
    """Kill the loop and stop the broker, again and again; who reads must have every number."""
    path = folder / "outbox.db"
    said: set[int] = set()
    draw = random.Random(13)
    when = {round(turn * kills / stops) for turn in range(stops)}
    with (
        Broker(folder / "broker") as broker,
        Reader(broker, f"fieldfit/{DEVICE}/results") as reader,
    ):
        for turn in tqdm(range(kills), desc="kills", leave=False, disable=None):
            stopped = turn in when
            act = broker.stop if stopped else _nothing
            said |= {*write_until_killed(path, DEVICE, broker.url, draw.randint(5, 30), act)}
            if stopped:
                broker.start()
        with Outbox(path, DEVICE) as outbox, Sender(outbox, broker.url, patience=_SOON) as sender:
            while outbox.rows:
                sender.tend()
                time.sleep(0.05)
            recorded = outbox.counts().last
        reader.wait(recorded)
        numbers = {msgspec.json.decode(data, type=Verdict).seq for data in reader.payloads()}
        arrived = sum(reader.messages.values())
    lost = len((said | {*range(1, recorded + 1)}) - numbers)
    return Ends(kills, len(when), len(said), recorded, lost, arrived)


def _nothing() -> None:
    """Do nothing."""


def write_until_killed(
    path: Path, device: str, url: str, records: int, midway: Callable[[], object] = _nothing
) -> list[int]:
    """The numbers that a loop with a sender said it had kept, before it was killed.

    ``midway`` is called when it has said half of ``records``.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.outbox_cuts", str(path), device, url],
        stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout
        said = [int(process.stdout.readline()) for _ in range(records // 2)]
        midway()
        said += [int(process.stdout.readline()) for _ in range(records - records // 2)]
        process.kill()
        # The last line may be torn: a number that was not said whole was not acknowledged.
        said += [int(line) for line in process.stdout if line.endswith(b"\n")]
    return said


def write(path: Path, device: str, url: str) -> None:
    """A loop that keeps one record after the other, and says so, until it is killed."""
    with Outbox(path, device) as outbox, Sender(outbox, url, patience=_SOON) as sender:
        while True:
            verdict = outbox.append(FINDING)
            assert isinstance(verdict, Verdict), verdict
            print(verdict.seq, flush=True)
            sender.tend()
            time.sleep(0.005)


# --- speed


class Speed(NamedTuple):
    """How fast records are kept where a sync takes so long."""

    sync_ms: float
    records_s: float
    syncs: float
    """Of each record."""


def _speed(folder: Path, sync_ms: float, seconds: float) -> Speed:
    compiler = shutil.which("cc")
    if compiler is None:
        raise DataError("needs a C compiler to slow the disk down; apt install gcc")
    library = folder / "slow.so"
    source = folder / "slow.c"
    source.write_text(_SLOW)
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    place = folder / f"speed-{sync_ms}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.outbox_cuts", str(place), str(seconds)],
        env={**os.environ, "LD_PRELOAD": str(library), "SYNC_US": str(int(sync_ms * 1000))},
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    records, syncs, took = map(float, done.stdout.split())
    return Speed(sync_ms, records / took, syncs / records)


_SLOW = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>
static long calls = 0;
long sync_calls(void) { return calls; }
static int slowly(const char *name, int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, name);
    calls++;
    usleep(atoi(getenv("SYNC_US")));
    return real(fd);
}
int fsync(int fd) { return slowly("fsync", fd); }
int fdatasync(int fd) { return slowly("fdatasync", fd); }
"""


def fill(folder: Path, seconds: float) -> None:
    """Append for so long; print how many records, how many syncs, and seconds."""
    import ctypes

    calls = ctypes.CDLL(None).sync_calls
    with Outbox(folder / "outbox.db", DEVICE) as outbox:
        outbox.append(FINDING)
        records, before, began = 0, calls(), time.perf_counter()
        while time.perf_counter() < began + seconds:
            assert not isinstance(outbox.append(FINDING), Unkept)
            records += 1
        print(records, calls() - before, time.perf_counter() - began)


# --- the report


def _report(series: dict[str, list[Cut]], ends: Ends, speeds: list[Speed]) -> Report:
    cuts = series["power cuts"]
    clean = not any(cut.violations for cut in cuts)
    bound = f"0 of {len(cuts):,} means below {300 / len(cuts):.2g} % with 95 % confidence."
    rows = tuple(
        (title, f"{len(found):,}", f"{sum(c.acknowledged for c in found):,}",
         f"{sum(c.lost for c in found):,}", f"{sum(c.late for c in found):,}",
         *(f"{sum(kind in c.violations for c in found):,}" for kind in VIOLATIONS))
        for title, found in series.items()
    )  # fmt: skip
    twice = ends.arrived - ends.recorded
    return Report(
        title="The outbox: power cuts, kills, stopped brokers, slow disks",
        tables=(
            Table(
                title="Power cuts while records are appended and marked as sent",
                columns=("", "cuts", "acknowledged", "of them lost", "late", *VIOLATIONS),
                rows=rows,
                notes=(
                    f"{bound if clean else ''} ext4 on a loop device, shut down with "
                    "EXT4_IOC_SHUTDOWN without flushing the journal, mounted again. Page cache "
                    "and journal are lost; torn sectors and drives that lie about what they wrote "
                    "are not modelled. The last three columns count cuts.",
                    "Late are records that were acknowledged after the cut had begun and are not "
                    "there: a machine without power says nothing, but a process on a file system "
                    "that is being shut down lives on, and a sync that was on its way may then "
                    "return without an error. They are no losses, and counted apart.",
                ),
            ),
            Table(
                title="From the loop to a reader at a real mosquitto",
                columns=("", "count"),
                rows=(
                    ("kill -9 of the loop", f"{ends.kills:,}"),
                    ("broker stopped and started", f"{ends.stops:,}"),
                    ("records acknowledged before a kill", f"{ends.acknowledged:,}"),
                    ("records in all", f"{ends.recorded:,}"),
                    ("lost", f"{ends.lost:,}"),
                    ("messages that came", f"{ends.arrived:,}"),
                    ("duplicates", f"{twice:,} ({twice / ends.recorded:.0%})"),
                ),
                notes=("Who reads tells duplicates by ``(device, seq)``.",),
            ),
            Table(
                title="Records a second, by what a sync takes",
                columns=("added to each sync", "records a second", "syncs a record"),
                rows=tuple(
                    (f"{s.sync_ms:g} ms", f"{s.records_s:,.0f}", f"{s.syncs:.2f}") for s in speeds
                ),
                notes=(
                    "Each fsync and fdatasync is made to take so much longer than this disk's; "
                    "SD cards and worn eMMC take tens of milliseconds.",
                ),
            ),
        ),
        figures={
            **{
                title: {
                    "cuts": len(found),
                    "acknowledged": sum(c.acknowledged for c in found),
                    "lost": sum(c.lost for c in found),
                    "late": sum(c.late for c in found),
                    "violations": {k: sum(k in c.violations for c in found) for k in VIOLATIONS},
                }
                for title, found in series.items()
            },
            "end to end": {**ends._asdict(), "duplicates": twice},
            "speed": [speed._asdict() for speed in speeds],
        },
    )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        fill(Path(sys.argv[1]), float(sys.argv[2]))
    else:
        write(Path(sys.argv[1]), *sys.argv[2:4])
