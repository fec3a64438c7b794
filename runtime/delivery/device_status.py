"""Gather how this device is: its slots, engine, metadata and machine become one status.

It reads and decides nothing; what is not there stays absent. What cannot be read again later, the
engine that was chosen and how the last update went, is written down here when it happens.
"""

import contextlib
import datetime
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from runtime import atomic, machine
from runtime.classifier import Classifier
from runtime.delivery.identity import Device, Identity
from runtime.delivery.slot_state import Release, State
from runtime.delivery.slots import Slot, Slots
from runtime.delivery.status_document import (
    FORMAT,
    MAX_STATUS_BYTES,
    BundleStatus,
    Drift,
    EngineStatus,
    MachineStatus,
    Moment,
    PassedOver,
    SlotStatus,
    Status,
    Text,
    UpdateStatus,
    clipped,
    read_status,
    sign_status,
)
from runtime.errors import FleetError
from runtime.machine import Machine
from runtime.manifest import Minimum
from runtime.version import __version__

STATUS, ENGINE, UPDATE = "status.json", "engine.json", "last_update.json"

ROLES = ("root", "timestamp", "snapshot", "targets")
_MAX_METADATA_BYTES = 4 * 1024 * 1024
_MAX_LISTED = 32
_WANTED = ("too slow", "not wanted")
"""Faults of a candidate that nobody misses."""


class UpdateRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How the last update went."""

    outcome: Text
    failed: bool
    time_floor: datetime.datetime | None = None


def record_engine(slot: Slot, classifier: Classifier, required: Minimum | None = None) -> None:
    """Write down, beside the slot's engines, which one answers from it.

    ``required`` is what this site asks for, if that is more than the bundle does. A disk that
    refuses it takes no answers along.
    """
    engine = classifier.engine
    passed_over = [
        PassedOver(
            candidate=clipped(", ".join(filter(None, (step.engine, step.form)))),
            fault=step.fault or "failed",
            reason=clipped(step.reason),
        )
        for step in classifier.steps
        if not step.accepted and step.fault not in _WANTED
    ]
    status = EngineStatus(
        name=engine.name,
        version=clipped(engine.version),
        provider=engine.provider,
        form=engine.form,
        required=required or classifier.bundle.manifest.required_provider,
        passed_over=tuple(passed_over[:_MAX_LISTED]),
    )
    with contextlib.suppress(OSError):
        atomic.write_bytes(slot.engines / ENGINE, msgspec.json.encode(status))


def record_update(
    state: Path, outcome: str, *, failed: bool, time_floor: datetime.datetime | None = None
) -> None:
    """Write down how an update went, in one sentence."""
    record = UpdateRecord(outcome=clipped(outcome), failed=failed, time_floor=time_floor)
    atomic.write_bytes(state / UPDATE, msgspec.json.encode(record))


def report(
    state: Path,
    identity: Identity,
    *,
    counters: Mapping[str, int] | None = None,
    drift: Drift | None = None,
    root: Path = machine.ROOT,
) -> bytes:
    """The signed document of this moment, which is also kept in the state folder.

    ``root`` is the file tree that the machine is read from.
    """
    slots = Slots(state)
    current = slots.current()
    status = describe(
        identity.device,
        machine.describe(root),
        slots=slots.status().state,
        engine=read_record(current.engines / ENGINE, EngineStatus) if current else None,
        update=read_record(state / UPDATE, UpdateRecord),
        expires=expiries(state / "tuf"),
        previous=_previous(state, identity),
        boot=machine.boot_id(root),
        uptime_s=time.clock_gettime(time.CLOCK_BOOTTIME),
        counters=counters or {},
        drift=drift,
    )
    data = sign_status(status, identity)
    atomic.write_bytes(state / STATUS, data)
    return data


def describe(
    device: Device,
    here: Machine,
    *,
    slots: State,
    engine: EngineStatus | None,
    update: UpdateRecord | None,
    expires: Mapping[str, datetime.datetime],
    previous: Status | None,
    boot: str,
    uptime_s: float,
    counters: Mapping[str, int],
    drift: Drift | None,
) -> Status:
    """Put together what was read; ``previous`` is the last status of this device."""
    current = slots.current
    # A clock that was set back must not make this look like an old document.
    last = previous.moment.sequence if previous else 0
    return Status(
        format=FORMAT,
        device=device.id,
        name=device.name,
        fieldfit=__version__,
        moment=Moment(
            seen=here.time,
            synchronised=here.clock_synchronised,
            boot=clipped(boot),
            uptime_s=round(uptime_s, 3),
            sequence=max(last + 1, int(here.time.timestamp())),
        ),
        machine=_machine(here),
        bundle=_bundle(current, previous, here) if current else None,
        engine=engine,
        slots=_slots(slots),
        update=UpdateStatus(
            expires=dict(expires),
            outcome=update.outcome if update else None,
            failed=bool(update and update.failed),
            version_floor=clipped(slots.floor) or None,
            time_floor=update.time_floor if update else None,
        ),
        drift=drift,
        counters=dict(counters),
    )


def expiries(folder: Path) -> dict[str, datetime.datetime]:
    """When the metadata expires that this device last believed, by role."""
    found = {}
    for role in ROLES:
        metadata = read_record(folder / f"{role}.json", _Metadata, _MAX_METADATA_BYTES)
        if metadata is not None:
            found[role] = metadata.signed.expires
    return found


class _Signed(msgspec.Struct):
    expires: datetime.datetime


class _Metadata(msgspec.Struct):
    signed: _Signed


def _bundle(current: Release, previous: Status | None, here: Machine) -> BundleStatus:
    return BundleStatus(
        name=clipped(current.name),
        version=clipped(current.version),
        sha256=current.sha256,
        since=_since(current.sha256, previous, here),
    )


def _since(sha256: str, previous: Status | None, here: Machine) -> datetime.datetime | None:
    """Since when this bundle is reported; it starts when the clock can be believed."""
    before = previous.bundle if previous else None
    if before and before.sha256 == sha256 and before.since:
        return min(before.since, here.time) if here.clock_synchronised else before.since
    return here.time if here.clock_synchronised else None


def _slots(state: State) -> SlotStatus:
    pending = state.pending
    failure = state.failures[-1] if state.failures else None
    return SlotStatus(
        previous=state.previous.sha256 if state.previous else None,
        pending=pending.release.sha256 if pending else None,
        tries_left=pending.tries if pending else None,
        gave_up=failure.release.sha256 if failure else None,
        failure=clipped(f"{failure.release}: {failure.reason}") if failure else None,
        failed=datetime.datetime.fromisoformat(failure.date) if failure else None,
    )


def _machine(here: Machine) -> MachineStatus:
    return MachineStatus(
        model=clipped(here.model) if here.model else None,
        temperatures={
            clipped(zone): value for zone, value in list(here.temperatures.items())[:_MAX_LISTED]
        },
        throttling=tuple(clipped(name) for name in here.throttling[:_MAX_LISTED]),
        memory_total=here.memory.total if here.memory else None,
        memory_available=here.memory.available if here.memory else None,
    )


def _previous(state: Path, identity: Identity) -> Status | None:
    """The last status; None if there is none, or one that this device did not write."""
    try:
        with (state / STATUS).open("rb") as file:
            data = file.read(MAX_STATUS_BYTES + 1)
        return read_status(data, {identity.device.id: identity.public})
    except (OSError, FleetError):
        return None


_Record = TypeVar("_Record")


def read_record(path: Path, kind: type[_Record], limit: int = MAX_STATUS_BYTES) -> _Record | None:
    """What is written in ``path``; None where that is absent, damaged or too large."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
        return msgspec.json.decode(data, type=kind) if len(data) <= limit else None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
