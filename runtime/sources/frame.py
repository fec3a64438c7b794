"""One frame and the protocol of what brings frames. It knows no classifier and no camera."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from runtime.preprocess import ImageLike


class Frame(NamedTuple):
    """One image that is to be inspected, or the news that there is none."""

    source: str
    """Name of the source, unique on the line."""
    id: str
    """Unique within the source: a path, or the running number that the camera gives."""
    image: ImageLike | None
    """None where there is no image; ``fault`` says why."""
    time: float
    """When it was taken, seconds since the epoch by this device's clock."""
    monotonic: float
    """The same moment by ``time.monotonic``, which no clock change moves."""
    fault: str = ""
    """Why there is no image, e.g. ``camera lost: no frame for 1.2 s``."""


class Source(Protocol):
    """An iterator of frames that ends when there are no more, or never."""

    name: str
    live: bool
    """It goes on while nobody looks: frames that nobody takes in time are lost."""
    dropped: int
    """Frames that were lost so, since the start."""

    def __iter__(self) -> Iterator[Frame]:
        """The frames that are still to be inspected, in order."""
        ...

    def done(self, frame: Frame) -> None:
        """The verdict on ``frame`` is safely kept: a restart need not bring it again."""
        ...

    def close(self) -> None:
        """Let go of the camera or folder; iteration ends."""
        ...
