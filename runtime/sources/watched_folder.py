"""A folder that somebody else writes images into: each comes once, when it is whole.

It looks again and again instead of being told by the kernel (inotify), which says nothing about
network shares, and there is no library to need. It decodes nothing.
"""

import contextlib
import errno
import fcntl
import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from runtime.preprocess import IMAGE_SUFFIXES
from runtime.sources.done_record import NEWEST, DoneRecord, digest
from runtime.sources.files import readable, unreadable
from runtime.sources.frame import Frame

LOOK_S = 0.2
"""Between two looks; longer where a look takes long, so that it costs a tenth of the time."""

_SHARE = 10

SETTLED_S = 2.0
"""A file must have kept its size and date for so long where nobody can say who writes it."""

HELD_S = 60.0
"""A file that is open for writing and has not changed for so long is told of."""

_TOLD_AGAIN_S = 60.0


class State(NamedTuple):
    """What tells whether a file is being written."""

    size: int
    mtime_ns: int
    inode: int


class Seen(NamedTuple):
    """A file in one state, since when."""

    state: State
    since: float


def judge(seen: Seen, now: float, written: bool | None) -> Literal["whole", "wait", "held"]:
    """Whether the file is whole: the same at two looks, and nobody has it open for writing.

    ``written`` is None where the file system cannot say; then it must have been the same for
    SETTLED_S, and so must an empty one, which somebody is about to write. ``held`` is one that
    somebody does not write to, and does not close.
    """
    same_s = now - seen.since
    if written:
        return "held" if same_s >= HELD_S else "wait"
    needed_s = 0.0 if written is False and seen.state.size else SETTLED_S
    return "whole" if same_s > 0 and same_s >= needed_s else "wait"


def writers(path: Path) -> bool | None:
    """Whether any process of this machine has the file open for writing; None if unknown.

    A read lease is given only if there is none (fcntl(2), F_SETLEASE).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # Who opens it in between is told by a signal to us, and SIGIO would end this process.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    finally:
        os.close(descriptor)
    return False


class WatchedFolder:
    """Images that appear in ``folder`` and below, oldest first; those of before too, unless done.

    ``record`` says which are. Hidden files, as programs write beside before they rename, wait for
    their name. A file that is written anew comes again. The folder may vanish and come back.
    """

    live = False
    dropped = 0

    def __init__(self, folder: Path, name: str, record: DoneRecord) -> None:
        self.name = name
        self._folder, self._record = folder, record
        self._closed = threading.Event()
        self._seen: dict[str, Seen] = {}
        self._given: dict[str, State] = {}
        """States that were brought, or were done before."""
        self._held: dict[str, State] = {}
        """States that were told of, and may yet become whole without another change."""
        self._waiting: dict[str, bytes] = {}
        """Frames that are not done yet, by their id."""
        self._told_at: dict[str, float] = {}

    def __iter__(self) -> Iterator[Frame]:
        """Their time is when they were first seen, by this device's clocks."""
        while not self._closed.is_set():
            start = time.monotonic()
            found, problems = scan(self._folder)
            new = self._new(found)
            looked_s = time.monotonic() - start
            yield from self._told(problems)
            for path, fault in new:
                if self._closed.is_set():
                    return
                yield self._frame(path, fault)
            if len(self._record) >= 2 * (NEWEST + len(found)):
                self._record.forget(_key(self._folder, *item) for item in found.items())
            self._record.sync()
            self._closed.wait(max(LOOK_S, _SHARE * looked_s))

    def done(self, frame: Frame) -> None:
        """Keep that it was inspected, as it was then."""
        key = self._waiting.pop(frame.id, None)
        if key:
            self._record.add(key)

    def close(self) -> None:
        """Iteration ends; what is done stays so."""
        self._closed.set()
        self._record.close()

    def _new(self, found: dict[str, State]) -> list[tuple[str, str]]:
        """Paths that are whole now, oldest first, and what is wrong with them, if anything is."""
        now = time.monotonic()
        for known in (self._seen, self._given, self._held):
            for gone in known.keys() - found.keys():
                del known[gone]
        new = []
        for path, state in found.items():
            if self._given.get(path) == state:
                continue
            if _key(self._folder, path, state) in self._record:
                self._given[path] = state
                continue
            seen = self._seen.get(path)
            if seen is None or seen.state != state:
                self._seen[path] = Seen(state, now)
                continue
            verdict = judge(seen, now, writers(Path(path)))
            if verdict == "whole":
                self._given[path] = state
                new.append((state.mtime_ns, path, ""))
            elif verdict == "held" and self._held.get(path) != state:
                self._held[path] = state
                held = f"open for writing and unchanged for {HELD_S:g} s"
                new.append((state.mtime_ns, path, held))
        return [(path, fault) for _, path, fault in sorted(new)]

    def _frame(self, path: str, fault: str) -> Frame:
        seen, now = self._seen[path], time.monotonic()
        fault = f"{path}: {fault}" if fault else unreadable(Path(path))
        name = readable(Path(path))
        if not fault:
            self._waiting[name] = _key(self._folder, path, seen.state)
        when = time.time() - (now - seen.since)
        return Frame(self.name, name, None if fault else Path(path), when, seen.since, fault)

    def _told(self, problems: list[str]) -> Iterator[Frame]:
        """What cannot be looked into, now and again for as long as it lasts."""
        now = time.monotonic()
        self._told_at = {p: at for p, at in self._told_at.items() if p in problems}
        for problem in problems:
            if now - self._told_at.get(problem, float("-inf")) >= _TOLD_AGAIN_S:
                self._told_at[problem] = now
                yield Frame(self.name, problem, None, time.time(), now, problem)


def scan(folder: Path) -> tuple[dict[str, State], list[str]]:
    """Images in ``folder`` and below, and what cannot be looked into."""
    found: dict[str, State] = {}
    problems: list[str] = []
    folders = [os.fspath(folder)]
    while folders:
        below = folders.pop()
        try:
            with os.scandir(below) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                        with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                            status = entry.stat()
                            if stat.S_ISREG(status.st_mode):
                                found[entry.path] = State(
                                    status.st_size, status.st_mtime_ns, status.st_ino
                                )
        except OSError as error:
            problems.append(f"{readable(Path(below))}: cannot be watched: {error.strerror}")
    return found, problems


def _key(folder: Path, path: str, state: State) -> bytes:
    return digest(os.path.relpath(path, folder), state.size, state.mtime_ns)
