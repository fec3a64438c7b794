"""What the loop of the line tells its status page: one file a second, and a ring of thumbnails.

The loop writes, a process of its own reads; they share a folder and nothing else. A file says when
it was written by the clock that no clock change moves, so that a loop that died never looks alive.
Nothing here is worth an fsync: a second later it is replaced, and after a power cut it is of an
earlier start of the machine, which is seen. It judges nothing and knows no HTTP.
"""

import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from runtime import machine
from runtime.line.page.tally import FlagCount, Minute, Tally
from runtime.line.page.thumbnails import RecentFrame, Thumbnails
from runtime.line.verdict import Finding, Word

UInt8 = npt.NDArray[np.uint8]

SNAPSHOT, METRICS, PICTURES = "snapshot.json", "metrics.prom", "thumbnails"

EVERY_S = 1.0

MAX_BYTES = 1024 * 1024

Phase = Literal["starting", "inspecting", "stopped"]


def board_folder(state: Path) -> Path:
    """Where the line of a state folder publishes, and its page looks."""
    return state / "page"


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """What runs the bundle."""

    name: str
    """``str(classifier.engine)``."""
    reasons: tuple[str, ...] = ()
    """``classifier.reasons``: a sentence for each candidate."""
    degraded: str = ""
    """Why a faster engine that should run here does not; empty if it does."""


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """The bundle that answers."""

    name: str
    version: str
    slot: str = ""
    """SHA-256 of its archive; empty if it is not in a slot."""
    trial: str = ""
    """A sentence while a slot is on trial; empty otherwise."""
    adaptation: str
    """``str(classifier.adaptation)``."""
    verified: bool
    ok_labels: tuple[str, ...] = ()


class Camera(msgspec.Struct, frozen=True, kw_only=True):
    """One source of frames."""

    name: str
    kind: str = ""
    """What it is, e.g. ``camera``, ``folder``; shown in small print."""
    age_s: float | None = None
    """Since its newest frame; None if it never gave one."""
    fault: str = ""
    """Why there are no frames now; empty if all is well."""
    dropped: int = 0
    """Frames lost because the line was behind, since it was started."""


class Spread(NamedTuple):
    """Milliseconds of the last frames."""

    p50: float
    p90: float
    p99: float


class Heat(msgspec.Struct, frozen=True, kw_only=True):
    """How warm the machine is, and what that costs."""

    zones: dict[str, float] = {}
    """Degrees Celsius by zone, hottest first."""
    limit_c: float | None = None
    throttling: tuple[str, ...] = ()
    """What the kernel slows down now."""
    share: float = 1.0
    """Of its time that the line works."""
    reason: str = ""
    """Why it is less than all."""


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """The last whole window of one test against the bundle's reference."""

    of: str
    """What was tested: scores, or a feature."""
    p_value: float
    alpha: float
    """Below it the window drifted; corrected for the number of tests."""
    drifted: bool
    window: int
    """Answers that it is of."""
    sentence: str = ""


class Outbox(msgspec.Struct, frozen=True, kw_only=True):
    """Verdicts on their way out."""

    rows: int = 0
    """That wait."""
    bytes: int = 0
    sent: int = 0
    dropped: int = 0
    """Went unsent because the outbox was full."""
    unkept: int = 0
    """Could not be written at all."""
    refused: int = 0
    """That no broker will ever take."""
    to: str = ""
    """Where they are sent; empty if nowhere."""
    fault: str = ""
    """Why they are not sent now; empty if they are."""


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """The file system below a folder of ours, in bytes."""

    path: str
    free: int
    total: int


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """What the device knows of its repository."""

    expires: dict[str, datetime.datetime] = {}
    """By role of the signed metadata."""
    outcome: str = ""
    failed: bool = False


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """Frames that are kept for training."""

    kept: int = 0
    bytes: int = 0
    limit_bytes: int = 0
    refused: dict[str, int] = {}
    """How often a frame was not kept, by why."""


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """What the loop alone knows. Absent is unknown, and shown as that, never as fine."""

    device: str
    """Its name for people."""
    fieldfit: str
    phase: Phase = "inspecting"
    said: str = ""
    """What it does at the start, or why it stopped."""
    started: datetime.datetime
    machine: str = ""
    """Board or computer, as its firmware names it."""
    model: Model | None = None
    engine: Engine | None = None
    cameras: tuple[Camera, ...] = ()
    stages: dict[str, Spread] = {}
    """What a frame waits for, in order; the last is all of it."""
    heat: Heat | None = None
    drift: tuple[Drift, ...] | None = None
    """None if the bundle has no reference; empty until the first window is whole."""
    drift_fill: float = 0.0
    """How full the window is that is being filled, 0 to 1."""
    outbox: Outbox | None = None
    disks: tuple[Disk, ...] = ()
    update: Update | None = None
    evidence: Evidence | None = None


class Snapshot(Condition, frozen=True, kw_only=True):
    """All that a page shows: the loop's condition, and what its verdicts add up to."""

    time: datetime.datetime
    monotonic: float
    boot: str
    """The kernel's boot id: ``monotonic`` of another start says nothing."""
    strip: tuple[tuple[int, Word], ...]
    """The newest frames, oldest first: a running number that has no gaps, and the verdict."""
    verdicts: dict[Word, int]
    """Since the start."""
    labels: dict[str, int]
    """Of defects, since the start."""
    minutes: tuple[Minute, ...]
    """The last hour, oldest first; minutes without a frame are there too."""
    per_second: float
    """Frames, over the last ten seconds."""
    rates: dict[str, float]
    """The same for each source."""
    last_minute: int
    """Frames."""
    flags: tuple[FlagCount, ...]
    recent: tuple[RecentFrame, ...]
    """Newest first, whatever the verdict."""
    notable: tuple[RecentFrame, ...]
    """Newest first, those that were not OK: a busy line does not push them out."""


class Absent(NamedTuple):
    """There is nothing to show."""

    reason: str


class Board:
    """Where the loop of the line puts up how it stands. It serves one thread.

    ``judged`` is called for each frame and costs microseconds, or a millisecond where the frame is
    shown. Raises OSError where the folder cannot be written; that is no reason to stop inspecting.
    """

    def __init__(
        self,
        folder: Path,
        *,
        ring: int = 12,
        per_second: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._clock = folder, clock
        folder.mkdir(parents=True, exist_ok=True)
        self._tally = Tally(clock)
        self._thumbnails = Thumbnails(folder / PICTURES, ring, per_second, clock)
        self._boot = machine.boot_id()
        self._due = float("-inf")

    @property
    def due(self) -> bool:
        """Whether a second has gone by: before that there is no need to make a condition."""
        return self._clock() >= self._due

    def judged(self, said: Finding, image: UInt8 | None) -> None:
        """Count ``said``, and show ``image``, uint8 [H, W], [H, W, 1] or [H, W, 3], if it may."""
        self._tally.add(said)
        self._thumbnails.offer(said, image)

    def publish(self, condition: Condition, metrics: str = "") -> None:
        """Put up ``condition``, all verdicts so far, and ``metrics`` in Prometheus' format."""
        self._due = self._clock() + EVERY_S
        shown = self._thumbnails
        shown.settle()
        snapshot = Snapshot(
            **msgspec.structs.asdict(condition),
            time=datetime.datetime.now(datetime.timezone.utc),
            monotonic=time.monotonic(),
            boot=self._boot,
            recent=tuple(shown.recent),
            notable=tuple(shown.notable),
            **self._tally.totals(),
        )
        _replace(self._folder / METRICS, metrics.encode())
        _replace(self._folder / SNAPSHOT, msgspec.json.encode(snapshot))


def read(folder: Path) -> Snapshot | Absent:
    """What was published last, or why there is nothing."""
    path = folder / SNAPSHOT
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return Absent("No inspection has run with this state folder yet.")
    except OSError as error:
        return Absent(f"{path}: cannot be read: {error.strerror}")
    if len(data) > MAX_BYTES:
        return Absent(f"{path}: expected at most {MAX_BYTES:,} bytes")
    try:
        return msgspec.json.decode(data, type=Snapshot)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Absent(f"{path}: is damaged, or of another fieldfit: {error}")


def age_s(snapshot: Snapshot) -> float | None:
    """Seconds since it was written; None if the machine was started again meanwhile."""
    if snapshot.boot != machine.boot_id():
        return None
    return max(0.0, time.monotonic() - snapshot.monotonic)


def _replace(path: Path, data: bytes) -> None:
    """As ``atomic.write_bytes``, but what is gone in a second need not outlive a power cut."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    temporary.replace(path)
