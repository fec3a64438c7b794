"""What a channel offers, and whether this device should have it: pure decisions with reasons.

A channel is one small file, ``channels/NAME.json``, signed as a target of the repository. It knows
no network, no disk and no signatures.
"""

import datetime
import hashlib
import re
from typing import Annotated, Literal, NamedTuple

import msgspec

from runtime.delivery.slot_state import State, version_key
from runtime.errors import UpdateError
from runtime.manifest import Sha256

MAX_CHANNEL_BYTES = 64 * 1024

Action = Literal[
    "nothing new", "withdraw", "pending", "failed here before", "not in cohort", "fetch"
]


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a channel's file: the one bundle that its devices should run.

    Fields that a later fieldfit adds are ignored; one that must not be ignored raises ``format``.
    """

    format: Annotated[int, msgspec.Meta(ge=1)] = 1
    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")]
    """Of the bundle, as in its manifest."""
    version: Annotated[str, msgspec.Meta(pattern=r"^[0-9]+(\.[0-9]+)*([a-z0-9.+-]*)\Z")]
    path: Annotated[str, msgspec.Meta(pattern=r"^bundles/[A-Za-z0-9][A-Za-z0-9._+-]{0,199}\Z")]
    """The bundle's target path in the repository."""
    sha256: Sha256
    """Of the bundle's zip: the target's hash, and the name of the slot."""
    size: Annotated[int, msgspec.Meta(gt=0)]
    """Bytes of the zip."""
    percentage: Annotated[int, msgspec.Meta(ge=0, le=100)] = 100
    """Share of the channel's devices that may have it yet (see in_cohort)."""
    allow_lower: bool = False
    """An operator's rollback: this version may be below the highest that a device has run."""
    published: datetime.datetime
    """When the channel was signed, in UTC. No honest clock is behind it."""


FORMAT = 1


class Decision(NamedTuple):
    """What to do about an offer, and why in one sentence."""

    action: Action
    reason: str


def encode(offer: Offer) -> bytes:
    """The bytes of a channel's file: one encoding for one content."""
    return msgspec.json.format(msgspec.json.encode(offer), indent=1) + b"\n"


def decode(data: bytes) -> Offer:
    """The offer in a channel's file. Raises UpdateError if it is none, or of a newer format."""
    if len(data) > MAX_CHANNEL_BYTES:
        raise UpdateError(f"channel: {len(data):,} bytes, the limit is {MAX_CHANNEL_BYTES:,}")
    try:
        head = msgspec.json.decode(data, type=_FormatOnly)
        if head.format > FORMAT:
            raise UpdateError(
                f"channel: format {head.format} is newer than {FORMAT}, the newest that this "
                "fieldfit reads; update fieldfit on this device"
            )
        offer = msgspec.json.decode(data, type=Offer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UpdateError(f"channel: {error}; publish it again") from error
    if offer.published.tzinfo is None:
        raise UpdateError("channel: expected published with its UTC offset; publish it again")
    return offer


class _FormatOnly(msgspec.Struct):
    format: int = 1


def channel_path(channel: str) -> str:
    """The target path of a channel. Raises UpdateError for what cannot be a channel's name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", channel):
        raise UpdateError(
            f"expected a channel's name of letters, digits, '.', '_' and '-', got {channel!r}"
        )
    return f"channels/{channel}.json"


def in_cohort(device: str, sha256: str, percentage: int) -> bool:
    """Whether ``device`` is among the first ``percentage`` of 100 that may have bundle ``sha256``.

    A device keeps its place for one bundle, so that a raised percentage only adds devices; for
    another bundle others are first.
    """
    place = hashlib.sha256(f"{device} {sha256}".encode()).digest()
    return int.from_bytes(place, "big") % 100 < percentage


def decide(offer: Offer, state: State, *, floor: str, only_higher: bool, device: str) -> Decision:
    """What ``device``, whose slots are in ``state``, should do about ``offer``.

    ``floor`` is the version below which nothing goes, or empty. ``only_higher`` says that the clock
    cannot be right: nothing but a higher version shows then that an offer is new.

    Raises UpdateError for an offer that no honest publisher makes, or only by mistake.
    """
    what = f"{offer.name} {offer.version}"
    if state.current and state.current.sha256 == offer.sha256:
        if state.pending:
            return Decision(
                "withdraw", f"{what} is what this device runs; {state.pending.release} is given up"
            )
        return Decision("nothing new", f"{what} is what this device runs")
    if state.pending and state.pending.release.sha256 == offer.sha256:
        return Decision("pending", f"{what} is staged already, and has to prove itself next")
    if failure := state.failure(offer.sha256):
        return Decision(
            "failed here before",
            f"{what} was given up on this device: {failure.reason}; publish another one",
        )
    _check_version(offer, floor, only_higher=only_higher)
    if not in_cohort(device, offer.sha256, offer.percentage):
        return Decision(
            "not in cohort",
            f"{what} is for {offer.percentage} % of the devices yet, and this is not among them",
        )
    return Decision("fetch", f"{what} is new")


def _check_version(offer: Offer, floor: str, *, only_higher: bool) -> None:
    if not floor:
        return
    if only_higher and version_key(offer.version) <= version_key(floor):
        raise UpdateError(
            f"the clock of this device is behind, so that only a version above {floor} is taken, "
            f"got {offer.version}; set the clock"
        )
    if version_key(offer.version) < version_key(floor) and not offer.allow_lower:
        raise UpdateError(
            f"expected {offer.name} {floor} or newer, since this device has had that, got "
            f"{offer.version}; if going back is meant, publish it as a rollback"
        )
