"""The seam between the camera's process and the libraries that read cameras.

It knows none of them.
"""

from typing import NamedTuple, Protocol

from runtime.sources.frame_ring import Array, Shape


class Grabbed(NamedTuple):
    """A frame was taken, or the camera has only said that it is still there."""

    time: float
    """Seconds since the epoch, at the moment it was there."""
    monotonic: float
    fault: str = ""
    """Why its pixels are no good; empty if they are."""
    skipped: int = 0
    """Frames before it that were lost, on the network or because this process was too slow."""
    alive: bool = False
    """True if there is no frame, and none was due: a camera that waits for its trigger."""


class Grabber(Protocol):
    """One open camera or file. Every method raises DataError if it is gone, saying why."""

    @property
    def shape(self) -> Shape:
        """Of every frame."""
        ...

    def grab(self) -> Grabbed | None:
        """Wait for the next frame; None at the end of a file."""
        ...

    def retrieve(self, place: Array) -> None:
        """The pixels of what was grabbed, in RGB order or gray."""
        ...

    def close(self) -> None:
        """Let go."""
        ...
