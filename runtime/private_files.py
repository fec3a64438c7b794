"""Files that only this user can write: read without trusting them, and locked against each other.

It knows nothing of what is in them.
"""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from runtime.errors import EngineError

Waiting = Callable[[int | None], object]
"""Told the process that holds the lock, if it left its number, before waiting for it."""


def read_private(path: Path, limit: int) -> bytes:
    """The bytes of a plain file that nobody but this user and root can write.

    Raises EngineError if it is anything else or larger than ``limit`` bytes, without waiting for
    it or taking memory for it, and OSError as ``open`` does.
    """
    # NONBLOCK: opening a pipe would wait for its other end.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise EngineError(f"{path.name}: expected a plain file, got a link") from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise EngineError(f"{path.name}: expected a plain file, got a folder, pipe or device")
        _check_owner(path, status)
        check_size(status.st_size, limit, path.name)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(descriptor)


def check_folder(path: Path) -> None:
    """Raise EngineError unless ``path`` is a folder that only this user and root can write."""
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise EngineError(f"{path}: expected a folder, got a file")
    _check_owner(path, status)


def check_size(size: int, limit: int, what: str) -> None:
    """Raise EngineError if ``size`` bytes are more than ``limit``."""
    if size > limit:
        raise EngineError(f"{what}: expected at most {limit:,} bytes, got {size:,}")


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise EngineError(
            f"{path}: owned by another user (uid {status.st_uid}), and a plan is executable code"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EngineError(
            f"{path}: others can write it (mode {stat.S_IMODE(status.st_mode):o}), and a plan is "
            "executable code"
        )


class Lock(NamedTuple):
    """A locked file; the kernel unlocks it when its process ends, however that happens."""

    path: Path
    descriptor: int

    @classmethod
    def acquire(cls, path: Path, waiting: Waiting) -> "Lock":
        """Lock ``path``, as soon as nobody else holds it. Raises OSError as ``open`` does."""
        while (lock := cls.attempt(path)) is None:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # its holder has just removed it
            try:
                pid = os.read(descriptor, 20)
                waiting(int(pid) if pid.isdigit() else None)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            finally:
                os.close(descriptor)
        return lock

    @classmethod
    def attempt(cls, path: Path) -> "Lock | None":
        """Lock ``path``, or None if somebody holds it. Raises OSError as ``open`` does."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed it meanwhile: then it locks nothing any more.
            if os.path.samestat(os.fstat(descriptor), path.lstat()):
                with contextlib.suppress(OSError):  # who holds it is a courtesy: a full disk locks
                    os.truncate(descriptor, 0)
                    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                return cls(path, descriptor)
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def close(self) -> None:
        """Unlock it, and leave no file behind."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError:
            pass  # an empty file that stays is in nobody's way
        finally:
            os.close(self.descriptor)
