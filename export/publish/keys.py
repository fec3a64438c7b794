"""Key files: made, kept under a passphrase, found by what they sign for, and unlocked once.

It knows no repository. A key is two files: ``ROLE-FINGERPRINT.pem``, the private key (ed25519,
PKCS#8, encrypted, mode 0600), and ``ROLE-FINGERPRINT.pub``, the public one, which is no secret.
"""

import getpass
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import CryptoSigner, Key, SSlibKey

from runtime import atomic
from runtime.errors import ExportError

PASSPHRASE = "FIELDFIT_PASSPHRASE"
"""Environment variable with the passphrase of every key that a command unlocks or makes."""

MAX_KEY_BYTES = 16384

KeyRole = Literal["root", "targets", "online"]

Passphrase = Callable[[str, bool], bytes]
"""Asks for the passphrase of a key by name; True where the key is new."""


class NewKey(NamedTuple):
    """A key that is not on disk yet."""

    role: KeyRole
    private: Ed25519PrivateKey
    public: SSlibKey

    @property
    def name(self) -> str:
        """The stem of its files."""
        return f"{self.role}-{fingerprint(self.public)}"


def generate(role: KeyRole) -> NewKey:
    """A new key for one role."""
    private = Ed25519PrivateKey.generate()
    return NewKey(role, private, SSlibKey.from_crypto(private.public_key()))


def fingerprint(key: Key | str) -> str:
    """What people compare: the first twelve digits of the key id, a SHA-256 of the public key."""
    return (key if isinstance(key, str) else key.keyid)[:12]


def save(keys: Iterable[NewKey], folder: Path, passphrase: Passphrase) -> None:
    """Write the files of ``keys``, after every passphrase is known.

    Raises ExportError for an empty passphrase or a key that is there already, and OSError.
    """
    made = [(key, passphrase(key.name, True)) for key in keys]
    if empty := [key.name for key, secret in made if not secret]:
        raise ExportError(f"{', '.join(empty)}: expected a passphrase, got an empty one")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for key, secret in made:
        _write_private(
            folder / f"{key.name}.pem",
            key.private.private_bytes(
                Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(secret)
            ),
        )
        atomic.write_bytes(
            folder / f"{key.name}.pub",
            key.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        )


def _write_private(path: Path, data: bytes) -> None:
    """Not through ``atomic``, whose files may be read by all."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def read_public(path: Path) -> SSlibKey:
    """The public key in a ``.pub`` file. Raises ExportError if there is none."""
    try:
        with path.open("rb") as file:
            key = load_pem_public_key(file.read(MAX_KEY_BYTES))
    except FileNotFoundError:
        raise ExportError(f"{path}: no such file; `keys new` writes one") from None
    except ValueError:
        raise ExportError(f"{path}: expected a public key (PEM), got something else") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ExportError(f"{path}: expected an ed25519 key, got {type(key).__name__}")
    return SSlibKey.from_crypto(key)


class Ring:
    """The keys at hand: those in some folders, unlocked when they are first needed."""

    def __init__(self, folders: Sequence[Path], passphrase: Passphrase) -> None:
        """Read the public halves in ``folders``. Raises ExportError for a folder without keys."""
        self._passphrase = passphrase
        self._files: dict[str, Path] = {}
        self._unlocked: dict[str, CryptoSigner] = {}
        for folder in folders:
            files = sorted(folder.glob("*.pub"))
            if not files:
                raise ExportError(f"{folder}: expected a folder with keys, found no *.pub there")
            for file in files:
                keyid = read_public(file).keyid
                if not self.has(keyid):
                    self._files[keyid] = file.with_suffix(".pem")

    def has(self, keyid: str) -> bool:
        """Whether the private half of this key is here."""
        return keyid in self._unlocked or (keyid in self._files and self._files[keyid].is_file())

    def add(self, key: NewKey) -> None:
        """Have a key at hand that was just made."""
        self._unlocked[key.public.keyid] = CryptoSigner(key.private, key.public)

    def signers(self, keyids: Iterable[str]) -> list[CryptoSigner]:
        """Signers for those of ``keyids`` that are here.

        Raises ExportError for a wrong passphrase or a damaged key.
        """
        return [self._signer(keyid) for keyid in keyids if self.has(keyid)]

    def _signer(self, keyid: str) -> CryptoSigner:
        if keyid not in self._unlocked:
            self._unlocked[keyid] = self._unlock(self._files[keyid], keyid)
        return self._unlocked[keyid]

    def _unlock(self, path: Path, keyid: str) -> CryptoSigner:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_BYTES)
        try:
            private = load_pem_private_key(data, self._passphrase(path.stem, False) or None)
        except TypeError:  # what cryptography raises for an empty one
            raise ExportError(f"{path}: expected its passphrase, got an empty one") from None
        except ValueError:
            raise ExportError(
                f"{path}: cannot be unlocked: wrong passphrase, or a damaged file"
            ) from None
        if not isinstance(private, Ed25519PrivateKey):
            raise ExportError(f"{path}: expected an ed25519 key, got {type(private).__name__}")
        signer = CryptoSigner(private)
        if signer.public_key.keyid != keyid:
            raise ExportError(f"{path}: is not the private half of {path.stem}.pub beside it")
        return signer


def passphrases(file: Path | None) -> Passphrase:
    """Where passphrases come from: ``file``, else the environment, else the terminal.

    Raises ExportError, when asked, if there is none of the three.
    """

    def ask(name: str, new: bool) -> bytes:
        if file is not None:
            try:
                return file.read_bytes().rstrip(b"\r\n")
            except FileNotFoundError:
                raise ExportError(f"{file}: no such file; expected the keys' passphrase") from None
        if PASSPHRASE in os.environ:
            return os.environ[PASSPHRASE].encode()
        if not sys.stdin.isatty():
            raise ExportError(
                f"{name}: no terminal to ask for its passphrase; say --passphrase-file FILE or "
                f"set {PASSPHRASE}"
            )
        secret = getpass.getpass(f"passphrase {'for the new key' if new else 'of'} {name}: ")
        if new and getpass.getpass("again: ") != secret:
            raise ExportError(f"{name}: the two passphrases differ; nothing was written")
        return secret.encode()

    return ask
