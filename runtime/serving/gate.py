"""Who may come in: places in the queue, bytes held and memory to work in, each with an end.

Pure counts; it knows no HTTP and no model. Whoever does not get what it asks for is told so at
once, before anything was done for it: a queue without an end answers everybody too late.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

from runtime.serving.refusal import Refusal

MIB = 1024 * 1024


class Limits(NamedTuple):
    """What a service grants its clients; together they bound its memory."""

    body_bytes: int = 16 * MIB
    """Of one request."""
    held_bytes: int = 32 * MIB
    """Bodies and decoded images of all requests together."""
    work_bytes: int = 160 * MIB
    """What decoding may take at any time, by estimate."""
    places: int = 32
    """Requests that are whole and wait for their answer."""
    images: int = 64
    """Of one request."""
    connections: int = 256
    client_s: float = 30.0
    """How long a client may take to send one request, or to take its answer."""
    shutdown_s: float = 10.0
    """How long a service that ends works on what it took."""


def overloaded() -> Refusal:
    """All places are taken."""
    return Refusal(503, "overload", "all places are taken; try again", retry_after=1)


class Gate:
    """Places and bytes of one service. Any thread may ask."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._taken = 0
        self._held = 0

    @property
    def full(self) -> bool:
        """Whether no place is free: nothing need be read of a request that will not get one."""
        return self._taken >= self.limits.places

    @property
    def taken(self) -> int:
        """Places that are taken."""
        return self._taken

    @property
    def held(self) -> int:
        """Bytes held."""
        return self._held

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place for one request. Raises Refusal if none is free."""
        with self._lock:
            if self._taken >= self.limits.places:
                raise overloaded()
            self._taken += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken -= 1

    @contextlib.contextmanager
    def holding(self) -> Iterator["Held"]:
        """What one request holds, given back at the end."""
        held = Held(self)
        try:
            yield held
        finally:
            self._hold(-held.count)

    def _hold(self, count: int) -> None:
        with self._lock:
            if count > 0 and self._held + count > self.limits.held_bytes:
                raise overloaded()
            self._held += count


class Held:
    """The bytes that one request holds."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.count = 0

    def add(self, count: int) -> None:
        """Hold ``count`` bytes more.

        Raises Refusal if there is no room for them now, or never will be.
        """
        most = self._gate.limits.held_bytes
        if self.count + count > most:
            raise Refusal(
                413, "too large",
                f"expected at most {most:,} bytes of image data in one request, got "
                f"{self.count + count:,}; send fewer images at a time",
            )  # fmt: skip
        self._gate._hold(count)
        self.count += count


class Workspace:
    """Memory that decoders share: each takes what it will need, and waits until that is free."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = total
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, count: int) -> Iterator[None]:
        """Have ``count`` bytes. More than there are in all are had alone."""
        count = min(count, self.total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()
