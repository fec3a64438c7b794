"""Which files of a folder are done with, kept through restarts in a few bytes each.

The record is a file of eight-byte digests, one appended for each file. No clock decides anything:
clocks of devices jump back to 1970. A power cut loses what the last second appended; those files
then come once more. It knows no folder.
"""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from runtime import atomic

_log = logging.getLogger(__name__)

_HEAD = b"FFDONE01"
_SIZE = 8

NEWEST = 65_536
"""So many are kept even if their files are gone: a folder may vanish and come back whole."""

_SYNC_S = 1.0


class DoneRecord:
    """The record in ``path``; a damaged one is begun anew, and said to be."""

    def __init__(self, path: Path) -> None:
        self._path = path
        atomic.make_folder(path.parent)
        self._digests = dict.fromkeys(self._read())  # in the order of their coming
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._unsynced, self._synced = False, time.monotonic()
        self._lock = threading.Lock()

    def __contains__(self, key: bytes) -> bool:
        return key in self._digests

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, key: bytes) -> None:
        """Keep ``key``. Raises OSError if the disk refuses it."""
        with self._lock:
            if key not in self._digests:
                os.write(self._descriptor, key)
                self._digests[key] = None
                self._unsynced = True

    def sync(self) -> None:
        """Bring to the disk what was added, at most once a second."""
        with self._lock:
            if self._unsynced and time.monotonic() - self._synced >= _SYNC_S:
                os.fdatasync(self._descriptor)
                self._unsynced, self._synced = False, time.monotonic()

    def forget(self, present: Iterable[bytes]) -> None:
        """Keep those that are ``present`` and the NEWEST, and no others."""
        wanted = set(present)
        with self._lock:
            newest = len(self._digests) - NEWEST
            kept = [k for i, k in enumerate(self._digests) if i >= newest or k in wanted]
            atomic.write_bytes(self._path, b"".join([_HEAD, *kept]))
            os.close(self._descriptor)
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            self._digests = dict.fromkeys(kept)

    def close(self) -> None:
        """Everything is on the disk."""
        with self._lock:
            if self._descriptor >= 0:
                os.fdatasync(self._descriptor)
                os.close(self._descriptor)
                self._descriptor = -1

    def _read(self) -> list[bytes]:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            data = b""
        else:
            if not data.startswith(_HEAD):
                _log.warning("%s: damaged, begun anew: every file there comes again", self._path)
        if not data.startswith(_HEAD):
            atomic.write_bytes(self._path, _HEAD)
            return []
        if torn := len(data) % _SIZE:  # the next one must begin where one begins
            os.truncate(self._path, len(data) - torn)
        return [data[at : at + _SIZE] for at in range(_SIZE, len(data) - torn, _SIZE)]


def digest(name: str, size: int, mtime_ns: int) -> bytes:
    """Eight bytes for a file as it is: one that is written anew has others.

    Among 100,000 files in a folder one new file in 10^14 is taken for another.
    """
    text = f"{size} {mtime_ns} {name}".encode(errors="surrogateescape")
    return hashlib.blake2b(text, digest_size=_SIZE).digest()
