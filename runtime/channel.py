"""What a channel offers its devices: the one signed document that publishing and updating share.

It knows neither keys nor networks: who signed the document, and how it got here, is the business
of ``export.publish`` on the workstation and of the update on the device.
"""

import hashlib
from typing import Annotated, Literal

import msgspec

from runtime.errors import UpdateError
from runtime.manifest import Sha256

MAX_CHANNEL_BYTES = 4096

ChannelName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z")]
BundlePath = Annotated[
    str, msgspec.Meta(pattern=r"^bundles/[A-Za-z0-9][A-Za-z0-9._+-]{0,199}\.zip\Z")
]
Version = Annotated[str, msgspec.Meta(pattern=r"^[0-9]+(\.[0-9]+)*[a-z0-9.+-]*\Z", max_length=64)]
Percent = Annotated[int, msgspec.Meta(ge=1, le=100)]


class Channel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the devices of one channel are to run."""

    format: Literal[1] = 1
    channel: ChannelName
    name: str
    """Of the model, as in the bundle's manifest."""
    version: Version
    bundle: BundlePath
    """The bundle's target path."""
    sha256: Sha256
    """Of the bundle's zip."""
    size: Annotated[int, msgspec.Meta(gt=0)]
    """Of the bundle's zip in bytes."""
    cohort: Percent = 100
    """Percentage of the channel's devices that it is for; see ``in_cohort``."""
    allow_lower: bool = False
    """An operator's rollback: the version may be lower than what a device has had."""
    highest: Version
    """The highest version that this channel has ever offered: what devices may have as a floor."""


def channel_path(channel: str) -> str:
    """The target path of a channel's document."""
    return f"channels/{channel}.json"


def bundle_path(name: str, version: str) -> str:
    """The target path of a bundle."""
    return f"bundles/{name}-{version}.zip"


def encode(channel: Channel) -> bytes:
    """The document's bytes; equal channels give equal bytes."""
    return msgspec.json.format(msgspec.json.encode(channel), indent=1) + b"\n"


def decode(data: bytes) -> Channel:
    """The channel in ``data``. Raises UpdateError if it is no such document, or a newer one."""
    try:
        return msgspec.json.decode(data, type=Channel)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UpdateError(
            f"channel document: {error}; if it is of a newer format, update fieldfit here"
        ) from error


def in_cohort(device_id: str, channel: Channel) -> bool:
    """Whether ``channel`` is meant for this device.

    Who goes first is drawn anew for each bundle, by a hash: raising the percentage adds devices
    and takes none out.
    """
    digest = hashlib.sha256(f"{channel.sha256}:{device_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") * 100 < channel.cohort << 64
