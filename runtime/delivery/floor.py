"""What an update may not fall below, kept in two places: versions, metadata, and the time.

The repository's own protection against old content lives in one folder, and believes the clock. A
folder can be lost, and a clock without a battery starts in 1970. This knows neither network nor
signatures.
"""

import contextlib
import datetime
import errno
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from runtime import atomic
from runtime.delivery.slot_state import version_key
from runtime.errors import UpdateError
from runtime.private_files import Lock

RELEASED = datetime.datetime(2026, 11, 25, tzinfo=datetime.timezone.utc)
"""Midnight of the day on which this fieldfit was released: no honest clock is behind it, and none
is needed to refuse what had expired by then. ``tests/test_floor.py`` holds it to the newest release
that the CHANGELOG dates."""

SLACK = datetime.timedelta(days=1)
"""A clock may be this much behind what it once said: it was set, or lost a little."""

FILE = "floor.json"
_GRAIN = 3600
"""Seconds to which the time is kept: a device that asks often need not wear its flash."""
_MAX_FLOOR_BYTES = 1024 * 1024


class Seen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The highest versions of metadata that offline keys have signed.

    Those of the online key are not kept: a thief of it could count them up for ever.
    """

    root: int = 0
    targets: int = 0


class Floor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was reached, and may not be undercut."""

    time: int = 0
    """Seconds since 1970, UTC: the last time at which all was well, or a date that was signed."""
    version: str = ""
    """The highest version ever committed here."""
    metadata: dict[str, Seen] = {}
    """By the digest of the root that a device was given to trust."""


class Clock(NamedTuple):
    """What time it is, for judging what has expired."""

    reference: datetime.datetime
    """The clock, or the floor where that is later."""
    behind: datetime.timedelta
    """The clock's distance to the floor; zero if it is not behind it."""

    @property
    def wrong(self) -> bool:
        """Whether the clock cannot be right."""
        return self.behind > SLACK


def merge(one: Floor, other: Floor) -> Floor:
    """The higher of both, in every respect."""
    metadata = dict(one.metadata)
    for trust, seen in other.metadata.items():
        had = metadata.get(trust, Seen())
        metadata[trust] = Seen(max(had.root, seen.root), max(had.targets, seen.targets))
    return Floor(
        time=max(one.time, other.time),
        version=max(one.version, other.version, key=version_key),
        metadata=metadata,
    )


def judge_clock(now: datetime.datetime, floor: Floor) -> Clock:
    """``now`` held against what is known about the time."""
    least = max(RELEASED, datetime.datetime.fromtimestamp(floor.time, datetime.timezone.utc))
    return Clock(max(now, least), max(least - now, datetime.timedelta(0)))


def check_metadata(floor: Floor, trust: str, got: Seen) -> None:
    """Raise UpdateError for signed metadata that is older than any seen before."""
    had = floor.metadata.get(trust, Seen())
    for role in ("root", "targets"):
        least, version = getattr(had, role), getattr(got, role)
        if version < least:
            raise UpdateError(
                f"the source is older than what this device has seen: expected {role} metadata "
                f"{least} or newer, got {version}; copy or publish the newest repository"
            )


class Floors:
    """The floor of a state folder, in two files: losing one of them loses nothing."""

    def __init__(self, state: Path, second: Path | None = None) -> None:
        self.paths = (state / FILE, second or second_copy(state))
        self._lock = state / "floor.lock"

    def read(self) -> Floor:
        """The higher of both copies. Raises UpdateError if there are copies, and none is whole."""
        there = [path for path in self.paths if path.exists()]
        whole = [floor for path in there if (floor := _read(path)) is not None]
        if there and not whole:
            raise UpdateError(
                f"{' and '.join(map(str, there))}: damaged, so that an old update could not be "
                "told from a new one; remove it if this device may start anew"
            )
        return functools.reduce(merge, whole, Floor())

    def lift(self, to: Floor) -> Floor:
        """Keep the higher of ``to`` and what was kept, in both copies, and return it.

        Raises UpdateError if both are damaged, or one may not be written.
        """
        to = msgspec.structs.replace(to, time=to.time - to.time % _GRAIN)
        atomic.make_folder(self._lock.parent)
        with contextlib.closing(Lock.acquire(self._lock, lambda _: None)):  # for a moment
            floor = merge(self.read(), to)
            data = msgspec.json.format(msgspec.json.encode(floor), indent=1) + b"\n"
            for path in self.paths:
                _write(path, data)
        return floor


def _write(path: Path, data: bytes) -> None:
    for leftover in path.parent.glob(f".{path.name}.*"):  # of a crash: others are locked out
        leftover.unlink()
    if path.is_file() and path.read_bytes() == data:
        return
    try:
        atomic.write_bytes(path, data)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise UpdateError(
            f"{path}: {error.strerror}: a copy of the floor must be kept there, so that a lost "
            "state makes no old version new; let this user write there, or say a file in another "
            "folder or on another partition with FIELDFIT_FLOOR, to every fieldfit of this device"
        ) from error


def _read(path: Path) -> Floor | None:
    """One copy, or None if it is damaged."""
    with path.open("rb") as file:
        data = file.read(_MAX_FLOOR_BYTES)
    try:
        return msgspec.json.decode(data, type=Floor)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def second_copy(state: Path, environment: Mapping[str, str] = os.environ) -> Path:
    """Where the second copy lies: out of reach of whoever empties the state folder.

    ``$FIELDFIT_FLOOR``, which may be on another partition; else in a folder beside it, of its own
    so that a service can be allowed to write there and nowhere else.
    """
    if chosen := environment.get("FIELDFIT_FLOOR"):
        return Path(chosen)
    whole = state.absolute()
    return whole.with_name(f"{whole.name}-floor") / FILE
