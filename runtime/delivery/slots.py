"""A device's slots on disk: verified bundles, and which of them answers, through any power cut.

It knows no engine and no network, and decides nothing: ``slot_state`` does. Each bundle lies in a
slot named by its zip's SHA-256; one small file, replaced as a whole, says which slot plays which
part. A slot's bundle is not changed once it has its name.

    state.json                    the state
    slots/SHA256/bundle/          the verified bundle
    slots/SHA256/release.json     its name, version and digests
    slots/SHA256/engines/         engines that this device built from it
    slots/SHA256/limits.json      what it must keep to, where more than the default was asked
    slots/SHA256/state.json       the state's second copy, in the slot that is current
"""

import contextlib
import datetime
import errno
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from runtime import atomic
from runtime.bundle import MANIFEST, Bundle
from runtime.delivery import slot_state
from runtime.delivery.floor import Floor, Floors
from runtime.delivery.slot_state import Refusal, Release, State
from runtime.errors import BundleError, UpdateError
from runtime.private_files import Lock

_log = logging.getLogger(__name__)

_STATE, _RELEASE = "state.json", "release.json"
_MAX_STATE_BYTES = 1024 * 1024
_BLOCK = 4096
_SPARE_BYTES = 1024 * 1024
"""Left free by staging: the state must always find room."""
_DAMAGE = {errno.ENOENT, errno.EIO, errno.EBADMSG, errno.EUCLEAN}
"""Not there, or what file systems say of a medium that has lost it. Anything else that keeps a file
from being read, such as a permission, is for somebody to mend and no reason to give up a slot."""
_NAME = re.compile(r"[0-9a-f]{64}")
_LEFTOVER = re.compile(rf"\.{_NAME.pattern}\..+")


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
    staged: tuple[Release, ...]
    """What the slots hold that play no part, the lowest version first."""
    problems: tuple[str, ...]
    """What ``recover`` would mend, a sentence each; bytes are not read for it."""


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
        self._floors = Floors(folder)
        self._waiting = waiting
        self._now = now
        self._thread_lock = threading.RLock()
        self._depth = 0

    # --- reading

    @property
    def state_file(self) -> Path:
        """Replaced with every change, so that a look at its inode tells of one."""
        return self.folder / _STATE

    def status(self) -> Status:
        """The state as it is on disk, and what is wrong with it; changes nothing."""
        state, problems = self._read()
        found = {name: self._read_release(name) for name in sorted(self._names())}
        if self._read()[0] != state:
            return self.status()  # it changed meanwhile, and the slots perhaps with it
        unreadable = [
            why
            for name, why in found.items()
            if isinstance(why, str) and self._slots.joinpath(name).exists()
        ]
        missing = [f"slot {name[:12]} is missing" for name in sorted(state.in_use() - set(found))]
        staged = [
            release
            for name, release in found.items()
            if isinstance(release, Release) and name not in state.in_use()
        ]
        staged.sort(key=lambda release: slot_state.version_key(release.version))
        return Status(state, tuple(staged), (*problems, *unreadable, *missing))

    def current(self) -> Slot | None:
        """The slot that answers, or None before the first commit."""
        release = self._read()[0].current
        return self._slot(release) if release else None

    def previous(self) -> Slot | None:
        """The slot that answered before it, or None."""
        release = self._read()[0].previous
        return self._slot(release) if release else None

    def pending(self) -> Slot | None:
        """The slot on trial, or None."""
        pending = self._read()[0].pending
        return self._slot(pending.release) if pending else None

    def find(self, start: str) -> str:
        """The SHA-256 of the one slot whose SHA-256 begins with ``start``.

        Raises UpdateError if there is none, or more than one.
        """
        found = sorted(name for name in self._names() if start and name.startswith(start))
        if len(found) == 1:
            return found[0]
        have = ", ".join(name[:12] for name in sorted(self._names())) or "none"
        raise UpdateError(
            f"expected the beginning of one slot's SHA-256, got {start!r} ({len(found)} fit); "
            f"slots here: {have}; put a bundle into one with fieldfit stage"
        )

    # --- changing

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes and threads from changing the slots; may be nested."""
        with self._thread_lock:
            if self._depth:
                yield
                return
            with _says_what_it_needs(self.folder, _SPARE_BYTES):
                atomic.make_folder(self._slots)
                lock = Lock.acquire(self.folder / "slots.lock", self._waiting)
                self._depth += 1
                try:
                    self._sweep()
                    if not self._names() and not (self.folder / _STATE).exists():
                        floor = self._floors.lift(Floor())  # it can be kept, or is asked for now
                        # From now on, a missing state is damage.
                        self._write(State(floor=floor.version))
                    yield
                finally:
                    self._depth -= 1
                    lock.close()

    def recover(self) -> tuple[str, ...]:
        """Make good what damage left, at a start: a sentence for each thing that was done.

        Reads every byte of the slots in use. A damaged one is given up, and the one before it
        answers; a damaged or missing state is taken from its copy in the slots. A slot that plays
        no part and cannot say what it holds is removed.
        """
        with self.lock():
            before, done = self._read()
            state = before
            # The current one last: what it gives way to must be known to be whole.
            current = {before.current.sha256} if before.current else set()
            for sha256 in [*sorted(before.in_use() - current), *current]:
                if reason := self._damage(sha256):
                    state = slot_state.damaged(state, sha256, reason, self._now())
                    answers = f"{state.current} answers" if state.current else "none answers"
                    done.append(f"{reason}; {answers}")
            if state is not before or done:
                self._write(state)
            for name in sorted(self._names() - state.in_use()):
                if isinstance(why := self._read_release(name), str):
                    atomic.remove_folder(self._slots / name)
                    done.append(f"{why}; it is removed")
            return tuple(done)

    def stage(self, archive: Path, *, allow_lower: bool = False) -> Slot:
        """Verify the bundle at ``archive``, a zip or a folder, and put it into a slot of its own.

        The slot is there whole or not at all; the same bundle again is the same slot, mended if
        it was damaged.

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
            if self._damage(release.sha256):
                needed = _needed(bundle)
                self._make_room(needed)
                with _says_what_it_needs(self.folder, needed):
                    _write_slot(slot, bundle)
                if release == state.current:
                    self._write(state)  # its copy was in the slot
            return slot

    def activate(self, sha256: str, *, allow_lower: bool = False, again: bool = False) -> Slot:
        """Put a staged slot on trial with all its tries; it answers once it is committed.

        Raises UpdateError if there is no such slot, if it is damaged or too old, or if it was
        given up before and is not to be tried ``again``.
        """
        with self.lock():
            release = self._checked(sha256)
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
                self._step(
                    lambda state: slot_state.damaged(
                        state, pending.release.sha256, reason, self._now()
                    )
                )
                return None
            left = self._step(lambda state: slot_state.begin_try(state, self._now())).pending
            return self._slot(left.release) if left else None

    def commit(self, sha256: str | None = None) -> Slot:
        """Make the slot on trial the current one, for good. With ``sha256`` that one or none.

        Its version is kept in the floor's copies before: once it is committed, no lost state
        makes an older one new.

        Raises UpdateError if there is nothing to commit, or the floor cannot be kept.
        """

        def step(before: State) -> State | Refusal:
            after = slot_state.commit(before, sha256)
            if isinstance(after, State):
                self._floors.lift(Floor(version=after.floor))
            return after

        state = self._step(step)
        assert state.current
        return self._slot(state.current)

    def rollback(self, reason: str, sha256: str | None = None) -> Slot | None:
        """Give up the slot on trial, or else the current one; return the slot that answers now.

        With ``sha256`` that slot or none; ``reason`` is kept.

        Raises UpdateError if there is nothing to roll back, or nothing whole to roll back to.
        """

        def step(before: State) -> State | Refusal:
            after = slot_state.rollback(before, reason, self._now(), sha256)
            if isinstance(after, State) and after.current and after.current != before.current:
                damage = self._damage(after.current.sha256)
                return Refusal(f"{damage}; {before.current} stays") if damage else after
            return after

        current = self._step(step).current
        return self._slot(current) if current else None

    def collect(self) -> tuple[str, ...]:
        """Remove the slots that are neither current, previous nor pending; return their names."""
        with self.lock():
            unused = sorted(self._names() - self._read()[0].in_use())
            for name in unused:
                atomic.remove_folder(self._slots / name)
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
            for problem in problems:
                _log.warning("%s", problem)
            return after

    def _read(self) -> tuple[State, list[str]]:
        """The state, and what was wrong with its file."""
        found = _read_state(self.folder / _STATE)
        if isinstance(found, State):
            return found, []
        names = sorted(self._names())
        if found is None and not names:
            return State(), []
        problem = f"{self.folder / _STATE}: {found or 'missing'}"
        copies = [
            state
            for name in names
            if isinstance(state := _read_state(self._slots / name / _STATE), State)
        ]
        if not copies:
            floor = self._floors.read().version
            no_copy = f"{problem}; no slot has a copy of it, so none is current"
            return State(floor=floor), [no_copy]
        newest = max(copies, key=lambda state: state.generation)
        return newest, [f"{problem}; taken from its copy in the slot of {newest.current}"]

    def _write(self, state: State) -> None:
        data = slot_state.encode(state)
        atomic.write_bytes(self.folder / _STATE, data)
        if state.current and (folder := self._slot(state.current).folder).is_dir():
            atomic.write_bytes(folder / _STATE, data)

    def _slot(self, release: Release) -> Slot:
        return Slot(release, self._slots / release.sha256)

    def _names(self) -> set[str]:
        """The slots on disk; what has a dot in front is none yet, or none any more."""
        try:
            return {entry.name for entry in self._slots.iterdir() if _NAME.fullmatch(entry.name)}
        except FileNotFoundError:
            return set()

    def _read_release(self, sha256: str) -> Release | str:
        """What slot ``sha256`` says that it holds, or why it cannot be told."""
        try:
            data = (self._slots / sha256 / _RELEASE).read_bytes()
            return msgspec.json.decode(data, type=Release)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return f"slot {sha256[:12]} is damaged: {error}"
        except OSError as error:
            if error.errno not in _DAMAGE:
                raise
            return f"slot {sha256[:12]} is damaged: {error}"

    def _checked(self, sha256: str) -> Release:
        """What slot ``sha256`` holds, every byte of it checked.

        Raises UpdateError if it is not there, or not whole, and whatever else keeps it from being
        read: too many open files are no damage.
        """
        if sha256 not in self._names():
            raise UpdateError(f"no slot {sha256[:12]}; put a bundle into one with fieldfit stage")
        release = self._read_release(sha256)
        if isinstance(release, str):
            raise UpdateError(f"{release}; stage it again")
        try:
            manifest = Bundle.open(self._slots / sha256 / "bundle").manifest
        except BundleError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno not in _DAMAGE:
                raise
            raise UpdateError(f"slot {sha256[:12]} is damaged: {error}; stage it again") from error
        if (release.sha256, release.manifest) != (sha256, manifest.digest):
            raise UpdateError(f"slot {sha256[:12]} holds another bundle; stage it again")
        return release

    def _damage(self, sha256: str) -> str | None:
        """What is wrong with slot ``sha256``, or None."""
        try:
            self._checked(sha256)
        except UpdateError as error:
            return str(error)
        return None

    def _sweep(self) -> None:
        """Remove what a crash left half done; only the lock's holder may."""
        for entry in self._slots.iterdir():
            if _LEFTOVER.fullmatch(entry.name):
                shutil.rmtree(entry)
        for folder in (self.folder, *(self._slots / name for name in self._names())):
            for entry in folder.glob(f".{_STATE}.*"):
                entry.unlink()

    def _make_room(self, needed: int) -> None:
        if _free(self.folder) < needed:
            self.collect()
        if (free := _free(self.folder)) < needed:
            raise UpdateError(_no_room(self.folder, needed, free))


def _write_slot(slot: Slot, bundle: Bundle) -> None:
    with atomic.replacing_folder(slot.folder) as temporary:
        (temporary / _RELEASE).write_bytes(msgspec.json.encode(slot.release))
        (temporary / "engines").mkdir(mode=0o700)
        (temporary / "bundle").mkdir()
        for name in bundle.names():
            (temporary / "bundle" / name).write_bytes(bundle.read(name))


def _read_state(path: Path) -> State | str | None:
    """The state in the file ``path``, what is wrong with it, or None where there is none."""
    try:
        with path.open("rb") as file:
            return slot_state.decode(file.read(_MAX_STATE_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        return f"damaged ({error.strerror})"


def _needed(bundle: Bundle) -> int:
    """Bytes of disk that a slot of ``bundle`` takes, with what is to stay free."""
    sizes = [len(bundle.read(MANIFEST)), *(entry.size for entry in bundle.manifest.files)]
    return sum(-(-size // _BLOCK) * _BLOCK for size in sizes) + _SPARE_BYTES


@contextlib.contextmanager
def _says_what_it_needs(folder: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UpdateError(_no_room(folder, needed, _free(folder))) from error


def _no_room(folder: Path, needed: int, free: int) -> str:
    return (
        f"{folder}: no room: expected {needed:,} bytes free, got {free:,}; what answers is "
        "untouched; make room and run the same command again"
    )


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
