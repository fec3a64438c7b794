"""A device's slots on disk: verified bundles, and which of them answers, through any power cut.

It knows no engine and no network, and decides nothing: ``runtime.slot_state`` does. Each bundle
lies in a slot named by its zip's SHA-256; one small file, replaced as a whole, says which slot
plays which part. Nothing a slot holds is changed once it has its name.

    state.json                    the state
    slots/SHA256/bundle/          the verified bundle
    slots/SHA256/release.json     its name, version and digests
    slots/SHA256/engines/         engines that this device built from it
    slots/SHA256/state.json       the state's second copy, in the slot that is current
"""

import contextlib
import datetime
import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from runtime import atomic, slot_state
from runtime.bundle import Bundle
from runtime.errors import BundleError, UpdateError
from runtime.private_files import Lock
from runtime.slot_state import Refusal, Release, State

STATE, RELEASE = "state.json", "release.json"
_MAX_STATE_BYTES = 1024 * 1024
_BLOCK = 4096
_SPARE_BYTES = 1024 * 1024
"""Left free by staging: the state must always find room."""


class Slot(NamedTuple):
    """A bundle of this device and where it lies."""

    release: Release
    folder: Path

    @property
    def sha256(self) -> str:
        """Of the bundle's zip."""
        return self.release.sha256

    @property
    def version(self) -> str:
        """The bundle's version."""
        return self.release.version

    @property
    def bundle(self) -> Path:
        """The verified bundle, a folder."""
        return self.folder / "bundle"

    @property
    def engines(self) -> Path:
        """Where the engines are kept that this device builds from it."""
        return self.folder / "engines"


class Status(NamedTuple):
    """What a device's slots are doing."""

    state: State
    staged: tuple[str, ...]
    """The SHA-256 of every slot, sorted."""
    problems: tuple[str, ...]
    """What ``recover`` would mend, a sentence each."""


def default_folder() -> Path:
    """$FIELDFIT_STATE, else /var/lib/fieldfit for root, else below the user's XDG state folder."""
    if chosen := os.environ.get("FIELDFIT_STATE"):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/var/lib/fieldfit")
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "fieldfit"


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


class Slots:
    """The slots below ``folder``.

    What changes them holds the lock; what only reads needs none, since the state is one file that
    is replaced as a whole. ``waiting`` is told the process that holds the lock, before waiting.
    """

    def __init__(
        self,
        folder: Path,
        *,
        waiting: Callable[[int | None], object] = lambda _: None,
        now: Callable[[], str] = _now,
    ) -> None:
        self.folder = folder
        self._slots = folder / "slots"
        self._waiting = waiting
        self._now = now
        self._thread_lock = threading.RLock()
        self._depth = 0

    # --- reading

    def status(self) -> Status:
        """The state as it is on disk, and what is wrong with it; changes nothing."""
        state, problems = self._read()
        return Status(state, tuple(sorted(self._names())), tuple(problems))

    def current(self) -> Slot | None:
        """The slot that answers, or None before the first commit."""
        release = self.status().state.current
        return self._slot(release) if release else None

    def previous(self) -> Slot | None:
        """The slot that answered before it, or None."""
        release = self.status().state.previous
        return self._slot(release) if release else None

    def pending(self) -> Slot | None:
        """The slot on trial, or None."""
        pending = self.status().state.pending
        return self._slot(pending.release) if pending else None

    # --- changing

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes and threads from changing the slots; may be nested."""
        with self._thread_lock:
            if self._depth:
                yield
                return
            atomic.make_folder(self._slots)
            lock = Lock.acquire(self.folder / "slots.lock", self._waiting)
            self._depth += 1
            try:
                self._sweep()
                yield
            finally:
                self._depth -= 1
                lock.close()

    def recover(self) -> tuple[str, ...]:
        """Make good what damage left, at a start: a sentence for each thing that was done.

        Reads every byte of the slots in use. A damaged one is given up, and the one before it
        answers; a damaged or missing state is rebuilt from its copy in the slots.
        """
        with self.lock():
            state, done = self._read()
            changed = bool(done)
            for sha256 in sorted(state.in_use()):
                if reason := self._damage(sha256):
                    state = slot_state.give_up(state, sha256, reason, self._now())
                    changed = True
                    done.append(f"slot {sha256[:12]} is given up: {reason}")
            if changed:
                self._write(state)
            return tuple(done)

    def stage(self, archive: Path, *, allow_lower: bool = False) -> Slot:
        """Verify the bundle at ``archive``, a zip or a folder, and put it into a slot of its own.

        The slot is there whole or not at all; the same bundle again is the same slot.

        Raises BundleError for anything wrong with the bundle, UpdateError for one that is older
        than the floor (unless ``allow_lower``) or that finds no room, with the bytes it needs.
        """
        bundle = Bundle.open(archive)
        release = Release(
            sha256=bundle.sha256(),
            name=bundle.manifest.name,
            version=bundle.manifest.version,
            manifest=bundle.manifest.digest,
        )
        slot = self._slot(release)
        with self.lock():
            state = self._read()[0]
            if refusal := slot_state.check_floor(state, release, allow_lower=allow_lower):
                raise UpdateError(refusal.reason)
            if self._damage(release.sha256) is None:
                return slot
            self._make_room(_needed(bundle))
            with _says_what_it_needs(self.folder, _needed(bundle)):
                self._write_slot(slot, bundle)
            return slot

    def activate(self, sha256: str, *, allow_lower: bool = False, again: bool = False) -> Slot:
        """Put a staged slot on trial with all its tries; it answers once it is committed.

        Raises UpdateError if there is no such slot, if it is damaged or too old, or if it was
        given up before and is not to be tried ``again``.
        """
        with self.lock():
            release = self._release(sha256)
            self._step(
                lambda state: slot_state.activate(
                    state, release, allow_lower=allow_lower, again=again
                )
            )
            return self._slot(release)

    def begin_try(self) -> Slot | None:
        """Spend a try of the slot on trial, on disk, and return it; call it before each attempt.

        None if no slot is on trial, or none any more: its tries are used up, or it is damaged.
        """
        with self.lock():
            pending = self._read()[0].pending
            if pending and (reason := self._damage(pending.release.sha256)):
                self.rollback(reason, pending.release.sha256)
            pending = self._step(lambda state: slot_state.begin_try(state, self._now())).pending
            return self._slot(pending.release) if pending else None

    def commit(self, sha256: str | None = None) -> Slot:
        """Make the slot on trial the current one, for good. With ``sha256`` that one or none.

        Raises UpdateError if there is nothing to commit.
        """
        state = self._step(lambda state: slot_state.commit(state, sha256))
        assert state.current
        return self._slot(state.current)

    def rollback(self, reason: str, sha256: str | None = None) -> Slot | None:
        """Give up the slot on trial, or else the current one; return the slot that answers now.

        With ``sha256`` that slot or none; ``reason`` is kept.

        Raises UpdateError if there is nothing to roll back, or nothing to roll back to.
        """
        state = self._step(lambda state: slot_state.rollback(state, reason, self._now(), sha256))
        return self._slot(state.current) if state.current else None

    def collect(self) -> tuple[str, ...]:
        """Remove the slots that are neither current, previous nor pending; return their names."""
        with self.lock():
            unused = sorted(self._names() - self._read()[0].in_use())
            for name in unused:
                doomed = self._slots / f".{name}.doomed"  # half a slot must not look like one
                (self._slots / name).rename(doomed)
                shutil.rmtree(doomed)
            return tuple(unused)

    # --- files

    def _step(self, step: Callable[[State], State | Refusal]) -> State:
        with self.lock():
            before, problems = self._read()
            after = step(before)
            if isinstance(after, Refusal):
                raise UpdateError(after.reason)
            if after is not before or problems:
                self._write(after)
            return after

    def _read(self) -> tuple[State, list[str]]:
        """The state, and what was wrong with its file."""
        found = _read_state(self.folder / STATE)
        if isinstance(found, State):
            return found, []
        copies = [
            state
            for name in sorted(self._names())
            if isinstance(state := _read_state(self._slots / name / STATE), State)
        ]
        if found is None and not self._names():
            return State(), []
        problem = f"{self.folder / STATE}: {found or 'missing'}"
        if not copies:
            return State(), [f"{problem}; no slot was ever committed, so none is current"]
        newest = max(copies, key=lambda state: state.generation)
        return newest, [f"{problem}; taken from its copy in slot {newest.current}"]

    def _write(self, state: State) -> None:
        data = slot_state.encode(state)
        with _says_what_it_needs(self.folder, 2 * _BLOCK):
            atomic.write_bytes(self.folder / STATE, data)
            if state.current and self._slot(state.current).folder.is_dir():
                atomic.write_bytes(self._slot(state.current).folder / STATE, data)

    def _write_slot(self, slot: Slot, bundle: Bundle) -> None:
        with atomic.replacing_folder(slot.folder) as temporary:
            (temporary / RELEASE).write_bytes(msgspec.json.encode(slot.release))
            (temporary / "engines").mkdir(mode=0o700)
            (temporary / "bundle").mkdir()
            for name in bundle.names():
                (temporary / "bundle" / name).write_bytes(bundle.read(name))

    def _slot(self, release: Release) -> Slot:
        return Slot(release, self._slots / release.sha256)

    def _names(self) -> set[str]:
        """The slots on disk; what has a dot in front is none yet, or none any more."""
        try:
            return {entry.name for entry in self._slots.iterdir() if entry.name[0] != "."}
        except FileNotFoundError:
            return set()

    def _release(self, sha256: str) -> Release:
        """What slot ``sha256`` holds, every byte of it checked."""
        folder = self._slots / sha256
        if sha256 not in self._names():
            raise UpdateError(f"no slot {sha256[:12]}; put a bundle into one with fieldfit stage")
        try:
            release = msgspec.json.decode((folder / RELEASE).read_bytes(), type=Release)
            manifest = Bundle.open(folder / "bundle").manifest
        except (BundleError, OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UpdateError(f"slot {sha256[:12]} is damaged: {error}; stage it again") from error
        if (release.sha256, release.manifest) != (sha256, manifest.digest):
            raise UpdateError(f"slot {sha256[:12]} is damaged: it holds another bundle")
        return release

    def _damage(self, sha256: str) -> str | None:
        """What is wrong with slot ``sha256``, or None."""
        try:
            self._release(sha256)
        except UpdateError as error:
            return str(error)
        return None

    def _sweep(self) -> None:
        """Remove what a crash left half done; only the lock's holder may."""
        for entry in self._slots.iterdir():
            if entry.name.startswith("."):
                shutil.rmtree(entry)
        for entry in self.folder.glob(f".{STATE}.*"):
            entry.unlink()

    def _make_room(self, needed: int) -> None:
        if shutil.disk_usage(self.folder).free < needed:
            self.collect()
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise UpdateError(_no_room(self.folder, needed, free))


def _read_state(path: Path) -> State | str | None:
    """The state in the file ``path``, what is wrong with it, or None where there is none."""
    try:
        with path.open("rb") as file:
            return slot_state.decode(file.read(_MAX_STATE_BYTES))
    except FileNotFoundError:
        return None


def _needed(bundle: Bundle) -> int:
    """Bytes of disk that a slot of ``bundle`` takes, with what is to stay free."""
    sizes = [len(bundle.read(name)) for name in bundle.names()]
    return sum(-(-size // _BLOCK) * _BLOCK for size in sizes) + _SPARE_BYTES


def _no_room(folder: Path, needed: int, free: int) -> str:
    return (
        f"{folder}: no room: expected {needed:,} bytes, got {free:,}; nothing was changed, make "
        "room and run the same command again"
    )


@contextlib.contextmanager
def _says_what_it_needs(folder: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free
        raise UpdateError(_no_room(folder, needed, free)) from error
