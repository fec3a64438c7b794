"""The few frames that are shown: which, and as how small a picture.

A frame that is OK is shown if it is the newest when the page is written, once a second; any other
as soon as it comes, but no more of them a second than may be. All others cost nothing.
"""

import io
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from runtime.delivery.status_document import clipped
from runtime.line.verdict import Finding, Verdict, Word

UInt8 = npt.NDArray[np.uint8]

SIDE = 192
"""Pixels of the longer side at most."""

_QUALITY = 80
_GRACE_S = 10.0
"""A page that was just read may still ask for a picture that is not in the newest one."""


class RecentFrame(msgspec.Struct, frozen=True, kw_only=True):
    """One frame that is shown."""

    number: int
    """Rising with each frame that is shown."""
    time: str
    source: str
    frame: str
    verdict: Word
    label: str | None
    score: float | None
    reason: str
    flags: tuple[str, ...]
    seq: int | None
    """None if the record could not be kept."""
    picture: str
    """File name among the thumbnails; empty if there is no image."""


class Thumbnails:
    """JPEG files in ``folder``, which is emptied first; ``ring`` of the newest and of the notable.

    ``per_second`` bounds how many notable frames become pictures. ``clock`` is monotonic.
    """

    def __init__(
        self,
        folder: Path,
        ring: int,
        per_second: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._clock = folder, clock
        self._interval_s = 1 / per_second
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.jpg"):
            old.unlink()
        self._run = f"{time.time_ns():x}"  # a browser keeps pictures by their names
        self._number = 0
        self._last: tuple[Finding, UInt8 | None] | None = None
        self._free_at = float("-inf")
        self._retired: deque[tuple[float, str]] = deque()
        self.recent: deque[RecentFrame] = deque(maxlen=ring)
        """Newest first."""
        self.notable: deque[RecentFrame] = deque(maxlen=ring)
        """Newest first, those that were not OK."""

    def offer(self, said: Finding, image: UInt8 | None) -> None:
        """Show ``said`` and ``image``, uint8 [H, W], [H, W, 1] or [H, W, 3], now or at ``settle``
        or not. The array must stay as it is until the next call."""
        self._last = said, image
        if said.verdict != "OK" and self._clock() >= self._free_at:
            self._free_at = self._clock() + self._interval_s
            self.settle()

    def settle(self) -> None:
        """Show the newest frame, if it is not shown yet. Raises OSError as writing a file."""
        if self._last is not None:
            said, image = self._last
            self._last = None
            self._show(said, image)
        while self._retired and self._retired[0][0] < self._clock() - _GRACE_S:
            (self._folder / self._retired.popleft()[1]).unlink(missing_ok=True)

    def _show(self, said: Finding, image: UInt8 | None) -> None:
        self._number += 1
        picture = ""
        if image is not None:
            picture = f"{self._run}-{self._number}.jpg"
            (self._folder / picture).write_bytes(jpeg(image))
        card = RecentFrame(
            number=self._number, time=said.time, source=clipped(said.source),
            frame=clipped(said.frame), verdict=said.verdict, label=said.label, score=said.score,
            reason=clipped(said.reason),
            flags=said.flags, seq=said.seq if isinstance(said, Verdict) else None, picture=picture,
        )  # fmt: skip
        before = {shown.picture for shown in (*self.recent, *self.notable)}
        self.recent.appendleft(card)
        if said.verdict != "OK":
            self.notable.appendleft(card)
        gone = before - {shown.picture for shown in (*self.recent, *self.notable)} - {""}
        self._retired.extend((self._clock(), name) for name in sorted(gone))


def jpeg(image: UInt8) -> bytes:
    """``image``, uint8 [H, W], [H, W, 1] or [H, W, 3], as a JPEG of at most SIDE a side."""
    picture = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=_QUALITY)
    return data.getvalue()
