"""What waits in the outbox, brought to an MQTT broker: at least once, marked only when it has it.

``Sender`` is the loop's side; the sending itself is a process of its own, so that no broker, name
server or TLS library can ever hold the loop up. A record leaves the outbox when its PUBACK came:
a kill or a broken connection in between brings it again, under the same ``device`` and ``seq``.

Nothing is thrown away because of what a broker says or does. A record with which a connection
broke three times, or that a broker refused, is put aside in memory: the others go on, and it is
tried again when they are done. It knows no frames.
"""

import argparse
import random
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from runtime.command import run_command
from runtime.delivery.broker import Address, new_client
from runtime.errors import FleetError
from runtime.line.child import LINGER_S, Child, Lifeline, say
from runtime.line.outbox import Outbox, Row, is_whole

TOPIC = "fieldfit"
"""Where an address names none."""
WINDOW = 20
"""Records on their way at once; what most brokers allow."""
STRIKES = 3

_QOS = 1
_KEEPALIVE_S = 20
_ANSWER_S = 30.0
"""A broker that has not answered by then does not, whatever TCP says."""
_WAIT_S = 0.05
_LOOK_S = 0.5
"""Between two looks for a new status document."""
_HEADER_BYTES = 64
"""Of a message beside its topic and payload, at most."""
_STATUS = 0
"""The place of the status document among records, whose numbers begin with 1."""


class Patience(NamedTuple):
    """How long is waited before what is tried again, in seconds."""

    first: float = 0.5
    longest: float = 60.0
    aside: float = 60.0
    """Between two tries of records that were put aside."""


class SenderState(msgspec.Struct, frozen=True):
    """How sending goes."""

    connected: bool = False
    reason: str = "not started"
    """Why it is not connected."""
    acknowledged: int = 0
    """Since the process was started."""
    aside: int = 0
    """Records that made trouble and wait for a quiet moment."""


class Sender:
    """Brings an outbox to a broker as long as it is open.

    ``address`` is ``mqtt(s)://[user@]host[:port][/TOPIC]``. Records go to TOPIC/DEVICE/results,
    the newest status document is retained under TOPIC/status/DEVICE, where ``fieldfit fleet
    status mqtt(s)://host/TOPIC/status`` reads it.

    Raises FleetError for an address that is none, and for what ``new_client`` finds.
    """

    def __init__(
        self,
        outbox: Outbox,
        address: str,
        *,
        patience: Patience | None = None,
        tell: Callable[[str], object] | None = None,
    ) -> None:
        new_client(Address.parse(address, TOPIC))
        times = map(str, patience or Patience())
        arguments = [address, str(outbox.path), outbox.device, *times]
        self._child = Child(__name__, arguments, tell or _tell)
        self._state = SenderState()
        self.tend()

    def tend(self) -> SenderState:
        """How it goes; it never waits, and belongs into each turn of the loop."""
        lines = self._child.tend()
        if lines:
            self._state = msgspec.json.decode(lines[-1], type=SenderState)
        if self._child.pid is None:
            self._state = SenderState(reason="the sender does not run")
        return self._state

    @property
    def pid(self) -> int | None:
        """Of the process that sends, if it runs."""
        return self._child.pid

    def close(self) -> None:
        """Send what can be sent within two seconds, and end; the rest stays in the outbox."""
        self._child.close()

    def __enter__(self) -> "Sender":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# --- the process beside the loop


class Progress:
    """Which records are on their way, and which have made trouble. It knows no network."""

    def __init__(self) -> None:
        self.on_the_way: dict[int, int] = {}
        """Record by message id, in the order of sending."""
        self.known: set[int] = set()
        """Records that the broker has and the outbox does not know of yet."""
        self.aside: dict[int, None] = {}
        """In the order in which they are tried again."""
        self.last = 0
        """The highest record that was looked at on this connection."""
        self._strikes: dict[int, int] = {}

    def begin(self) -> None:
        """A new connection: what was on its way may or may not have arrived, so it goes again."""
        self.on_the_way.clear()
        self.last = 0

    def fresh(self, rows: list[Row]) -> Iterator[Row]:
        """Those of ``rows`` that are to be sent."""
        busy = {*self.known, *self.aside, *self.on_the_way.values()}
        for row in rows:
            self.last = max(self.last, row.seq)
            if row.seq not in busy:
                yield row

    def answered(self, message: int) -> int:
        """The record that the broker now has; troublemakers get another chance with the others."""
        seq = self.on_the_way.pop(message)
        self._strikes.pop(seq, None)
        if seq in self.aside:
            self.aside.clear()
            self._strikes.clear()
            self.last = 0
        self.known.add(seq)
        return seq

    def broken(self) -> int | None:
        """The connection broke: the record that is now put aside for it, if one is.

        Blame falls on the oldest that is on its way. A broker that was stopped while a good
        record was, three times in turn, costs that record its place in the queue and no more.
        """
        return self.strike(next(iter(self.on_the_way.values()))) if self.on_the_way else None

    def refused(self, message: int) -> int | None:
        """The broker said no to a record: that record, if it is now put aside for it.

        It may say so to all: the connection is given up, and tried again after a pause.
        """
        seq = self.on_the_way.pop(message)
        self.on_the_way.clear()  # for what then breaks they are not to blame
        return self.strike(seq)

    def strike(self, seq: int) -> int | None:
        """``seq`` made trouble: itself, if it is put aside for it now."""
        self._strikes[seq] = self._strikes.get(seq, 0) + 1
        return seq if self._strikes[seq] >= STRIKES and self.put_aside(seq) else None

    def put_aside(self, seq: int) -> bool:
        """Let all others go before ``seq``; False if they did already."""
        new = seq not in self.aside
        self.aside.pop(seq, None)
        self.aside[seq] = None
        return new


class _BrokenError(Exception):
    """The connection is over, and why."""


class _Post:
    """Connects, sends, waits, and connects again, until its lifeline is cut."""

    def __init__(self, outbox: Outbox, address: Address, patience: Patience) -> None:
        self.outbox = outbox
        self.address = address
        self.patience = patience
        self.progress = Progress()
        self.next_aside = 0.0
        self.acknowledged = 0
        self._state = SenderState(reason="connecting")

    def run(self, lifeline: Lifeline) -> None:
        """Return once the lifeline is cut and what can be sent soon is sent."""
        pause, draw = self.patience.first, random.Random()
        while not lifeline.cut():
            began, before = time.monotonic(), self.acknowledged
            try:
                self._connect(lifeline)
            except (_BrokenError, OSError, FleetError) as error:
                self._broken(str(error) or type(error).__name__)
            if self.acknowledged > before or time.monotonic() > began + self.patience.longest:
                pause = self.patience.first
            lifeline.cut(pause * draw.uniform(0.8, 1.2))  # a fleet must not come back at once
            pause = min(2 * pause, self.patience.longest)

    def report(self, *, connected: bool, reason: str = "") -> None:
        """Tell the loop how it goes, if that is new."""
        state = SenderState(connected, reason, self.acknowledged, len(self.progress.aside))
        if state != self._state:
            say(msgspec.json.encode(state))
        if (connected, reason) != (self._state.connected, self._state.reason):
            _tell(f"{self.address}: {'connected' if connected else reason}")
        self._state = state

    def tell_aside(self, seq: int | None, reason: str) -> None:
        """Say which record was put aside, if one was."""
        if seq is not None:
            what = f"record {seq}" if seq else "the status document"
            _tell(f"{self.address}: {what} is put aside and tried again later: {reason}")

    def _connect(self, lifeline: Lifeline) -> None:
        """One connection, until it breaks or all is done. Raises as ``_Connection``."""
        ending = float("inf")
        with _Connection(self) as connection:
            while time.monotonic() < ending and not (lifeline.cut() and connection.idle()):
                connection.turn()
                if lifeline.cut():
                    ending = min(ending, time.monotonic() + LINGER_S)

    def _broken(self, reason: str) -> None:
        self.tell_aside(self.progress.broken(), f"{STRIKES} connections broke with it: {reason}")
        self.report(connected=False, reason=reason)


class _Connection:
    """One connection. Each call raises _BrokenError, OSError or FleetError when it is over."""

    def __init__(self, post: _Post) -> None:
        self._post = post
        self._outbox, self._progress = post.outbox, post.progress
        self._progress.begin()
        topic, device = post.address.topic, post.outbox.device
        self._topics = f"{topic}/{device}/results", f"{topic}/status/{device}"
        self._document = b""
        self._window, self._most_bytes, self._retains = WINDOW, 0, True
        self._up, self._why = False, ""
        self._next_look = 0.0
        self._client = client = new_client(post.address, f"fieldfit-{device}")
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_publish = self._answered
        client.connect(post.address.host, post.address.port, _KEEPALIVE_S)
        self._heard = time.monotonic()

    def __enter__(self) -> "_Connection":
        return self

    def __exit__(self, *error: object) -> None:
        self._client.disconnect()

    def idle(self) -> bool:
        """Whether nothing is on its way, and nothing waits that could go."""
        on_the_way = len(self._progress.on_the_way)
        return not on_the_way and self._outbox.rows <= len(self._progress.aside)

    def turn(self) -> None:
        """Wait a little for the broker, hear what it says, and send what may go."""
        self._exchange()
        if self._why:
            raise _BrokenError(self._why)
        now = time.monotonic()
        if (self._progress.on_the_way or not self._up) and now - self._heard > _ANSWER_S:
            raise _BrokenError(f"no answer within {_ANSWER_S:g} s")
        if self._up:
            self._mark()
            self._send_records(now)
            self._look_around(now)

    def _exchange(self) -> None:
        """Paho's ``loop`` without its pair of sockets, which outlives the connection."""
        client, connection = self._client, self._client.socket()
        if connection is None:
            raise _BrokenError(self._why or "the connection broke")
        encrypted = getattr(connection, "pending", int)()  # bytes that select does not see
        writing = [connection] if client.want_write() else []
        wait_s = 0.0 if encrypted else _WAIT_S
        readable, writable, _ = select.select([connection], writing, [], wait_s)
        if readable or encrypted:
            client.loop_read()
        if writable:
            client.loop_write()
        client.loop_misc()

    def _mark(self) -> None:
        """Let the outbox know what the broker has; if it cannot be told now, then later."""
        known = sorted(self._progress.known)
        if known and self._outbox.sent(*known) is None:
            self._progress.known.clear()

    def _send_records(self, now: float) -> None:
        progress = self._progress
        room = self._window - len(progress.on_the_way)
        rows = self._outbox.unsent(room, progress.last) if room > 0 else []
        for row in progress.fresh(rows):
            if self._is_fit(row):
                self._publish(row.seq, row.payload, now)
        if not rows and not progress.on_the_way and now >= self._post.next_aside:
            self._post.next_aside = now + self._post.patience.aside
            self._try_aside(now)

    def _try_aside(self, now: float) -> None:
        """One of those that were put aside, and nothing beside it."""
        for seq in [*self._progress.aside]:
            if seq == _STATUS:
                self._progress.aside.pop(seq)  # the next look finds it again, or a newer one
                return
            row = next(iter(self._outbox.unsent(1, seq - 1)), None)
            if row is None or row.seq != seq:
                self._progress.aside.pop(seq)  # it was dropped meanwhile
            elif self._is_fit(row):
                self._publish(seq, row.payload, now)
                return

    def _look_around(self, now: float) -> None:
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_S
        self._post.report(connected=True)
        full = len(self._progress.on_the_way) >= self._window
        if full or self._document or _STATUS in self._progress.aside:
            return
        self._document = self._outbox.unsent_status() or b""
        if self._document:
            self._publish(_STATUS, self._document, now)

    def _is_fit(self, row: Row) -> bool:
        if not is_whole(row, self._outbox.device):
            self._outbox.refuse(row.seq, "it is damaged")
            return False
        size = len(row.payload) + len(self._topics[0]) + _HEADER_BYTES
        if self._most_bytes and size > self._most_bytes:
            reason = f"{size:,} bytes, and the broker takes {self._most_bytes:,}"
            if self._progress.put_aside(row.seq):
                self._post.tell_aside(row.seq, reason)
            return False
        return True

    def _publish(self, seq: int, payload: bytes, now: float) -> None:
        if not self._progress.on_the_way:
            self._heard = now
        topic = self._topics[seq == _STATUS]
        retain = seq == _STATUS and self._retains
        message = self._client.publish(topic, payload, _QOS, retain)
        self._progress.on_the_way[message.mid] = seq

    def _connected(self, client: Any, data: Any, flags: Any, reason: Any, limits: Any) -> None:
        if reason.is_failure:
            self._why = f"the broker refused: {reason}"
        elif getattr(limits, "MaximumQoS", _QOS) < _QOS:
            self._why = "the broker has no QoS 1, so it never says what it has got"
        else:
            self._up = True
            self._window = min(WINDOW, getattr(limits, "ReceiveMaximum", WINDOW))
            self._most_bytes = getattr(limits, "MaximumPacketSize", 0)
            self._retains = bool(getattr(limits, "RetainAvailable", True))
            self._post.report(connected=True)

    def _disconnected(self, client: Any, data: Any, flags: Any, reason: Any, *_: Any) -> None:
        self._why = self._why or f"the connection broke: {reason}"

    def _answered(self, client: Any, data: Any, message: int, reason: Any, *_: Any) -> None:
        self._heard = time.monotonic()
        if message not in self._progress.on_the_way:
            return
        if reason.is_failure:
            self._why = f"the broker refused what it was sent: {reason}"
            self._post.tell_aside(self._progress.refused(message), self._why)
            return
        seq = self._progress.answered(message)
        if seq == _STATUS:
            self._progress.known.discard(_STATUS)
            self._outbox.status_sent(self._document)
            self._document = b""
        else:
            self._post.acknowledged += 1


def _tell(sentence: str) -> None:
    print(f"fieldfit: {sentence}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Send until standard input ends."""
    parser = argparse.ArgumentParser(description="Started by the loop, and by nobody else.")
    parser.add_argument("address")
    parser.add_argument("outbox", type=Path)
    parser.add_argument("device")
    parser.add_argument("patience", type=float, nargs=len(Patience._fields))
    options = parser.parse_args(argv)
    return run_command("fieldfit", lambda: _send(options))


def _send(options: argparse.Namespace) -> int:
    address = Address.parse(options.address, TOPIC)
    with Outbox(options.outbox, options.device, synchronous="NORMAL") as outbox:
        _Post(outbox, address, Patience(*options.patience)).run(Lifeline())
    return 0


if __name__ == "__main__":
    sys.exit(main())
