"""An MQTT broker: its address, and how one logs in there. It knows no messages.

Addresses are ``mqtt://[user@]host[:port]/TOPIC``, or ``mqtts://`` with TLS. Everything secret, and
all files of TLS, are named in the environment, which ``ps`` does not show: see ``Login``.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, urlsplit

from runtime.errors import FleetError

if TYPE_CHECKING:
    from paho.mqtt.client import Client

SCHEMES = ("mqtt", "mqtts")
PASSWORD = "FIELDFIT_MQTT_PASSWORD"
PASSWORD_FILE = "FIELDFIT_MQTT_PASSWORD_FILE"
AUTHORITIES = "FIELDFIT_MQTT_CA"
CERTIFICATE = "FIELDFIT_MQTT_CERTIFICATE"
KEY = "FIELDFIT_MQTT_KEY"

_PORTS = {"mqtt": 1883, "mqtts": 8883}
_MAX_PASSWORD_BYTES = 4096


class Address(NamedTuple):
    """A topic of a broker."""

    host: str
    port: int
    topic: str
    tls: bool
    user: str | None

    @classmethod
    def parse(cls, text: str, topic: str = "") -> "Address":
        """``topic`` is the one where the address has none; without it, it must have one.

        Raises FleetError for what is no address of a topic, and for one with a password.
        """
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.password is not None:
            raise FleetError(
                f"a broker's address is seen by all on this machine; put the password into a "
                f"file that {PASSWORD_FILE} names, or into {PASSWORD}"
            )
        found = parts.path.strip("/") or topic
        odd = parts.query or text.endswith("#") or parts.fragment or set("+\0") & {*found}
        if parts.scheme not in SCHEMES or not parts.hostname or not found or odd:
            raise FleetError(f"expected mqtt://host/topic or mqtts://host/topic, got {text}")
        return cls(
            parts.hostname, port or _PORTS[parts.scheme], found, parts.scheme == "mqtts",
            unquote(parts.username) if parts.username else None,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{'mqtts' if self.tls else 'mqtt'}://{self.host}:{self.port}/{self.topic}"


class Login(NamedTuple):
    """What the environment says beside the address; all of it may be absent."""

    password: str | None = None
    authorities: Path | None = None
    """Certificates (PEM) that the broker's is checked with, instead of the machine's own."""
    certificate: Path | None = None
    """This device's own certificate (PEM), where the broker asks for one."""
    key: Path | None = None
    """Of the certificate, if it is in a file of its own."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Login":
        """Raises FleetError for a file that cannot be read."""
        password = environment.get(PASSWORD)
        if PASSWORD_FILE in environment:
            password = _first_line(Path(environment[PASSWORD_FILE]))
        named = [environment.get(name) for name in (AUTHORITIES, CERTIFICATE, KEY)]
        authorities, certificate, key = (Path(name) if name else None for name in named)
        return cls(password, authorities, certificate, key)


def new_client(address: Address, name: str = "") -> "Client":
    """A client of MQTT 5 that has not been connected; ``name`` is its id at the broker.

    Raises FleetError without the paho-mqtt library, and for files of TLS that cannot be used.
    """
    try:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
    except ImportError as error:
        raise FleetError(
            f"MQTT needs the paho-mqtt library ({error}); pip install 'fieldfit[mqtt]'"
        ) from error
    login = Login.of(os.environ)
    client = Client(
        CallbackAPIVersion.VERSION2, client_id=name, protocol=MQTTProtocolVersion.MQTTv5
    )
    if address.user:
        client.username_pw_set(address.user, login.password)
    if address.tls:
        authorities, certificate, key = (str(file) if file else None for file in login[1:])
        try:
            client.tls_set(authorities, certificate, key)
        except (OSError, ValueError) as error:
            named = ", ".join(filter(None, (authorities, certificate, key)))
            raise FleetError(
                f"TLS: {named}: expected certificates and their key as PEM, got: {error}; see "
                f"{AUTHORITIES}, {CERTIFICATE} and {KEY}"
            ) from error
    return client


def _first_line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_PASSWORD_BYTES).decode().split("\n")[0].rstrip("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise FleetError(f"{PASSWORD_FILE}={path}: cannot be read: {error}") from error
