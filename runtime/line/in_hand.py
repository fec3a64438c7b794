"""Which frame is being looked at, for the next process to know if this one does not survive it.

A file that hangs or crashes the engine would come again after each restart, for ever. It is written
before each frame and not synced: it need not outlive the machine. It judges nothing.
"""

import os
from pathlib import Path

import msgspec

from runtime.sources.frame import Frame

_MAX_BYTES = 65536


class _Held(msgspec.Struct, frozen=True):
    source: str
    frame: str
    times: int


class InHand:
    """Kept in ``path``; one line has it open. Raises OSError as ``open`` does."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._before = _read(self._descriptor)

    def begin(self, frame: Frame) -> int:
        """Write down ``frame``; in how many processes before this one it was the last in hand.

        Raises OSError.
        """
        before, self._before = self._before, None
        same = before is not None and (before.source, before.frame) == (frame.source, frame.id)
        times = before.times if before and same else 0
        data = msgspec.json.encode(_Held(frame.source, frame.id, times + 1))
        os.pwrite(self._descriptor, data, 0)
        os.truncate(self._descriptor, len(data))
        return times

    def end(self) -> None:
        """Nothing is in hand: this process ends as it should."""
        os.truncate(self._descriptor, 0)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)


def _read(descriptor: int) -> _Held | None:
    try:
        return msgspec.json.decode(os.pread(descriptor, _MAX_BYTES, 0), type=_Held)
    except (msgspec.DecodeError, UnicodeDecodeError):  # empty, or torn by a power cut
        return None
