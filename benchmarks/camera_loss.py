"""Cameras that vanish or hang and come back: how soon is it noticed, how soon are frames there?

Aravis' fake GigE Vision camera and a web camera that plays a file, each in a process of its own,
are killed (nobody is told, as when a cable is pulled) or stopped (connections stay open), and come
back a random while later. Times are those at which the line gets to know: from the kill to the
frame that says so, and from the camera's return to the first good frame.
"""

import contextlib
import queue
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.harness import Options, Report, Table
from runtime.sources import open_source
from runtime.sources.frame import Frame, Source

LONG = True

CYCLES, QUICK_CYCLES = 100, 2
NOTICED_S, BACK_S = 1.0, 10.0
"""The bars; at 25 frames a second two periods are less than a second."""

_GONE_S = 2.0
"""The camera is away for a random time up to this one."""

_PATIENCE_S = 120.0


class Cycle(NamedTuple):
    """One loss and return, in seconds."""

    noticed_s: float
    back_s: float


class Series(NamedTuple):
    """The cycles of one camera and one way to lose it."""

    title: str
    cycles: list[Cycle]


def measure(options: Options) -> Report:
    """Lose each camera again and again. Raises DataError where libaravis is missing."""
    from tests.cameras import GigECamera, WebCamera, write_video

    count = QUICK_CYCLES if options.quick else CYCLES
    with tempfile.TemporaryDirectory(prefix="camera-loss-") as folder:
        video = write_video(Path(folder) / "numbers.avi", 100)
        with GigECamera() as camera:
            series = [lose("GigE Vision, killed", camera.source, count, camera.vanish, camera.come)]
        for title, hangs in (("web camera, killed", False), ("web camera, hangs", True)):
            with WebCamera(video) as camera:
                go, come = (camera.hang, camera.go_on) if hangs else (camera.vanish, camera.come)
                series.append(lose(title, camera.source, count, go, come))
    return _report(series)


def lose(
    title: str,
    text: str,
    count: int,
    go: Callable[[], None],
    come: Callable[[], None],
) -> Series:
    """``count`` losses and returns of the camera that ``text`` names, by ``go`` and ``come``."""
    chance = random.Random(7)
    cycles = []
    with _reading(open_source(text, state=Path("/nowhere"))) as frames:
        for _ in tqdm(range(count), desc=title, leave=False, disable=None):
            _good(frames, 10)
            time.sleep(chance.uniform(0, 0.1))  # anywhere between two frames
            went = time.monotonic()
            go()
            noticed = _next(frames, lambda frame: frame.fault.startswith("camera lost"))
            time.sleep(chance.uniform(0, _GONE_S))
            come()
            came = time.monotonic()
            back = _next(frames, lambda frame: frame.image is not None)
            cycles.append(Cycle(noticed.at - went, back.at - came))
    return Series(title, cycles)


class Got(NamedTuple):
    """A frame, and when the line had it."""

    at: float
    frame: Frame


@contextlib.contextmanager
def _reading(source: Source) -> Iterator["queue.Queue[Got]"]:
    frames: queue.Queue[Got] = queue.Queue()

    def read() -> None:
        for frame in source:
            frames.put(Got(time.monotonic(), frame))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield frames
    finally:
        source.close()
        thread.join()


def _next(frames: "queue.Queue[Got]", wanted: Callable[[Frame], object]) -> Got:
    while True:
        got = frames.get(timeout=_PATIENCE_S)
        if wanted(got.frame):
            return got


def _good(frames: "queue.Queue[Got]", count: int) -> None:
    for _ in range(count):
        _next(frames, lambda frame: frame.image is not None)
    while not frames.empty():
        frames.get()


# --- the report


def _report(series: list[Series]) -> Report:
    rows = []
    for one in series:
        noticed = sorted(cycle.noticed_s for cycle in one.cycles)
        back = sorted(cycle.back_s for cycle in one.cycles)
        middle = len(one.cycles) // 2
        rows.append(
            (
                one.title,
                str(len(one.cycles)),
                f"{noticed[middle]:.2f}", f"{noticed[-1]:.2f}", str(_over(noticed, NOTICED_S)),
                f"{back[middle]:.2f}", f"{back[-1]:.2f}", str(_over(back, BACK_S)),
            )
        )  # fmt: skip
    notes = (
        f"Noticed: from the loss to the frame that tells of it; the bar is {NOTICED_S:g} s. Back: "
        "from the camera's return to the first good frame that the line gets; the bar is "
        f"{BACK_S:g} s. Both include the start of a Python process, on whatever else this machine "
        "did.",
        "The cameras send 25 frames a second over loopback. No real cable was pulled, and no "
        "driver of a frame grabber was there to hang.",
    )
    return Report(
        title="Cameras that vanish and come back",
        tables=(
            Table(
                title="Loss and return",
                columns=(
                    "", "cycles", "noticed, median s", "longest s", "misses",
                    "back, median s", "longest s", "misses",
                ),
                rows=tuple(rows),
                notes=notes,
            ),
        ),
        figures={
            one.title: {
                "noticed_s": [cycle.noticed_s for cycle in one.cycles],
                "back_s": [cycle.back_s for cycle in one.cycles],
                "noticed_misses": _over([cycle.noticed_s for cycle in one.cycles], NOTICED_S),
                "back_misses": _over([cycle.back_s for cycle in one.cycles], BACK_S),
            }
            for one in series
        },
    )  # fmt: skip


def _over(values: list[float], bar: float) -> int:
    return sum(value > bar for value in values)
