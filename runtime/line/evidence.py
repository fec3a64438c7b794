"""Evidence: which frames are worth a look or a label later, and keeping those beside the loop.

What is worth it is decided here from what the loop knows of a frame; where it lies is
``evidence_folder``'s business. The loop pays for a decision and a copy; encoding and the disk
belong to a thread of its own. Only images that a rule names are kept. Nothing here raises into the
loop: what was not kept is counted by its reason.
"""

import errno
import io
import logging
import queue
import random
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from runtime.classifier import Answer
from runtime.evidence_pack import MAX_IMAGE_BYTES, REASONS, Reason, Record, short
from runtime.exposition import metric
from runtime.line.evidence_folder import Caps, EvidenceFolder, NoRoomError
from runtime.line.inspection import Inspected, iso
from runtime.line.verdict import Finding
from runtime.preprocess import FORMATS, ImageLike, decode
from runtime.sources.frame import Frame

_log = logging.getLogger(__name__)

UInt8 = npt.NDArray[np.uint8]

Refusal = Literal["no reason", "too many", "seen before", "too large", "busy", "no room", "failed"]
Outcome = Literal["taken"] | Refusal

ROOM = 8
"""Images that wait for the disk at most; each may have some megabytes."""

BURST_S = 2.0
"""Frames of one source that follow each other this closely may show the same part."""

SAME_LEVELS = 4.0
"""Two frames are the same if no block of 16 x 16 differs by more, in 8-bit levels: above the noise
that is left in a block's mean, below what a visible fault of a block's size changes."""

_BLOCKS = 16
_REMEMBERED = 64
_STOP_S = 5.0
_FULL = {errno.ENOSPC, errno.EDQUOT}
_SUFFIXES = {
    "BMP": ".bmp", "DIB": ".dib", "GIF": ".gif", "JPEG": ".jpg", "JPEG2000": ".jp2", "MPO": ".jpg",
    "PNG": ".png", "PPM": ".ppm", "TIFF": ".tif", "WEBP": ".webp",
}  # fmt: skip
"""By the format as Pillow calls it; a JPEG with a second picture is an MPO to it."""


class Rules(NamedTuple):
    """What makes an image evidence, beside what the model and the health checks say of it."""

    margin: float = 0.2
    """The best two probabilities are closer than this."""
    sample_every: int = 1000
    """One in so many images is kept without any other reason, at random: a fixed step could fall
    into step with the machine. 0 keeps none."""


def reasons(
    answer: Answer, flags: Sequence[str], rules: Rules, *, drifts: bool, drawn: bool
) -> tuple[Reason, ...]:
    """Why an image that was answered so, and flagged so, is worth keeping; empty if it is not."""
    second, first = sorted(answer.probabilities.values())[-2:]
    holds: dict[Reason, bool] = {
        "flagged": bool(flags),
        "abstained": answer.abstained,
        "low-margin": first - second < rules.margin,
        "drifted": drifts,
        "sample": drawn,
    }
    return tuple(reason for reason in REASONS if holds[reason])


class Rates:
    """How many images of each reason were taken within the last minute, hour and day."""

    def __init__(self, caps: Caps) -> None:
        self._limits = ((60.0, caps.per_minute), (3600.0, caps.per_hour), (86400.0, caps.per_day))
        most = max(cap for _, cap in self._limits)
        self._times: defaultdict[Reason, deque[float]] = defaultdict(lambda: deque(maxlen=most))

    def room(self, reason: Reason, now: float) -> bool:
        """Whether one more may be taken."""
        times = self._times[reason]
        return all(
            cap > 0 and (len(times) < cap or times[-cap] <= now - span)
            for span, cap in self._limits
        )

    def take(self, reason: Reason, at: float) -> None:
        """One was taken; calls come in the order of time."""
        self._times[reason].append(at)


class _Task(NamedTuple):
    """An image on its way to the disk."""

    image: bytes | Image.Image | npt.NDArray[Any]
    why: Reason
    describe: Callable[[str, str, int], Record]


class Evidence:
    """Keeps what is worth it of the frames that it is told of, below ``folder``.

    ``drifts`` says whether scores or features drift at the moment. It hangs on the loop, and serves
    one loop. ``clock`` is monotonic, ``now`` since the epoch, both in seconds; ``draw`` gives
    numbers from 0 to 1.
    """

    def __init__(
        self,
        folder: Path,
        caps: Caps = Caps(),  # noqa: B008  (frozen)
        rules: Rules = Rules(),  # noqa: B008  (frozen)
        *,
        drifts: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._path, self.caps, self._rules = folder, caps, rules
        self._drifts, self._clock, self._draw = drifts, clock, draw
        self._rates = Rates(caps)
        self._seen = np.full((_REMEMBERED, _BLOCKS, _BLOCKS), np.inf, np.float32)
        self._seen_next = 0
        self._bursts: dict[str, tuple[float, str]] = {}
        self._lock = threading.Lock()
        self.taken: Counter[Reason] = Counter()
        """Taken since the start, by the reason that each is counted under."""
        self.refused: Counter[Refusal] = Counter()
        """Not kept since the start, by why; that a frame gave no reason is not counted."""
        self._folder: EvidenceFolder | None = None
        self.held: dict[Reason, int] = {}
        """Images in the folder, by reason; replaced as a whole."""
        self.size = 0
        """Bytes on disk of them and their records."""
        self.evicted: dict[Reason, int] = {}
        """What gave way to newer evidence since the start; replaced as a whole."""
        self._told: set[str] = set()
        self._open(now())
        self._tasks: queue.Queue[_Task | None] = queue.Queue(ROOM)
        self._thread = threading.Thread(target=self._write, daemon=True, name="evidence")
        self._thread.start()

    # --- in the loop

    def judged(self, frame: Frame, inspected: Inspected, said: Finding) -> None:
        """What hangs on the loop is told this of every frame."""
        self.offer(frame, inspected)

    def tick(self) -> None:
        """There is nothing to do between frames."""

    def offer(self, frame: Frame, inspected: Inspected) -> Outcome:
        """Take ``frame`` if a rule asks for it and a cap allows it. Raises nothing."""
        try:
            outcome = self._offer(frame, inspected)
        except Exception as error:  # evidence must never stop a line
            self._tell(error)
            outcome = "failed"
        if outcome != "taken" and outcome != "no reason":
            self._count(outcome)
        return outcome

    def _offer(self, frame: Frame, inspected: Inspected) -> Outcome:
        seen = inspected.seen
        if frame.image is None or seen is None or inspected.fault:
            return "no reason"
        every = self._rules.sample_every
        drawn = every > 0 and self._draw() * every < 1
        finding, answer = inspected.finding, seen.answer
        why = reasons(answer, finding.flags, self._rules, drifts=self._drifts(), drawn=drawn)
        if not why:
            return "no reason"
        now = self._clock()
        open_ = [reason for reason in why if self._rates.room(reason, now)]
        if not open_:
            return "too many"
        blocks = block_means(seen.image)
        if np.abs(self._seen - blocks).max(axis=(1, 2)).min() <= SAME_LEVELS:
            return "seen before"
        image = _own(frame.image)
        if image is None:
            return "too large"
        # The rarest, so that a frame with several reasons leaves the common one's places free.
        reason = min(open_, key=lambda r: self.taken[r])
        burst = self._burst(frame)
        digest = seen.by.bundle.manifest.digest
        task = _Task(image, reason, _describe(finding, answer, digest, reason, why, burst))
        try:
            self._tasks.put_nowait(task)
        except queue.Full:
            return "busy"
        self._rates.take(reason, now)
        self._seen[self._seen_next % _REMEMBERED] = blocks
        self._seen_next += 1
        with self._lock:
            self.taken[reason] += 1
        return "taken"

    def _burst(self, frame: Frame) -> str:
        last, burst = self._bursts.get(frame.source, (float("-inf"), ""))
        if not 0 <= frame.monotonic - last < BURST_S:
            burst = iso(frame.time)
        self._bursts[frame.source] = frame.monotonic, burst
        return burst

    # --- beside the loop

    def _write(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                refusal = self._keep(task)
            except NoRoomError:
                refusal = "no room"
            except OSError as error:
                self._tell(error)
                refusal = "no room" if error.errno in _FULL else "failed"
            except Exception as error:  # of any image library
                self._tell(error)
                refusal = "failed"
            if refusal is not None:
                self._count(refusal)
            self._look()
            self._tasks.task_done()

    def _look(self) -> None:
        if self._folder is not None:
            self.held, self.evicted = dict(self._folder.counts), dict(self._folder.evicted)
            self.size = self._folder.size

    def _keep(self, task: _Task) -> Refusal | None:
        data = _encoded(task.image)
        if len(data) > MAX_IMAGE_BYTES:
            return "too large"
        if self._folder is None:
            self._folder = EvidenceFolder(self._path, self.caps)
        if self._folder.has(data):
            return "seen before"
        suffix = _suffix(data)
        self._folder.add(
            data, suffix, task.why, lambda name, sha: task.describe(name, sha, len(data))
        )
        return None

    def _open(self, now: float) -> None:
        """What is there already counts towards the caps of the last day."""
        try:
            self._folder = EvidenceFolder(self._path, self.caps)
            ages = self._folder.ages(now)
        except OSError as error:
            self._tell(error)
            return
        self._look()
        start = self._clock()
        for reason, age in sorted(ages, key=lambda one: -one[1]):
            self._rates.take(reason, start - max(0.0, age))

    def close(self) -> None:
        """Keep what still waits, within seconds, and end."""
        try:
            self._tasks.put(None, timeout=_STOP_S)
        except queue.Full:  # a disk that hangs must not hold up the end
            return
        self._thread.join(_STOP_S)

    # --- what became of it

    def metrics(self) -> str:
        """In the words of Prometheus."""
        with self._lock:
            taken, refused = dict(self.taken), dict(self.refused)
        held, evicted = self.held, self.evicted
        return "".join(
            [
                metric(
                    "evidence_images", "gauge", "Images of evidence on this device, by reason.",
                    [({"reason": r}, held.get(r, 0)) for r in REASONS],
                ),
                metric(
                    "evidence_taken_total", "counter", "Images taken as evidence, by reason.",
                    [({"reason": r}, taken.get(r, 0)) for r in REASONS],
                ),
                metric(
                    "evidence_evicted_total", "counter", "Images that gave way to newer ones.",
                    [({"reason": r}, evicted.get(r, 0)) for r in REASONS],
                ),
                metric(
                    "evidence_refused_total", "counter", "Images with a reason, not kept, by why.",
                    [({"why": w}, refused.get(w, 0)) for w in get_args(Refusal)[1:]],
                ),
            ]
        )  # fmt: skip

    def refusals(self) -> dict[str, int]:
        """How many images with a reason were not kept since the start, by why."""
        with self._lock:
            return {str(why): count for why, count in self.refused.items()}

    def _count(self, refusal: Refusal) -> None:
        with self._lock:
            self.refused[refusal] += 1

    def _tell(self, error: Exception) -> None:
        """Each kind of trouble once: it may come with every frame."""
        kind = f"{type(error).__name__} {getattr(error, 'errno', '')}"
        if kind not in self._told:
            self._told.add(kind)
            _log.warning("evidence: %s: %s (told once)", type(error).__name__, error)


def block_means(image: UInt8) -> npt.NDArray[np.float32]:
    """Mean levels float32 ``[16, 16]`` of an image uint8 ``[H, W, C]``, H and W at least 16."""
    height, width = (side - side % _BLOCKS for side in image.shape[:2])
    blocks = image[:height, :width].reshape(
        _BLOCKS, height // _BLOCKS, _BLOCKS, width // _BLOCKS, -1
    )
    return np.asarray(blocks.mean(axis=(1, 3, 4), dtype=np.float32))


def _own(image: ImageLike) -> bytes | Image.Image | npt.NDArray[Any] | None:
    """``image`` so that nobody changes it any more; None if it is too large.

    A file is read now: its source may move it as soon as the verdict is kept.
    """
    if isinstance(image, str | Path):
        with Path(image).open("rb") as file:
            image = file.read(MAX_IMAGE_BYTES + 1)
    if isinstance(image, bytes):
        return image if len(image) <= MAX_IMAGE_BYTES else None
    return image.copy()


def _encoded(image: bytes | Image.Image | npt.NDArray[Any]) -> bytes:
    """The bytes as they came, or a lossless PNG; 16-bit colour, which PNG writers lack, in 8."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray):
        levels = image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image
        deep_colour = levels.ndim == 3 and levels.dtype == np.uint16
        image = decode(levels) if deep_colour else Image.fromarray(levels)
    elif image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = decode(image)
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _suffix(data: bytes) -> str:
    with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
        return _SUFFIXES[picture.format or ""]


def _describe(
    finding: Finding, answer: Answer, digest: str, why: Reason, held: tuple[Reason, ...],
    burst: str,
) -> Callable[[str, str, int], Record]:  # fmt: skip
    def describe(name: str, sha256: str, size: int) -> Record:
        return Record(
            image=name, sha256=sha256, size=size, why=why, reasons=held, time=finding.time,
            source=short(finding.source), frame=short(finding.frame), burst=burst,
            verdict=finding.verdict, said=short(finding.reason), label=finding.label,
            score=finding.score, probabilities=answer.probabilities, flags=finding.flags,
            bundle=finding.bundle, version=finding.version, bundle_digest=digest,
        )  # fmt: skip

    return describe
