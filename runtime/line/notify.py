"""Tell systemd that the line is ready, alive, and what it does (sd_notify(3)).

One datagram to a socket whose name the service manager gives; without one, nothing is said. It
knows nothing of the line: who calls ``alive`` decides what being alive means.
"""

import os
import socket
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress


class Notifier:
    """The way to the service manager, if there is one. Make one with ``from_environment``."""

    def __init__(
        self,
        address: str = "",
        watchdog_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._interval_s = watchdog_s / 4 if watchdog_s else None
        self._clock = clock
        self._due = 0.0

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ) -> "Notifier":
        """What the service manager asks of this process; its children are not to answer for it."""
        address = environment.pop("NOTIFY_SOCKET", "")
        pid = environment.pop("WATCHDOG_PID", str(os.getpid()))
        microseconds = environment.pop("WATCHDOG_USEC", "")
        asked = pid == str(os.getpid()) and microseconds.isdecimal()
        return cls(address, int(microseconds) / 1e6 if asked else None)

    def ready(self, status: str) -> None:
        """The engine is open and frames may come."""
        self._send(f"READY=1\nSTATUS={status}")

    def alive(self) -> None:
        """Feed the watchdog, at most four times in its interval."""
        if self._interval_s is not None and self._clock() >= self._due:
            self._due = self._clock() + self._interval_s
            self._send("WATCHDOG=1")

    def status(self, status: str) -> None:
        """What ``systemctl status`` shows, one line."""
        self._send(f"STATUS={status}")

    def stopping(self) -> None:
        """The line ends; what is left is to close what it holds."""
        self._send("STOPPING=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        # A manager that is away, or that reads nothing, must not hold up the line.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out, suppress(OSError):
            out.setblocking(False)
            out.sendto(message.encode(), self._address)
