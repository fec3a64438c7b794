"""One signed document that says how a device is: its contents, its bytes, and who may be believed.

A document is JSON: the status, canonical and signed as the very bytes that lie there, and the
signature. Nothing of a status is read before its signature holds, so what a stranger wrote is
never shown. It knows neither where documents come from, nor what is good and what is bad.
"""

import datetime
import hashlib
from collections.abc import Mapping
from typing import Annotated, NamedTuple

import msgspec

from runtime.delivery.identity import DeviceId, Identity, Name, PublicKey, check_name
from runtime.engines.engine import Provider
from runtime.errors import FleetError
from runtime.manifest import Minimum, Sha256

FORMAT = 1
"""Documents of a newer format are refused: this fieldfit would not understand them."""

MAX_STATUS_BYTES = 64 * 1024
MAX_TEXT = 300

_PURPOSE = b"fieldfit device status\n"
"""Signed in front of every status: the same key's signature of anything else is none of this."""

_DAMAGE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Time = Annotated[datetime.datetime, msgspec.Meta(tz=True)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class BundleStatus(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """The bundle that answers."""

    name: Text
    version: Text
    sha256: Sha256
    """Of its archive, as published."""
    since: Time | None = None
    """Of the first report with it, which came after its commit; None by a clock of no worth."""


class PassedOver(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """A candidate engine that could not be had, and why."""

    candidate: Text
    fault: Text
    """A word of runtime.errors.EngineFault."""
    reason: Text


class EngineStatus(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """What runs the bundle."""

    name: Text
    version: Text
    provider: Provider
    form: Text
    required: Minimum | None = None
    """The least that the bundle or this site asks for."""
    passed_over: Annotated[tuple[PassedOver, ...], msgspec.Meta(max_length=32)] = ()


class SlotStatus(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """The slots beside the one that answers."""

    previous: Sha256 | None = None
    pending: Sha256 | None = None
    tries_left: Count | None = None
    gave_up: Sha256 | None = None
    """The slot that was given up last, as long as the device keeps it in mind."""
    failure: Text | None = None
    """Its name, and why."""
    failed: Time | None = None
    """When that was."""


class UpdateStatus(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """What the device knows of its repository."""

    expires: dict[Text, Time] = {}
    """By role of the signed metadata: root, timestamp, snapshot, targets."""
    outcome: Text | None = None
    """Of the last attempt, in words."""
    failed: bool = False
    version_floor: Text | None = None
    """The highest version ever committed: nothing lower is accepted."""
    time_floor: Time | None = None
    """A clock that is behind this is wrong."""


class MachineStatus(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """The machine as it is at this moment; what cannot be read is absent."""

    model: Text | None = None
    temperatures: dict[Text, float] = {}
    """Degrees Celsius by zone."""
    throttling: Annotated[tuple[Text, ...], msgspec.Meta(max_length=32)] = ()
    memory_total: Count | None = None
    """Bytes."""
    memory_available: Count | None = None


class Moment(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """When this was; the three together tell a wrong clock from an old document."""

    seen: Time
    """By the device's clock."""
    synchronised: bool
    """Whether anything keeps that clock right."""
    boot: Text
    """The kernel's id of this start of the machine."""
    uptime_s: Annotated[float, msgspec.Meta(ge=0)]
    """Seconds since then."""
    sequence: Count
    """Higher in each further document of a device, whatever its clock says."""


class Drift(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """How far inputs and answers have moved from the bundle's reference."""

    p_value: Annotated[float, msgspec.Meta(ge=0, le=1)]
    """The smallest of the last window's two-sample tests."""
    threshold: Annotated[float, msgspec.Meta(ge=0, le=1)]
    """Below it the window has drifted."""
    window: Count
    """Answers that it is of."""
    sentence: Text
    """What moved, or that nothing did."""

    @property
    def drifted(self) -> bool:
        """Whether the window is unlike the bundle's reference."""
        return self.p_value < self.threshold


class Status(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """How a device is. Absent means unknown, never fine."""

    format: int
    device: DeviceId
    name: Name
    fieldfit: Text
    moment: Moment
    machine: MachineStatus
    bundle: BundleStatus | None = None
    engine: EngineStatus | None = None
    slots: SlotStatus | None = None
    update: UpdateStatus | None = None
    drift: Drift | None = None
    counters: Annotated[dict[Text, Count], msgspec.Meta(max_length=64)] = {}


class Known(NamedTuple):
    """The newest document that a reader has seen of a device."""

    sequence: int
    digest: str
    """SHA-256 of the document's bytes."""


def sign_status(status: Status, identity: Identity) -> bytes:
    """The document's bytes.

    Raises FleetError if ``status`` is of another device, or the document would be too large.
    """
    if status.device != identity.device.id:
        raise FleetError(f"a status of {status.device} is not {identity.device.id}'s to sign")
    body = _canonical(status)
    sealed = _Sealed(status=msgspec.Raw(body), ed25519=identity.sign(_PURPOSE + body).hex())
    data = msgspec.json.encode(sealed) + b"\n"
    if len(data) > MAX_STATUS_BYTES:
        raise FleetError(f"a status may have {MAX_STATUS_BYTES:,} bytes, this has {len(data):,}")
    return data


def read_status(
    data: bytes, keys: Mapping[str, PublicKey], known: Mapping[str, Known] | None = None
) -> Status:
    """The status in ``data``, if a device whose key is in ``keys`` (by id) signed it.

    ``known`` has what was seen before, by id: an older document, or another one of the same
    sequence number, is a replay.

    Raises FleetError for what is too large, damaged, of a newer format, of an unknown device,
    not signed by it, or replayed. At most ``MAX_STATUS_BYTES + 1`` bytes need be read to ask.
    """
    if len(data) > MAX_STATUS_BYTES:
        raise FleetError(f"a status may have {MAX_STATUS_BYTES:,} bytes, this has more")
    try:
        sealed = msgspec.json.decode(data, type=_Sealed)
        head = msgspec.json.decode(sealed.status, type=_Head)
    except _DAMAGE as error:
        raise FleetError(f"not a status document: {error}") from error
    key = keys.get(head.device)
    if key is None:
        raise FleetError(f"signed by a device that is not enrolled here: {head.device}")
    if not key.verify(bytes.fromhex(sealed.ed25519), _PURPOSE + bytes(sealed.status)):
        raise FleetError(f"not signed by the key that {head.device} is enrolled with")
    if head.format > FORMAT:
        raise FleetError(
            f"status format {head.format} is newer than {FORMAT}, the newest that this fieldfit "
            "reads; update fieldfit here"
        )
    try:
        status = msgspec.json.decode(sealed.status, type=Status)
    except _DAMAGE as error:
        raise FleetError(f"a signed status that cannot be read: {error}") from error
    if _canonical(status) != bytes(sealed.status):
        raise FleetError("a signed status in another encoding than the canonical one")
    check_name(status.name)
    _refuse_replay(status, data, (known or {}).get(status.device))
    return status


def known_by(status: Status, data: bytes) -> Known:
    """What a reader remembers of a document that it accepted."""
    return Known(status.moment.sequence, hashlib.sha256(data).hexdigest())


def clipped(text: str) -> str:
    """``text`` as it may stand in a status: one line, cut where it is too long."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 1] + "…"


class _Head(msgspec.Struct, frozen=True):
    format: int
    device: DeviceId


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    status: msgspec.Raw
    ed25519: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{128}\Z")]


def _canonical(status: Status) -> bytes:
    return msgspec.json.encode(status, order="deterministic")


def _refuse_replay(status: Status, data: bytes, before: Known | None) -> None:
    if before is None:
        return
    now = known_by(status, data)
    if now.sequence < before.sequence:
        raise FleetError(
            f"an old document played again: its number is {now.sequence}, {before.sequence} was "
            "seen before"
        )
    if now.sequence == before.sequence and now.digest != before.digest:
        raise FleetError(f"two different documents with the number {now.sequence}: a copied key?")
