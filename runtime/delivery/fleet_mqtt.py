"""Documents over MQTT: a device leaves its newest one retained under TOPIC/ID, a reader takes all.

Documents are signed: the broker is trusted with nothing but carrying them. It does not know what
they say.
"""

import threading
import time
from typing import Any

from runtime.delivery.broker import Address, new_client
from runtime.delivery.fleet import MAX_DEVICES
from runtime.delivery.status_document import MAX_STATUS_BYTES
from runtime.errors import FleetError

TIMEOUT_S = 20.0
QUIET_S = 2.0
"""MQTT does not say which retained message is the last: so much silence does."""

_QOS = 1
_HEADER_BYTES = 1024
"""Of a message beside its payload: the topic and properties."""


def publish(address: Address, device: str, document: bytes, timeout_s: float = TIMEOUT_S) -> None:
    """Leave a document retained at the broker; returns once the broker has taken it.

    Raises FleetError if it does not within ``timeout_s``.
    """
    with _Connection(address, timeout_s) as connection:
        message = connection.client.publish(
            f"{address.topic}/{device}", document, _QOS, retain=True
        )
        while not message.is_published():
            connection.check()
            time.sleep(0.01)


def collect(
    address: Address, *, quiet_s: float = QUIET_S, timeout_s: float = TIMEOUT_S
) -> list[tuple[str, bytes]]:
    """All documents under the topic, by the last part of their own: as ``fleet.survey`` takes them.

    Of one that is too large only what is needed to refuse it is kept.

    Raises FleetError if the broker does not answer within ``timeout_s``.
    """
    found: dict[str, bytes] = {}
    came = threading.Event()

    def take(client: Any, data: Any, message: Any) -> None:
        if len(found) < MAX_DEVICES:
            found[message.topic.rpartition("/")[2]] = message.payload[: MAX_STATUS_BYTES + 1]
        came.set()

    with _Connection(address, timeout_s) as connection:
        connection.client.on_message = take
        connection.subscribe(f"{address.topic}/+")
        while came.wait(quiet_s) and not connection.late():
            came.clear()
    return sorted(found.items())


class _Connection:
    """A connected client and its deadline."""

    def __init__(self, address: Address, timeout_s: float) -> None:
        self._address = address
        self._deadline = time.monotonic() + timeout_s
        self._up, self._subscribed = threading.Event(), threading.Event()
        self._refused = ""
        self.client = new_client(address)
        self.client.on_connect = self._connected
        self.client.on_subscribe = lambda *_: self._subscribed.set()
        # paho is an extra, and new_client is who says so where it is missing.
        from paho.mqtt.packettypes import PacketTypes
        from paho.mqtt.properties import Properties

        limits = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        limits.MaximumPacketSize = MAX_STATUS_BYTES + _HEADER_BYTES
        try:
            self.client.connect(address.host, address.port, properties=limits)
        except OSError as error:
            raise FleetError(f"{address}: cannot be reached: {error.strerror or error}") from error

    def __enter__(self) -> "_Connection":
        self.client.loop_start()
        try:
            self._wait(self._up)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def subscribe(self, topic: str) -> None:
        """Returns once the broker has agreed."""
        self.client.subscribe(topic, _QOS)
        self._wait(self._subscribed)

    def late(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self._deadline

    def check(self) -> None:
        """Raises FleetError if the broker refused, or the time is up."""
        if self._refused:
            raise FleetError(f"{self._address}: the broker refused: {self._refused}")
        if self.late():
            raise FleetError(f"{self._address}: the broker did not answer in time")

    def _wait(self, event: threading.Event) -> None:
        while not event.wait(0.05):
            self.check()
        self.check()

    def _connected(self, client: Any, data: Any, flags: Any, reason: Any, *_: Any) -> None:
        if reason.is_failure:
            self._refused = str(reason)
        self._up.set()
