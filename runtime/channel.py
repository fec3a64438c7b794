"""What a channel offers, and whether this device should have it: pure decisions with reasons.

A channel is one small file, ``channels/NAME.json``, signed as a target of the repository. It knows
no network, no disk and no signatures.
"""

import datetime
import hashlib
import re
from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

import msgspec

from runtime.errors import UpdateError
from runtime.manifest import Sha256

MAX_CHANNEL_BYTES = 64 * 1024

_VERSION = re.compile(r"([0-9]+(?:\.[0-9]+)*)(.*)\Z", re.DOTALL)

Action = Literal["nothing new", "not in cohort", "pending", "failed here before", "fetch"]


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


class Known(NamedTuple):
    """What a device knows when it is offered something."""

    current: str | None
    """Digest of the bundle that it runs."""
    pending: str | None
    """Digest of one that is staged and not proven yet."""
    failed: Mapping[str, str]
    """Digests of bundles that did not prove themselves here, and why."""
    highest: str | None
    """Version that no bundle of this name may be below."""
    only_higher: bool = False
    """The clock cannot be right: nothing but a higher version shows that an offer is new."""


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


def version_order(version: str) -> tuple[tuple[int, ...], bool, str]:
    """Versions sort by this: by their numbers, ``1.0`` as ``1.0.0``, ``1.0rc1`` before ``1.0``."""
    match = _VERSION.match(version)
    if match is None:
        raise UpdateError(f"expected a version that starts with a number, got {version!r}")
    numbers = [int(part) for part in match[1].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers), match[2] == "", match[2]


def higher(one: str | None, other: str | None) -> str | None:
    """The higher of two versions; None is below all."""
    known = [version for version in (one, other) if version is not None]
    return max(known, key=version_order, default=None)


def in_cohort(device: str, sha256: str, percentage: int) -> bool:
    """Whether ``device`` is among the first ``percentage`` of 100 that may have bundle ``sha256``.

    A device keeps its place for one bundle, so that a raised percentage only adds devices; for
    another bundle others are first.
    """
    place = hashlib.sha256(f"{device} {sha256}".encode()).digest()
    return int.from_bytes(place, "big") % 100 < percentage


def decide(offer: Offer, known: Known, device: str) -> Decision:
    """What ``device`` should do about ``offer``.

    Raises UpdateError for an offer that no honest publisher makes, or only by mistake.
    """
    what = f"{offer.name} {offer.version}"
    if offer.sha256 == known.current:
        return Decision("nothing new", f"{what} is what this device runs")
    if offer.sha256 == known.pending:
        return Decision("pending", f"{what} is staged already and has to prove itself next")
    if offer.sha256 in known.failed:
        return Decision(
            "failed here before",
            f"{what} has failed on this device: {known.failed[offer.sha256]}; publish another one",
        )
    _check_version(offer, known)
    if not in_cohort(device, offer.sha256, offer.percentage):
        return Decision(
            "not in cohort",
            f"{what} is for {offer.percentage} % of the devices yet, and this is not among them",
        )
    return Decision("fetch", f"{what} is new")


def _check_version(offer: Offer, known: Known) -> None:
    if known.highest is None:
        if known.only_higher:
            raise UpdateError(
                "the clock of this device is behind, and without a version to compare with "
                f"nothing shows that {offer.name} {offer.version} is new; set the clock"
            )
        return
    offered, floor = version_order(offer.version), version_order(known.highest)
    if known.only_higher and offered <= floor:
        raise UpdateError(
            f"the clock of this device is behind, so that only a version above {known.highest} is "
            f"taken, got {offer.version}; set the clock"
        )
    if offered < floor and not offer.allow_lower:
        raise UpdateError(
            f"expected {offer.name} {known.highest} or newer, which this device has had, got "
            f"{offer.version}; if going back is meant, publish it as a rollback"
        )
