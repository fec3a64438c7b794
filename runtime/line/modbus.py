"""The last verdict as Modbus/TCP registers, for a PLC to read and for nobody to write.

The map is in docs/results.md and in ``registers``, which is pure. The server is a process of its
own: a loop that hangs cannot keep it from saying so, and a client cannot hold the loop up. What a
PLC finds is NOT INSPECTED from the moment that the loop is silent; when the loop is gone, so is
the server. It knows no frames.
"""

import argparse
import asyncio
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from runtime.command import run_command
from runtime.errors import FleetError
from runtime.line.child import Child
from runtime.line.verdict import Verdict, Word

MAP_VERSION = 1
CODES: dict[Word, int] = {"NOT INSPECTED": 0, "OK": 1, "DEFECT": 2, "ABSTAIN": 3}
NAMES = (
    "map version", "verdict", "state", "class index", "sequence, high word", "sequence, low word",
    "heartbeat", "verdict age, ms", "loop age, ms", "score, 1/10000",
)  # fmt: skip
"""Of the registers, which begin at address 0."""

HOST, PORT = "127.0.0.1", 5020
STALE_S = 1.0
HEARTBEAT_S = 0.5
NONE = 0xFFFF
"""No class, no score, or an age of 65.5 s and more."""

VALID, NOTHING_YET, STALE, FAULT = range(4)
"""The state: why the verdict is what it is."""

_READS = (3, 4)
"""Read holding registers, read input registers: the same here."""
_CHUNK = 65536


class Shown(NamedTuple):
    """What the loop last said; the child is told all of it each time, so that no loss lasts."""

    beat: float
    """When the loop was last seen, by ``time.monotonic``, which all processes share."""
    given: float
    """When the verdict was given."""
    verdict: int = 0
    state: int = NOTHING_YET
    class_index: int = NONE
    seq: int = 0
    score: int = NONE

    def packed(self) -> bytes:
        """As it goes to the child."""
        return _SHOWN.pack(*self)

    @classmethod
    def last_in(cls, data: bytes) -> "tuple[Shown | None, bytes]":
        """The last whole one in ``data``, and what has begun after it."""
        whole = len(data) - len(data) % _SHOWN.size
        last = data[whole - _SHOWN.size : whole]
        return (cls(*_SHOWN.unpack(last)) if last else None), data[whole:]


_SHOWN = struct.Struct("=ddHHHIH")


def registers(shown: Shown, now: float) -> list[int]:
    """The registers of ``NAMES`` at ``now``.

    The heartbeat follows the moments in which the loop was seen, so it stands still with it.
    """
    _, _, verdict, state, class_index, _, score = shown
    if now - shown.beat > STALE_S:
        state = STALE
    if state != VALID:
        verdict, class_index, score = CODES["NOT INSPECTED"], NONE, NONE
    return [
        MAP_VERSION,
        verdict,
        state,
        class_index,
        shown.seq >> 16 & 0xFFFF,
        shown.seq & 0xFFFF,
        int(shown.beat / HEARTBEAT_S) & 1,
        _ms(now - shown.given),
        _ms(now - shown.beat),
        score,
    ]


def _ms(seconds: float) -> int:
    return min(max(0, int(seconds * 1000)), NONE)


class Registers:
    """The loop's side: show verdicts, say faults, and beat in each turn.

    ``address`` is ``[HOST:]PORT``; it listens on this machine alone unless told otherwise, since
    Modbus knows no passwords. ``labels`` give the class index. ``beat`` must come at least every
    ``STALE_S`` seconds, also while there are no frames.

    Raises FleetError for an address that is none or cannot be had, and without pymodbus.
    """

    def __init__(
        self,
        labels: Sequence[str],
        address: str = f"{HOST}:{PORT}",
        *,
        tell: Callable[[str], object] | None = None,
    ) -> None:
        try:
            import pymodbus.simulator  # noqa: F401
        except ImportError as error:
            raise FleetError(
                f"Modbus needs the pymodbus library ({error}); pip install 'fieldfit[modbus]'"
            ) from error
        host, port = listening_address(address)
        _try_to_listen(host, port)
        self._labels = {label: index for index, label in enumerate(labels)}
        now = time.monotonic()
        self._shown = Shown(now, now)
        self._child = Child(__name__, [host, str(port)], tell or _tell)
        self._send()

    def show(self, verdict: Verdict) -> None:
        """From now on this is what a PLC reads."""
        score = NONE if verdict.score is None else round(verdict.score * 10_000)
        fault = verdict.verdict == "NOT INSPECTED"
        self._shown = self._shown._replace(
            given=time.monotonic(),
            verdict=CODES[verdict.verdict],
            state=FAULT if fault else VALID,
            class_index=self._labels.get(verdict.label or "", NONE),
            seq=verdict.seq & 0xFFFF_FFFF,
            score=score,
        )
        self._send()

    def fault(self) -> None:
        """Something is wrong that has no verdict of its own: NOT INSPECTED until the next."""
        self._shown = self._shown._replace(given=time.monotonic(), state=FAULT)
        self._send()

    def beat(self) -> None:
        """The loop is alive; it never waits. After a silence the last verdict stays void."""
        if time.monotonic() - self._shown.beat > STALE_S:
            self._shown = self._shown._replace(state=STALE)
        self._send()

    @property
    def pid(self) -> int | None:
        """Of the process that serves, if it runs."""
        return self._child.pid

    def close(self) -> None:
        """Stop serving."""
        self._child.close()

    def __enter__(self) -> "Registers":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _send(self) -> None:
        self._child.tend()
        self._shown = self._shown._replace(beat=time.monotonic())
        self._child.feed(self._shown.packed())


def listening_address(text: str) -> tuple[str, int]:
    """Host and port of ``[HOST:]PORT``. Raises FleetError for anything else."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 65536 or set("/@ ") & {*host}:
        raise FleetError(f"expected [HOST:]PORT such as {HOST}:{PORT}, got {text!r}")
    return host.strip("[]") or HOST, int(port)


def _try_to_listen(host: str, port: int) -> None:
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as attempt:
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            attempt.bind(place)
            attempt.listen()
    except OSError as error:
        raise FleetError(
            f"Modbus: cannot listen on {host}:{port}: {error.strerror}; choose another port, or "
            "for one below 1024 let the service have CAP_NET_BIND_SERVICE"
        ) from error


# --- the process beside the loop


async def _serve(host: str, port: int) -> None:
    from pymodbus.constants import ExcCodes
    from pymodbus.server import ModbusTcpServer
    from pymodbus.simulator import DataType, SimData, SimDevice

    now = time.monotonic()
    shown, rest = Shown(now, now), b""

    def hear() -> None:
        nonlocal shown, rest
        data = os.read(0, _CHUNK)
        if not data:
            ended.set()
            return
        last, rest = Shown.last_in(rest + data)
        shown = last or shown

    async def answer(
        function: int, start: int, address: int, count: int, values: list[int], new: Any
    ) -> ExcCodes | None:
        if function not in _READS:
            return ExcCodes.ILLEGAL_FUNCTION
        values[: len(NAMES)] = registers(shown, time.monotonic())
        return None

    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, hear)
    data = SimData(0, values=[0] * len(NAMES), datatype=DataType.REGISTERS)
    device = SimDevice(0, data, action=answer)  # 0: whatever unit id a client asks for
    server = ModbusTcpServer(device, address=(host, port))
    await server.serve_forever(background=True)
    await ended.wait()
    await server.shutdown()  # type: ignore[no-untyped-call]


def _tell(sentence: str) -> None:
    print(f"fieldfit: {sentence}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(description="Started by the loop, and by nobody else.")
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    options = parser.parse_args(argv)
    return run_command("fieldfit", lambda: _run(options.host, options.port))


def _run(host: str, port: int) -> int:
    asyncio.run(_serve(host, port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
