"""Who may ask from where: loopback, or tokens, or certificates. It knows no requests.

What listens beyond this machine must know its clients: by a token (RFC 6750, "Bearer") or by a
certificate that a given authority signed (mutual TLS). There is no third way to expose it.
"""

import hmac
import ipaddress
import ssl
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from runtime.errors import ServeError

LEAST_TOKEN = 20
"""Characters: what `openssl rand -hex 16` prints is longer."""

_MOST_BYTES = 64 * 1024


class Certificates(NamedTuple):
    """Files of TLS, in PEM."""

    cert: Path
    """This service's, with what leads to its authority."""
    key: Path
    client_ca: Path | None
    """The authority that signs clients' certificates; None asks them for none."""


class Tokens:
    """Secrets of which a client must know one."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = [token.encode() for token in tokens]

    @classmethod
    def read(cls, path: Path) -> "Tokens":
        """One token a line, so that a new one can be given out before the old one goes.

        Raises ServeError if the file cannot be read, others may read it, or a token is short.
        """
        try:
            mode = path.stat().st_mode
            with path.open("rb") as file:
                data = file.read(_MOST_BYTES)
        except OSError as error:
            raise ServeError(f"{path}: cannot be read: {error.strerror}") from error
        if mode & stat.S_IRWXO:
            raise ServeError(f"{path}: any user may read these tokens; chmod o= {path}")
        tokens = data.decode(errors="replace").split()
        short = [token for token in tokens if len(token) < LEAST_TOKEN]
        if short or not tokens or not data.isascii():
            raise ServeError(
                f"{path}: expected one token a line, each of {LEAST_TOKEN} or more ASCII "
                f"characters; make one with: openssl rand -hex 32"
            )
        return cls(tokens)

    def allow(self, authorization: bytes | None) -> bool:
        """Whether an ``Authorization`` header names one of them; takes as long for any answer."""
        scheme, _, token = (authorization or b"").partition(b" ")
        found = [hmac.compare_digest(token.strip(), known) for known in self._tokens]
        return scheme.lower() == b"bearer" and any(found)


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can ask there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(
    host: str, tokens: Tokens | None, certificates: Certificates | None, option: str = "--host"
) -> None:
    """Raises ServeError if anybody can ask ``host``, which ``option`` named, from elsewhere."""
    known = tokens is not None or (certificates is not None and certificates.client_ca is not None)
    if not (known or is_loopback(host)):
        raise ServeError(
            f"{option} {host} can be asked from elsewhere, so it must know its clients: add "
            "--token-file FILE, or --cert, --key and --client-ca for mutual TLS; "
            "without, only 127.0.0.1 and ::1 are served"
        )


def tls_context(certificates: Certificates) -> ssl.SSLContext:
    """TLS 1.2 or newer, and a certificate of every client if there is an authority for them.

    Raises ServeError naming the file that is none.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    pair = f"{certificates.cert}, {certificates.key}"
    try:
        # A key with a passphrase would ask for it at a terminal that a service has not.
        context.load_cert_chain(certificates.cert, certificates.key, password=lambda: b"")
    except (OSError, ValueError) as error:
        raise ServeError(
            f"{pair}: expected a certificate and its key without a passphrase, in PEM: {error}"
        ) from error
    if certificates.client_ca is not None:
        try:
            context.load_verify_locations(certificates.client_ca)
        except OSError as error:
            raise ServeError(
                f"{certificates.client_ca}: expected certificates in PEM: {error}"
            ) from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context
