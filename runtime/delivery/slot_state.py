"""What may happen to a device's slots: one state, and the steps from it to the next.

Pure: no files, no clock, no engine. A step answers with the new state, or with a Refusal and its
reason. ``runtime.delivery.slots`` keeps the state on disk and the slots beside it.

    stage ─► activate ─► begin_try (at most 3) ─► commit ─► current
                              │                      │
                              └── rollback ◄─────────┘    the slot before answers again
"""

import hashlib
import json
import re
from typing import Annotated, NamedTuple

import msgspec

from runtime.errors import UpdateError
from runtime.manifest import Sha256

FORMAT = 1
"""States of a newer format are refused: this fieldfit would not understand them."""

TRIES = 3
"""Attempts at a new slot, each written down before it begins."""

KEPT_FAILURES = 8


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """One bundle as a slot holds it."""

    sha256: Sha256
    """Of the bundle's zip, which is its name in the repository and the name of its slot."""
    name: str
    version: str
    manifest: Sha256
    """The digest of its manifest, which holds those of all its files."""

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.sha256[:12]})"


class Pending(msgspec.Struct, frozen=True, kw_only=True):
    """The slot that is on trial."""

    release: Release
    tries: Annotated[int, msgspec.Meta(ge=0, le=TRIES)] = TRIES
    """Attempts that are left."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a slot was given up, and when (ISO 8601, UTC)."""

    release: Release
    reason: str
    date: str
    damaged: bool = False
    """Its files were damaged here: no fault of the bundle, which may be staged and tried again."""


class State(msgspec.Struct, frozen=True, kw_only=True):
    """Which slot answers, which one did before, which one is on trial."""

    current: Release | None = None
    previous: Release | None = None
    pending: Pending | None = None
    failures: tuple[Failure, ...] = ()
    """The last few, the newest at the end, each slot at most once; a commit clears a slot's."""
    floor: str = ""
    """The highest version ever committed; nothing below it is taken without a signed word."""
    generation: int = 0
    """Counts the steps, so that of two copies the newer one is known."""

    def failure(self, sha256: str) -> Failure | None:
        """Why the slot ``sha256`` was given up, or None if it was not."""
        return next((f for f in self.failures if f.release.sha256 == sha256), None)

    def barred(self, sha256: str) -> Failure | None:
        """Why the bundle ``sha256`` is not tried again unasked, or None if it may be."""
        failure = self.failure(sha256)
        return failure if failure and not failure.damaged else None

    def in_use(self) -> set[str]:
        """The slots that must stay: current, previous and pending."""
        return {release.sha256 for release in _roles(self)}


class Refusal(NamedTuple):
    """Why a step is not taken, with the way out."""

    reason: str


def check_floor(state: State, release: Release, *, allow_lower: bool) -> Refusal | None:
    """Refuse a version below the highest that was ever committed here."""
    if allow_lower or not state.floor:
        return None
    if version_key(release.version) >= version_key(state.floor):
        return None
    return Refusal(
        f"{release}: older than {state.floor}, the highest version committed here; publish it "
        "again under a higher version, or let the channel's signed document allow it"
    )


def activate(
    state: State, release: Release, *, allow_lower: bool = False, again: bool = False
) -> State | Refusal:
    """Put ``release`` on trial with all its tries; one that is on trial already keeps its own.

    ``again`` takes one that was given up before.
    """
    if state.current and state.current.sha256 == release.sha256:
        return state if state.pending is None else _next(state, pending=None)
    if state.pending and state.pending.release.sha256 == release.sha256:
        return state
    if refusal := check_floor(state, release, allow_lower=allow_lower):
        return refusal
    if (failure := state.barred(release.sha256)) and not again:
        return Refusal(
            f"{release}: given up on {failure.date}: {failure.reason}; it is tried again only if "
            "that is asked for (again)"
        )
    return _next(state, pending=Pending(release=release))


def begin_try(state: State, date: str) -> State:
    """Spend one try, before it begins; with none left the trial is over and has failed."""
    if state.pending is None:
        return state
    if state.pending.tries:
        left = msgspec.structs.replace(state.pending, tries=state.pending.tries - 1)
        return _next(state, pending=left)
    reason = f"{TRIES} tries ended without an answer: it crashed or hung, or the power failed"
    return _give_up(state, Failure(release=state.pending.release, reason=reason, date=date))


def commit(state: State, sha256: str | None = None) -> State | Refusal:
    """Make the slot on trial the one that answers; the one before it stays at hand.

    With ``sha256`` it commits that slot or none, and may be said twice.
    """
    pending, current = state.pending, state.current
    if pending is None or (sha256 and pending.release.sha256 != sha256):
        if sha256 and current and current.sha256 == sha256:
            return state
        trial = f"{pending.release} is on trial" if pending else "no slot is on trial"
        return Refusal(f"nothing to commit: {trial}, current is {current or 'none'}")
    if pending.tries == TRIES:
        return Refusal(f"{pending.release}: not tried yet, so there is nothing to commit")
    release = pending.release
    return _next(
        state,
        current=release,
        previous=current,
        pending=None,
        failures=tuple(f for f in state.failures if f.release.sha256 != release.sha256),
        floor=max(state.floor, release.version, key=version_key),
    )


def rollback(state: State, reason: str, date: str, sha256: str | None = None) -> State | Refusal:
    """Give up the slot on trial, or else the current one for the one before it.

    With ``sha256`` it gives up that slot or none, and may be said twice.
    """
    pending, current = state.pending, state.current
    answering = pending.release if pending else current
    given_up = sha256 or (answering.sha256 if answering else None)
    if given_up is None:
        return Refusal("nothing to roll back: no slot is current or on trial")
    if pending and pending.release.sha256 == given_up:
        return _give_up(state, Failure(release=pending.release, reason=reason, date=date))
    if current and current.sha256 == given_up:
        if state.previous is None:
            return Refusal(f"{current}: no slot before it is left to roll back to")
        return _give_up(state, Failure(release=current, reason=reason, date=date))
    if state.failure(given_up):
        return state
    return Refusal(f"nothing to roll back: slot {given_up[:12]} is neither current nor on trial")


def damaged(state: State, sha256: str, reason: str, date: str) -> State:
    """Give up a slot whose files are damaged, for the one before it if it is current.

    A current slot without one before it stays: a part of it may still be read, and staging the
    same bundle again mends it.
    """
    for release in _roles(state):
        if release.sha256 == sha256 and (release != state.current or state.previous):
            failure = Failure(release=release, reason=reason, date=date, damaged=True)
            return _give_up(state, failure)
    return state


def _roles(state: State) -> list[Release]:
    pending = state.pending.release if state.pending else None
    return [release for release in (state.current, state.previous, pending) if release]


def _give_up(state: State, failure: Failure) -> State:
    """Take a slot out of every part it plays; if it is current, the one before it answers."""
    given_up, previous = failure.release, state.previous
    others = tuple(f for f in state.failures if f.release.sha256 != given_up.sha256)
    changes: dict[str, object] = {"failures": (*others, failure)[-KEPT_FAILURES:]}
    if given_up == previous:
        changes["previous"] = None
    if given_up == state.current:
        changes |= {"current": previous, "previous": None}
    answers = previous if given_up == state.current else state.current
    if state.pending and state.pending.release in (given_up, answers):
        changes["pending"] = None
    return _next(state, **changes)


def _next(state: State, **changes: object) -> State:
    return msgspec.structs.replace(state, generation=state.generation + 1, **changes)


_VERSION = re.compile(r"(\d+(?:\.\d+)*)?(.*)", re.DOTALL)


def version_key(version: str) -> tuple[object, ...]:
    """What orders versions: numbers by value, then what follows them.

    ``1.0`` equals ``1.0.0``; ``1.10`` is above ``1.9``; ``1.0-rc1`` is below ``1.0``, and
    ``1.0+anything`` equals it, as in semantic versioning.
    """
    found = _VERSION.fullmatch(version)
    assert found
    numbers = [int(part) for part in (found[1] or "").split(".") if part]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    suffix = found[2].partition("+")[0]
    parts = tuple(
        (1, int(part), "") if part.isdecimal() else (2, 0, part)
        for part in re.findall(r"\d+|[^\d]+", suffix)
    )
    return tuple(numbers), not suffix, parts


class _File(msgspec.Struct):
    format: int
    sha256: str
    state: msgspec.Raw


def encode(state: State) -> bytes:
    """The bytes of a state file; they carry a digest, so that a damaged one is noticed."""
    content = json.loads(msgspec.json.encode(state))
    file = {"format": FORMAT, "sha256": _digest(content), "state": content}
    return json.dumps(file, indent=1).encode() + b"\n"


def decode(data: bytes) -> State | str:
    """The state in ``data``, or what is wrong with it.

    Raises UpdateError if a newer fieldfit wrote it: that is no damage to mend.
    """
    try:
        file = msgspec.json.decode(data, type=_File)
        if file.format > FORMAT:
            raise UpdateError(
                f"state.json: format {file.format} is newer than {FORMAT}, the newest that this "
                "fieldfit reads; update fieldfit on this device"
            )
        if _digest(json.loads(bytes(file.state))) != file.sha256:
            return "damaged (its digest differs)"
        return msgspec.json.decode(file.state, type=State)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return f"damaged ({error})"


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
