"""``python -m runtime.sources.camera_process``: reads one camera, and dies with its parent.

Whatever a driver or decoder does, it does to this process alone: the parent ends it and starts
another. In: one line of JSON, a byte for each frame that was taken of a source that can wait, and
the end of it all: then the camera is let go of, so that the next process may have it at once. Out:
frames in shared memory, a byte for each on stdout, why it ended on stderr. It knows no line
and no verdict.
"""

import contextlib
import os
import select
import signal
import sys

import msgspec

from runtime.command import end_with
from runtime.errors import DataError
from runtime.sources.address import Address
from runtime.sources.frame_ring import PLACES, RingWriter
from runtime.sources.grabber import Grabbed, Grabber

FRAME, ALIVE, OPENED = b"f", b"a", b"o"
"""What the bytes on stdout say."""

_OUT = 1


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What the parent asks for."""

    address: Address
    memory: int
    """Descriptor of the shared memory."""
    parent: int
    waits: bool
    """Whether no frame may be lost: then it goes on only as frames are taken."""


def main() -> int:
    """0 at the end of a file, 1 if there are no frames any more; stderr says why."""
    with open(0, "rb", buffering=0, closefd=False) as line:  # and not a byte more than that line
        task = msgspec.json.decode(line.readline(), type=Task)
    end_with(task.parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group: the parent ends us
    os.set_blocking(_OUT, False)
    try:
        grabber = _open(task.address)
        try:
            _send(grabber, RingWriter(task.memory, grabber.shape, waits=task.waits), task.waits)
        finally:
            grabber.close()
    except DataError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


def _open(address: Address) -> Grabber:
    if address.kind == "aravis":
        from runtime.sources.aravis_grabber import AravisGrabber

        return AravisGrabber(address)
    # What FFmpeg says of every broken packet would fill the journal.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    # Half a frame is none, and lost packets are asked for again.
    os.environ.setdefault(
        "OPENCV_FFMPEG_CAPTURE_OPTIONS", "rtsp_transport;tcp|fflags;discardcorrupt"
    )
    from runtime.sources.opencv_grabber import OpenCVGrabber

    return OpenCVGrabber(address)


def _send(grabber: Grabber, ring: RingWriter, waits: bool) -> None:
    _say(OPENED)
    room = PLACES - 1
    while (waits or not _told_to_end()) and (grabbed := grabber.grab()):
        if grabbed.alive:
            _say(ALIVE)
            continue
        while waits and not room:
            room = len(os.read(0, PLACES))
            if not room:
                return
        room -= 1
        _put(grabber, ring, grabbed)
        _say(FRAME)


def _put(grabber: Grabber, ring: RingWriter, grabbed: Grabbed) -> None:
    ring.number += grabbed.skipped
    with ring.place(grabbed.time, grabbed.monotonic, fault=grabbed.fault) as place:
        if not grabbed.fault:
            grabber.retrieve(place)


def _told_to_end() -> bool:
    return bool(select.select([0], [], [], 0)[0])


def _say(word: bytes) -> None:
    with contextlib.suppress(BlockingIOError):  # then the parent has thousands to read already
        os.write(_OUT, word)


if __name__ == "__main__":
    sys.exit(main())
