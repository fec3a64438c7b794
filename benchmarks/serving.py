"""What fieldfit serve takes from clients: fuzzed and heavy requests, ten times its capacity.

The service is the command as it is started on a device, in a process of its own. Beside it runs a
camera: a classifier in a loop at a fixed rate, also in a process of its own.
"""

import contextlib
import errno
import functools
import io
import json
import os
import re
import selectors
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.harness import (
    Options,
    Report,
    Spread,
    Table,
    at_least,
    at_most,
    interleave,
    spread,
)
from runtime.bundle import Bundle
from runtime.classifier import Classifier
from runtime.serving.gate import MIB
from tests.serving_client import Client, Running, ask, encode, started
from tests.serving_fuzz import fuzzed

LONG = True

FUZZED, HEAVY_ROUNDS, ROUNDS, PHASE_S = 20_000, 2, 5, 12.0
QUICK_FUZZED, QUICK_HEAVY, QUICK_ROUNDS, QUICK_PHASE_S = 300, 1, 1, 3.0
HEAVY_CLIENTS = 16
FRAMES_A_SECOND = 20
CLIENTS = 8
"""That wait for an answer before they ask again: what the service can do at its best."""

OVERLOAD = 10
PATIENCE_S = 5.0
"""After which a client of the flood goes."""

MOST_UNDER_WAY = 900
"""Sockets; a client beyond them finds no connection."""

BATCHES = 1, 4, 16
PICTURE = 300
"""Pixels of a side."""

MEMORY_BAR, SLOWEST_BAR = 256.0, 1.0
"""MiB over the base, seconds."""
GOODPUT_BAR, CAMERA_BAR = 70.0, 20.0
"""Per cent of the peak, and of what p99 is alone."""


def measure(options: Options) -> Report:
    """Ask what nobody should, then far too much, and look at the camera meanwhile."""
    quick = options.quick
    files = _pictures(options.bundle)
    with started("--bundle", options.bundle) as service:
        fuzz = _fuzz(service, options.bundle, files[0], QUICK_FUZZED if quick else FUZZED)
    times = QUICK_HEAVY if quick else HEAVY_ROUNDS
    heavy = {}
    for clients in (1, HEAVY_CLIENTS):
        with started("--bundle", options.bundle) as service:
            heavy[clients] = _heavy(service, files[0], times * clients, clients)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    with contextlib.ExitStack() as stack:
        with _only_on(DEVICE):
            service = stack.enter_context(started("--bundle", options.bundle))
        seconds = QUICK_PHASE_S if quick else PHASE_S
        phases = [
            _round(options.bundle, service, files, seconds)
            for _ in tqdm(range(rounds), desc="flood", leave=False, disable=None)
        ]
    batches = _batches(options.bundle, QUICK_PHASE_S if quick else PHASE_S)
    return _report(fuzz, heavy, phases, batches)


def _pictures(path: Path) -> list[bytes]:
    """The golden samples as PNG files of a camera's cut-outs: larger than the model's input."""
    images = Bundle.open(path).golden()["images"]
    files = []
    for image in images:
        file = io.BytesIO()
        picture = Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0])
        picture.resize((PICTURE, PICTURE)).save(file, "PNG")
        files.append(file.getvalue())
    return files


# --- fuzzed and heavy requests


class Fuzz(NamedTuple):
    """What came of many requests."""

    requests: int
    statuses: dict[str, int]
    """``none`` where the service closed without an answer."""
    unanswered: int
    """Whole requests among those."""
    slowest_s: float
    base: int
    """Bytes of memory after some good requests."""
    peak: int
    alive: bool
    """Whether it answers a good request at the end."""


def _fuzz(service: Running, bundle: Path, file: bytes, requests: int) -> Fuzz:
    manifest = Bundle.open(bundle).manifest
    cases = (fuzzed(seed, manifest.name, manifest.input.shape) for seed in range(requests))
    bar = tqdm(cases, desc="fuzz", total=requests, leave=False, disable=None)
    return _ask_all(service, file, ((case.data, case.whole) for case in bar), 1)


def _heavy(service: Running, file: bytes, times: int, clients: int) -> Fuzz:
    """Bodies that are made to cost memory, from so many clients at a time."""
    data = heavy_requests()
    return _ask_all(service, file, ((one, True) for _ in range(times) for one in data), clients)


def _ask_all(
    service: Running, file: bytes, requests: Iterator[tuple[bytes, bool]], clients: int
) -> Fuzz:
    for _ in range(20):
        ask(service.url, "POST", "/classify", file)
    base = service.rss()
    statuses: Counter[str] = Counter()
    unanswered, slowest, count = 0, 0.0, 0
    with ThreadPoolExecutor(clients) as pool:
        while some := list(islice(requests, 8 * clients)):
            for status, whole, seconds in pool.map(lambda one: _timed(service.url, *one), some):
                statuses[str(status or "none")] += 1
                unanswered += status is None and whole
                slowest, count = max(slowest, seconds), count + 1
    alive = ask(service.url, "POST", "/classify", file).status == 200
    return Fuzz(
        count, dict(sorted(statuses.items())), unanswered, slowest, base, _peak(service), alive
    )


def _timed(url: str, data: bytes, whole: bool) -> tuple[int | None, bool, float]:
    begun = time.perf_counter()
    status = None
    with Client(url) as client, contextlib.suppress(OSError):  # it may have hung up by now
        client.send(data)
        if not whole:  # or the service would wait for the rest
            client.socket.shutdown(socket.SHUT_WR)
        status = client.status()
    return status, whole, time.perf_counter() - begun


def _peak(service: Running) -> int:
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(kib) * 1024


def heavy_requests() -> list[bytes]:
    """Requests that would take gigabytes where nothing bounds them."""
    room = 16 * MIB - 100
    infer = "/v2/models/solar/infer"
    bodies = [
        (infer, b'{"inputs":[' + b"{}," * (room // 3) + b"{}]}"),
        (infer, b'{"inputs":[' + b'{"name":"","shape":[],"datatype":""},' * (room // 37) + b"{}]}"),
        (infer, b'{"inputs":[],"x":[' + b"[]," * (room // 3) + b"[]]}"),
        (infer, b'{"inputs":[],"outputs":[' + b'{"name":""},' * (room // 12) + b"{}]}"),
        (infer, b'{"inputs":[{"name":"image","datatype":"UINT8","shape":[' + b"1," * (room // 2)
         + b"1]}]}"),
        (infer, b'{"inputs":[{"name":"image","datatype":"UINT8","shape":[64,160,160,1],"data":['
         + b"1," * (64 * 160 * 160 - 1) + b"1]}]}"),
        (infer, b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[64],"data":['
         + b'"",' * (room // 3) + b'""]}]}'),
        ("/classify", b"\0" * room),
    ]  # fmt: skip
    pictures = [
        # The largest of each kind that is taken, and far larger ones.
        ("L", (5120, 5120), "PNG"), ("RGB", (4570, 4570), "PNG"), ("RGB", (4570, 4570), "JPEG"),
        ("RGBA", (2640, 2640), "PNG"), ("P", (2150, 2150), "GIF"), ("1", (2150, 2150), "TIFF"),
        ("RGB", (2890, 2890), "WEBP"), ("RGB", (9000, 9000), "PNG"), ("L", (9400, 9400), "PNG"),
    ]  # fmt: skip
    for mode, size, kind in pictures:
        file = io.BytesIO()
        Image.new(mode, size).save(file, kind)
        bodies.append(("/classify", file.getvalue()))
    return [encode("POST", path, body) for path, body in bodies]


# --- the flood


CORES = sorted(os.sched_getaffinity(0))
DEVICE, ELSEWHERE = CORES[:-1] or CORES, CORES[-1:]
"""Cores of the service and the camera, and of the clients, which on a line are other machines."""


@contextlib.contextmanager
def _only_on(cores: Sequence[int]) -> Iterator[None]:
    """Processes that are started within run there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


GOODPUT_NOTE = (
    f"{PICTURE}-px PNG files to /classify; {CLIENTS} clients at the peak. Of the flood, what was "
    f"not answered was refused with 503, or lost: no connection or no answer within "
    f"{PATIENCE_S:g} s. Service and camera share {len(DEVICE)} of {len(CORES)} cores, the clients "
    "run on the last one. The service yields to everything else on the machine, so other work "
    "there (the load below) costs it answers."
)


class Load(NamedTuple):
    """What clients got in some seconds."""

    seconds: float
    sent: int
    answered: int
    """With 200."""
    refused: int
    """With 503."""
    lost: int
    """No answer in time, or a connection that ended without one."""

    @property
    def goodput(self) -> float:
        """Answers a second."""
        return self.answered / self.seconds

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.sent / self.seconds


class Round(NamedTuple):
    """The camera alone, beside clients that wait, and beside a flood: milliseconds of a frame."""

    quiet: list[float]
    busy: list[float]
    flooded: list[float]
    peak: Load
    flood: Load


def _round(bundle: Path, service: Running, files: Sequence[bytes], seconds: float) -> Round:
    with _only_on(DEVICE), _camera(bundle) as camera:
        quiet, _ = camera.beside(None, seconds)
        busy, peak = camera.beside([service.url, "closed", str(CLIENTS)], seconds)
        assert peak is not None
        rate = str(OVERLOAD * peak.goodput)
        flooded, flood = camera.beside([service.url, "open", rate], seconds)
        assert flood is not None
    return Round(quiet, busy, flooded, peak, flood)


class _Camera(NamedTuple):
    process: "subprocess.Popen[str]"
    bundle: Path

    def beside(self, load: list[str] | None, seconds: float) -> tuple[list[float], Load | None]:
        """Milliseconds of each frame while clients ask, and what those got."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        loading = None
        if load is not None:
            words = ["load", str(self.bundle), *load, str(seconds + 1)]
            with _only_on(ELSEWHERE):
                loading = subprocess.Popen(_command(words), stdout=subprocess.PIPE, text=True)
            assert loading.stdout is not None
            loading.stdout.readline()  # it has begun
        self.process.stdin.write(f"{int(seconds * FRAMES_A_SECOND)}\n")
        self.process.stdin.flush()
        times = json.loads(self.process.stdout.readline())
        if loading is None:
            return times, None
        said, _ = loading.communicate()
        return times, Load(*json.loads(said))


def _command(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "benchmarks.serving", *words]


@contextlib.contextmanager
def _camera(bundle: Path) -> Iterator[_Camera]:
    process = subprocess.Popen(
        _command(["camera", str(bundle)]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()  # it is open
        yield _Camera(process, bundle)
    finally:
        process.kill()
        process.communicate()


def run_camera(bundle: Path) -> None:
    """For each number on stdin, so many frames at a fixed rate; their milliseconds on stdout."""
    files = _pictures(bundle)
    with Classifier.open(bundle, threads=1) as classifier:
        for _ in range(50):
            classifier(files[0])
        print(flush=True)
        for line in sys.stdin:
            due = time.perf_counter()
            times = []
            for number in range(int(line)):
                due += 1 / FRAMES_A_SECOND
                time.sleep(max(0.0, due - time.perf_counter()))
                # From when the frame is there, not from when this process comes to it.
                classifier(files[number % len(files)])
                times.append((time.perf_counter() - due) * 1e3)
            print(json.dumps(times), flush=True)


def run_load(bundle: Path, url: str, kind: str, number: float, seconds: float) -> None:
    """Clients in one cheap thread; a Load on stdout, as JSON.

    ``closed``: so many clients, each asks again when it has its answer. ``open``: so many requests
    a second, whatever becomes of them, each on a connection of its own.
    """
    load = _Clients(url, [encode("POST", "/classify", file) for file in _pictures(bundle)])
    print(flush=True)
    load.run(kind, number, seconds)
    print(json.dumps(load.result(seconds)))


class _Clients:
    """Requests under way, each on a socket that does not block."""

    def __init__(self, url: str, requests: Sequence[bytes]) -> None:
        parts = urlsplit(url)
        self._where = (parts.hostname, parts.port)
        self._requests = requests
        self._selector = selectors.EpollSelector()
        self._under_way: dict[socket.socket, float] = {}
        self._sent = self._answered = self._refused = self._lost = 0

    def run(self, kind: str, number: float, seconds: float) -> None:
        """Ask for so many seconds."""
        begun = time.perf_counter()
        end = begun + seconds
        while (now := time.perf_counter()) < end:
            if kind == "closed":
                due = int(number) - len(self._under_way)
            else:
                due = int((now - begun) * number) - self._sent
            for _ in range(due):
                self._ask(now)
            self._collect(0.002)
            self._give_up(now)

    def result(self, seconds: float) -> Load:
        """What came of it; requests that are under way count as nothing."""
        return Load(seconds, self._sent, self._answered, self._refused, self._lost)

    def _ask(self, now: float) -> None:
        self._sent += 1
        if len(self._under_way) == MOST_UNDER_WAY:
            self._lost += 1
            return
        client = socket.socket()
        client.setblocking(False)
        if client.connect_ex(self._where) not in (0, errno.EINPROGRESS):
            self._lost += 1
            client.close()
            return
        self._under_way[client] = now
        self._selector.register(client, selectors.EVENT_WRITE, 0)

    def _collect(self, wait: float) -> None:
        for key, _ in self._selector.select(wait):
            client = key.fileobj
            assert isinstance(client, socket.socket)
            try:
                if key.events == selectors.EVENT_WRITE:
                    request = self._requests[self._sent % len(self._requests)]
                    # Loopback's buffer takes a request of this size whole.
                    client.send(request)
                    self._selector.modify(client, selectors.EVENT_READ)
                    continue
                status = client.recv(4096)[9:12]
            except OSError:
                status = b""
            self._answered += status == b"200"
            self._refused += status == b"503"
            self._lost += status not in (b"200", b"503")
            self._end(client)

    def _give_up(self, now: float) -> None:
        late = [one for one, begun in self._under_way.items() if now - begun > PATIENCE_S]
        for client in late:
            self._lost += 1
            self._end(client)

    def _end(self, client: socket.socket) -> None:
        self._selector.unregister(client)
        del self._under_way[client]
        client.close()


# --- batches


def _batches(path: Path, seconds: float) -> dict[int, Spread]:
    """Milliseconds of CPU for one image in batches of several sizes, on one thread."""
    with Classifier.open(path, threads=1) as classifier:
        infer, shape = classifier.engine.infer, classifier.engine.shape
        images = np.random.default_rng(0).integers(0, 256, (max(BATCHES), *shape), dtype=np.uint8)
        calls = {str(count): functools.partial(infer, images[:count]) for count in BATCHES}
        times = interleave(calls, seconds=seconds)
    return {count: spread(times[str(count)].cpu, scale=1e3 / count) for count in BATCHES}


# --- the report


def _report(
    fuzz: Fuzz, heavy: dict[int, Fuzz], rounds: Sequence[Round], batches: dict[int, Spread]
) -> Report:
    everything = [fuzz, *heavy.values()]
    alone = [time for one in rounds for time in one.quiet]
    flooded = [time for one in rounds for time in one.flooded]
    growth = 100 * (_percentile(flooded, 99) / _percentile(alone, 99) - 1)
    bars = (
        at_most("HTTP, fuzzed and heavy: services that died",
                sum(not f.alive for f in everything), 0),
        at_most("HTTP, fuzzed and heavy: answers of 500",
                sum(f.statuses.get("500", 0) for f in everything), 0),
        at_most("HTTP, fuzzed and heavy: memory over base",
                max(f.peak - f.base for f in everything) / MIB, MEMORY_BAR, " MiB"),
        at_most("HTTP, fuzzed: slowest answer", fuzz.slowest_s, SLOWEST_BAR, " s"),
        at_most("HTTP, heavy, one at a time: slowest answer", heavy[1].slowest_s, SLOWEST_BAR,
                " s"),
        at_least(f"HTTP flood of {OVERLOAD} times the peak: goodput",
                 spread(100 * r.flood.goodput / r.peak.goodput for r in rounds), GOODPUT_BAR, " %"),
        at_most("camera beside that flood: growth of p99", growth, CAMERA_BAR, " %"),
    )  # fmt: skip
    return Report(
        title="A service that clients ask for anything, and for far too much",
        bars=bars,
        tables=(
            _anything(fuzz, heavy),
            _goodput(rounds),
            _camera_table(rounds),
            _batch_table(batches),
        ),
        figures={
            "fuzz": fuzz._asdict(),
            "batches": {str(count): one for count, one in batches.items()},
            "heavy": {str(clients): one._asdict() for clients, one in heavy.items()},
            "rounds": [
                {
                    "peak": one.peak._asdict(),
                    "flood": one.flood._asdict(),
                    "camera": {
                        name: {"p50": _percentile(times, 50), "p99": _percentile(times, 99)}
                        for name, times in _times(one).items()
                    },
                }
                for one in rounds
            ],
        },
    )


def _anything(fuzz: Fuzz, heavy: dict[int, Fuzz]) -> Table:
    def row(name: str, one: Fuzz) -> tuple[str, ...]:
        server_errors = sum(n for status, n in one.statuses.items() if status == "500")
        return (
            name, f"{one.requests:,}", "0" if one.alive else "1", str(server_errors),
            str(one.unanswered), f"{one.slowest_s:.2f} s",
            f"{(one.peak - one.base) / MIB:.0f} MiB", f"{one.base / MIB:.0f} MiB",
        )  # fmt: skip

    def statuses(one: Fuzz) -> str:
        return ", ".join(f"{n:,} x {status}" for status, n in one.statuses.items())

    return Table(
        title="Anything",
        columns=(
            "requests", "count", "crashes", "500", "whole ones unanswered", "slowest",
            "memory over base", "base",
        ),
        rows=(
            row("fuzzed", fuzz),
            row("heavy, one at a time", heavy[1]),
            row(f"heavy, {HEAVY_CLIENTS} at a time", heavy[HEAVY_CLIENTS]),
        ),
        notes=(
            f"Fuzzed: {statuses(fuzz)}. Heavy, one at a time: {statuses(heavy[1])}; "
            f"{HEAVY_CLIENTS} at a time: {statuses(heavy[HEAVY_CLIENTS])}.",
            "`none` are requests that were no HTTP or ended in the middle. Base is the memory "
            "after some good requests; over it, the highest that there ever was (VmHWM).",
        ),
    )  # fmt: skip


def _goodput(rounds: Sequence[Round]) -> Table:
    rows = [
        (
            "clients that wait (peak)",
            str(spread(r.peak.rate for r in rounds)),
            str(spread(r.peak.goodput for r in rounds)),
            "", str(sum(r.peak.lost for r in rounds)),
        ),
        (
            f"flood, asked for {OVERLOAD} times the peak",
            str(spread(r.flood.rate for r in rounds)),
            str(spread(r.flood.goodput for r in rounds)),
            str(spread(100 * r.flood.goodput / r.peak.goodput for r in rounds)),
            str(sum(r.flood.lost for r in rounds)),
        ),
    ]  # fmt: skip
    return Table(
        title="Goodput",
        columns=("load", "requests/s", "answers/s", "% of peak", "lost"),
        rows=tuple(rows),
        notes=(GOODPUT_NOTE,),
    )


def _camera_table(rounds: Sequence[Round]) -> Table:
    rows = []
    for name in _times(rounds[0]):
        p50s = [_percentile(_times(one)[name], 50) for one in rounds]
        p99s = [_percentile(_times(one)[name], 99) for one in rounds]
        pooled = [time for one in rounds for time in _times(one)[name]]
        alone = [time for one in rounds for time in one.quiet]
        growth = 100 * (_percentile(pooled, 99) / _percentile(alone, 99) - 1)
        rows.append((
            name, str(spread(p50s)), str(spread(p99s)), f"{_percentile(pooled, 99):.1f}",
            "" if name == "alone" else f"{growth:+.0f} %",
        ))  # fmt: skip
    frames = sum(len(one.quiet) for one in rounds)
    return Table(
        title="The camera beside it",
        columns=("camera", "p50, ms", "p99, ms", "p99 of all rounds, ms", "growth"),
        rows=tuple(rows),
        notes=(
            f"{FRAMES_A_SECOND} frames a second, {PICTURE}-px PNG to answer, from when a frame is "
            f"there; {frames:,} frames of each kind, in {len(rounds)} rounds that take turns.",
        ),
    )


def _batch_table(batches: dict[int, Spread]) -> Table:
    return Table(
        title="What an image costs in company",
        columns=("images in a call", "CPU ms of each"),
        rows=tuple((str(count), str(one)) for count, one in batches.items()),
        notes=("The engine alone, on one thread of the CPU.",),
    )


def _times(one: Round) -> dict[str, list[float]]:
    return {
        "alone": one.quiet, "beside clients that wait": one.busy, "beside the flood": one.flooded
    }  # fmt: skip


def _percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(np.array(values), percent))


def _main(words: Sequence[str]) -> None:
    bundle = Path(words[1])
    if words[0] == "camera":
        run_camera(bundle)
    else:
        url, kind, number, seconds = words[2:]
        run_load(bundle, url, kind, float(number), float(seconds))


if __name__ == "__main__":
    _main(sys.argv[1:])
