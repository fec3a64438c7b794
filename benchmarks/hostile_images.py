"""What do hostile pictures cost a device: is any of them a crash, a wait, or a lot of memory?

Every kind of ``hostile_pictures`` and thousands of fuzzed files go through ``runtime.preprocess``
in a process of their own, which says what became of each. If it dies, that counts, and another one
takes its place.
"""

import json
import struct
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from benchmarks import hostile_pictures
from benchmarks.harness import Options, Report, Table

LONG = True

FUZZED, QUICK_FUZZED = 20_000, 200
LIMIT_SECONDS, LIMIT_MB = 1.0, 256.0


class Seen(NamedTuple):
    """What became of one picture."""

    fate: str
    """``read``, ``refused``, ``wrong`` (any other exception) or ``died``."""
    seconds: float
    megabytes: float
    """The process's peak above what it had when it was started."""
    words: str


class Victim:
    """The process that reads them."""

    def __init__(self) -> None:
        self._process = self._start()

    def read(self, data: bytes) -> Seen:
        """Let it preprocess one encoded picture."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(struct.pack("<Q", len(data)) + data)
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if line:
            return Seen(*json.loads(line))
        signal = -self._process.wait()
        self._process = self._start()
        return Seen("died", 0.0, 0.0, f"signal {signal}")

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "benchmarks.hostile_images"]
        return subprocess.Popen(
            command, cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libtiff prints what it thinks
        )  # fmt: skip

    def __enter__(self) -> "Victim":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()


def _read_all(stream: BinaryIO) -> None:
    """The victim's side."""
    from runtime.errors import DataError
    from runtime.preprocess import InputSpec, preprocess

    warnings.simplefilter("ignore")  # Pillow's remarks about odd files
    spec = InputSpec(size=(224, 224), channels=3)
    preprocess(hostile_pictures.friendly(), spec)
    base = _memory("VmRSS")
    while head := stream.read(8):
        data = stream.read(struct.unpack("<Q", head)[0])
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: man 5 proc
        held, started = len(data) / 1e6, time.perf_counter()
        try:
            preprocess(data, spec)
            fate, words = "read", ""
        except DataError as error:
            fate, words = "refused", str(error)
        except Exception as error:
            fate, words = "wrong", repr(error)
        seconds = time.perf_counter() - started
        more = max(0.0, _memory("VmHWM") - base - held)
        print(json.dumps([fate, seconds, more, words]), flush=True)


def _memory(field: str) -> float:
    """Of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(kilobytes) * 1024 / 1e6


def measure(options: Options) -> Report:
    """Every kind, then the fuzzed ones; with ``--quick`` a few hundred of those."""
    with Victim() as victim:
        seen = {kind: victim.read(kind.make()) for kind in tqdm(hostile_pictures.kinds())}
        count = QUICK_FUZZED if options.quick else FUZZED
        fates: Counter[str] = Counter()
        slowest = heaviest = 0.0
        for data in tqdm(hostile_pictures.fuzzed(count), total=count):
            one = victim.read(data)
            fates[one.fate] += 1
            slowest, heaviest = max(slowest, one.seconds), max(heaviest, one.megabytes)
    return _report(seen, fates, slowest, heaviest)


def _report(
    seen: dict[hostile_pictures.Kind, Seen], fates: Counter[str], slowest: float, heaviest: float
) -> Report:
    kinds = tuple(
        (kind.name, one.fate, f"{one.seconds:.2f}", f"{one.megabytes:.0f}")
        for kind, one in seen.items()
    )
    figures: dict[str, Any] = {
        "kinds": len(seen),
        "kinds_wrong": [kind.name for kind, one in seen.items() if not as_expected(kind, one)],
        "kinds_slowest_s": max(one.seconds for one in seen.values()),
        "kinds_most_mb": max(one.megabytes for one in seen.values()),
        "fuzzed": dict(fates),
        "fuzzed_slowest_s": slowest,
        "fuzzed_most_mb": heaviest,
    }
    counts = (fates.total(), *(fates[fate] for fate in ("read", "refused", "wrong", "died")))
    fuzzed = (*(f"{count:,}" for count in counts), f"{slowest:.2f}", f"{heaviest:.0f}")
    return Report(
        title="Hostile pictures",
        tables=(
            Table(
                title="By kind",
                columns=("kind", "fate", "seconds", "MB"),
                rows=kinds,
                notes=(
                    f"Bars: {LIMIT_SECONDS:.0f} s and {LIMIT_MB:.0f} MB above what the process had "
                    "before. *Refused*: one sentence (DataError).",
                ),
            ),
            Table(
                title="Fuzzed",
                columns=("pictures", "read", "refused", "other errors", "crashes", "slowest, s",
                         "most, MB"),
                rows=(fuzzed,),
            ),
        ),
        figures=figures,
    )  # fmt: skip


def as_expected(kind: hostile_pictures.Kind, one: Seen) -> bool:
    """Whether it had one of the fates that its kind may have."""
    return one.fate in (("read", "refused") if kind.fate == "either" else (kind.fate,))


if __name__ == "__main__":
    _read_all(sys.stdin.buffer)
