"""Who a device is: a random id, a name for people, and the key that it signs with.

Both lie in the device's state folder, are made once and never change by themselves; the private
key never leaves it. An operator who has the public document in a folder of devices knows whose
signature is whose. It does not know what is signed. Keys and signatures are Ed25519 (RFC 8032) by
the `cryptography` library, which only this module imports, and only when a key is needed.
"""

import contextlib
import functools
import hashlib
import os
import re
import secrets
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import msgspec

from runtime import atomic
from runtime.errors import EngineError, FleetError
from runtime.private_files import read_private

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

IDENTITY = "device.json"
KEY = "device.key"
MAX_NAME = 80

_MAX_BYTES = 4096
_SIGNATURE = 64
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

DeviceId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What ``device.json`` holds."""

    format: Literal[1] = 1
    id: DeviceId
    """Random, and the same for as long as the state folder lives."""
    name: Name
    """What people call it; the host's name until somebody says otherwise."""


class PublicKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The public document of a device: what an operator registers as ``ID.pub.json``."""

    format: Literal[1] = 1
    id: DeviceId
    name: Name
    ed25519: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    """The raw public key, 32 bytes in hexadecimal."""

    @property
    def fingerprint(self) -> str:
        """To compare by eye with what the device itself shows, e.g. ``3f2a-90c1-…``."""
        digest = hashlib.sha256(bytes.fromhex(self.ed25519)).hexdigest()
        return "-".join(digest[start : start + 4] for start in range(0, 24, 4))

    def verify(self, signature: bytes, data: bytes) -> bool:
        """Whether this device signed ``data``."""
        _need_cryptography()
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.ed25519))
            key.verify(signature, data)
        except (InvalidSignature, ValueError):
            return False
        return len(signature) == _SIGNATURE


def device(state: Path, name: str | None = None) -> Device:
    """The device that this state folder belongs to; made at the first call.

    ``name`` is kept if it is given. Needs no key and no library beside msgspec.

    Raises FleetError if ``device.json`` is damaged or not ours, or the name is no name.
    """
    path = state / IDENTITY
    if name is not None:
        check_name(name)
    if not path.exists():
        given = _UNPRINTABLE.sub("", socket.gethostname())[:MAX_NAME] or "device"
        made = Device(id=secrets.token_hex(16), name=name or given)
        _make_once(path, _encode(made), 0o644)
    known = _decode(_read(path), Device, path)
    if name is None or name == known.name:
        return known
    renamed = msgspec.structs.replace(known, name=name)
    atomic.write_bytes(path, _encode(renamed))
    return renamed


class Identity:
    """A device together with its private key: it can sign. Make one with ``Identity.open``."""

    def __init__(self, device: Device, key: "Ed25519PrivateKey") -> None:
        self.device = device
        self._key = key

    @classmethod
    def open(cls, state: Path, name: str | None = None) -> "Identity":
        """The identity in the state folder; id and key are made where there are none yet.

        Raises FleetError without the library, and for a key that is damaged or that others can
        read.
        """
        _need_cryptography()
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        known = device(state, name)
        path = state / KEY
        if not path.exists():
            pem = Ed25519PrivateKey.generate().private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            _make_once(path, pem, 0o600)
        data = _read(path, secret=True)
        try:
            key = serialization.load_pem_private_key(data, password=None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise FleetError(
                f"{path}: expected a whole Ed25519 key, got something else; remove it and enroll "
                "this device again: fieldfit fleet enroll"
            )
        return cls(known, key)

    @functools.cached_property
    def public(self) -> PublicKey:
        """What may be told of it."""
        raw = self._key.public_key().public_bytes_raw()
        return PublicKey(id=self.device.id, name=self.device.name, ed25519=raw.hex())

    def sign(self, data: bytes) -> bytes:
        """The signature of ``data``, 64 bytes."""
        return self._key.sign(data)


def encode_public(public: PublicKey) -> bytes:
    """The public document as it lies in a folder of devices."""
    return _encode(public)


def read_public(path: Path) -> PublicKey:
    """The public document in ``path``, an operator's file.

    Raises FleetError if it is none, or bears another device's name.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise FleetError(f"{path}: cannot be read: {error.strerror}") from error
    public = _decode(data, PublicKey, path)
    if path.name != f"{public.id}.pub.json":
        raise FleetError(f"{path}: expected the key of that device, got that of {public.id}")
    return public


def check_name(name: str) -> None:
    """Raises FleetError unless ``name`` can be shown in a line."""
    if not 0 < len(name) <= MAX_NAME or _UNPRINTABLE.search(name):
        raise FleetError(
            f"expected a name of 1 to {MAX_NAME} printable characters, got {name[:MAX_NAME]!r}"
        )


def _need_cryptography() -> None:
    try:
        import cryptography.hazmat.primitives.asymmetric.ed25519  # noqa: F401
    except ImportError as error:
        raise FleetError(
            f"signatures need the cryptography library ({error}); pip install 'fieldfit[fleet]'"
        ) from error


def _encode(document: Device | PublicKey) -> bytes:
    return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"


_Document = TypeVar("_Document", Device, PublicKey)


def _decode(data: bytes, kind: type[_Document], path: Path) -> _Document:
    try:
        if len(data) > _MAX_BYTES:
            raise msgspec.DecodeError(f"more than {_MAX_BYTES:,} bytes")
        document = msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FleetError(f"{path}: damaged, or of another version: {error}") from error
    check_name(document.name)
    return document


def _read(path: Path, *, secret: bool = False) -> bytes:
    try:
        data = read_private(path, _MAX_BYTES)
        exposed = secret and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    except EngineError as error:
        raise FleetError(
            f"{path}: expected a small plain file of this user, that no other can write; check "
            f"its owner and run: chmod {'600' if secret else '644'} {path}"
        ) from error
    if exposed:
        raise FleetError(
            f"{path}: other users can read this private key; run: chmod 600 {path}, and if one "
            "may have, remove it and enroll this device again: fieldfit fleet enroll"
        )
    return data


def _make_once(path: Path, data: bytes, mode: int) -> None:
    """Write ``path`` whole, unless another process was first; its file then stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(temporary)  # unlike a rename it replaces nothing
    finally:
        temporary.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
