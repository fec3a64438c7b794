"""Verdicts as Modbus registers: read by a real client, written by nobody, void when the loop is."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime.errors import FleetError
from runtime.line.modbus import (
    FAULT,
    HEARTBEAT_S,
    MAP_VERSION,
    NAMES,
    NONE,
    NOTHING_YET,
    STALE,
    STALE_S,
    VALID,
    Registers,
    Shown,
    listening_address,
    registers,
)
from runtime.line.verdict import Verdict, Word, numbered
from tests.outbox_stories import DEVICE, FINDING

pytest.importorskip("pymodbus", reason="no pymodbus: pip install 'fieldfit[modbus]'")

LABELS = ("good", "crack", "dust")
AT = {name: address for address, name in enumerate(NAMES)}
SHOWN = Shown(beat=100.0, given=99.5, verdict=2, state=VALID, class_index=1, seq=70_000, score=9000)


def verdict(word: Word = "DEFECT", label: str | None = "crack", seq: int = 70_000) -> Verdict:
    finding = msgspec.structs.replace(FINDING, verdict=word, label=label, score=0.9)
    return numbered(finding, DEVICE, seq)


# --- the map


def test_the_map_is_as_documented() -> None:
    assert dict(zip(NAMES, registers(SHOWN, 100.25), strict=True)) == {
        "map version": MAP_VERSION,
        "verdict": 2,
        "state": VALID,
        "class index": 1,
        "sequence, high word": 1,
        "sequence, low word": 70_000 - 65_536,
        "heartbeat": 0,
        "verdict age, ms": 750,
        "loop age, ms": 250,
        "score, 1/10000": 9000,
    }


def test_the_page_has_the_same_map() -> None:
    page = (Path(__file__).parent.parent / "docs" / "results.md").read_text()
    assert tuple(re.findall(r"^\| \d \| ([^|]+) \|", page, re.MULTILINE)) == NAMES


@pytest.mark.parametrize("state", [NOTHING_YET, STALE, FAULT])
def test_a_verdict_that_does_not_hold_is_not_inspected(state: int) -> None:
    found = registers(SHOWN._replace(state=state), 100.0)
    assert (found[AT["verdict"]], found[AT["state"]]) == (0, state)
    assert (found[AT["class index"]], found[AT["score, 1/10000"]]) == (NONE, NONE)


def test_a_silent_loop_has_inspected_nothing_and_its_heart_stands_still() -> None:
    assert registers(SHOWN, 100.0 + STALE_S)[AT["state"]] == VALID
    late = [registers(SHOWN, 101.01 + more) for more in (0.0, HEARTBEAT_S, 100.0)]
    assert [found[AT["verdict"]] for found in late] == [0, 0, 0]
    assert {found[AT["state"]] for found in late} == {STALE}
    assert len({found[AT["heartbeat"]] for found in late}) == 1
    assert late[-1][AT["loop age, ms"]] == NONE


def test_the_heart_beats_with_the_loop() -> None:
    beats = [registers(SHOWN._replace(beat=at), at)[AT["heartbeat"]] for at in (5, 5.5, 6, 6.5)]
    assert beats == [0, 1, 0, 1]


def test_what_is_told_in_pieces_is_put_together_and_the_last_counts() -> None:
    newer = SHOWN._replace(seq=70_001)
    data = SHOWN.packed() + newer.packed()
    assert Shown.last_in(data) == (newer, b"")
    last, rest = Shown.last_in(data[:-3])
    assert (last, len(rest)) == (SHOWN, len(SHOWN.packed()) - 3)
    assert Shown.last_in(rest + data[-3:]) == (newer, b"")
    assert Shown.last_in(b"") == (None, b"")


@pytest.mark.parametrize("text", ["", "host", "host:", "host:0", "host:65536", "http://a:1", "a:x"])
def test_an_address_that_is_none_is_said(text: str) -> None:
    with pytest.raises(FleetError, match=r"expected \[HOST:\]PORT"):
        listening_address(text)


def test_addresses() -> None:
    assert listening_address("502") == ("127.0.0.1", 502)
    assert listening_address("0.0.0.0:502") == ("0.0.0.0", 502)
    assert listening_address("[::1]:502") == ("::1", 502)


# --- the server


class Plc:
    """A real client, which comes back until it is served."""

    def __init__(self, port: int) -> None:
        from pymodbus.client import ModbusTcpClient

        self.client = ModbusTcpClient("127.0.0.1", port=port, timeout=1, retries=0)
        eventually(self.client.connect)

    def close(self) -> None:
        self.client.close()  # type: ignore[no-untyped-call]

    def read(self) -> dict[str, int]:
        answer = self.client.read_holding_registers(0, count=len(NAMES))
        assert not answer.isError(), answer
        return dict(zip(NAMES, answer.registers, strict=True))

    def reads(self, **expected: Any) -> bool:
        found = self.read()
        return all(found[name] == value for name, value in expected.items())


def shows(line: Registers, plc: Plc, said: Verdict, **expected: Any) -> None:
    """Say it until it is there, as a loop does: a slow test machine is a silent loop."""
    sequence = {"sequence, low word": said.seq & 0xFFFF}

    def there() -> bool:
        line.show(said)
        return plc.reads(**sequence, **expected)

    eventually(there)


def eventually(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def served(port: int) -> Iterator[tuple[Registers, Plc]]:
    with Registers(LABELS, str(port)) as line:
        plc = Plc(port)
        yield line, plc
        plc.close()


def test_a_plc_reads_each_verdict(served: tuple[Registers, Plc]) -> None:
    line, plc = served
    words: list[tuple[Word, int, int]] = [
        ("OK", 1, VALID), ("DEFECT", 2, VALID), ("ABSTAIN", 3, VALID), ("NOT INSPECTED", 0, FAULT)
    ]  # fmt: skip
    for seq, (word, code, state) in enumerate(words, start=65_535):
        index = 1 if state == VALID else NONE
        high = {"sequence, high word": seq >> 16, "class index": index}
        shows(line, plc, verdict(word, seq=seq), verdict=code, state=state, **high)


def test_input_registers_and_every_unit_id_say_the_same(served: tuple[Registers, Plc]) -> None:
    line, plc = served
    shows(line, plc, verdict(seq=7))
    client = plc.client
    assert client.read_input_registers(AT["sequence, low word"], count=1).registers == [7]
    for unit in (0, 1, 17, 255):
        one = client.read_holding_registers(AT["sequence, low word"], count=1, device_id=unit)
        assert one.registers == [7]


def test_nobody_writes(served: tuple[Registers, Plc]) -> None:
    line, plc = served
    shows(line, plc, verdict("OK", seq=8))
    client = plc.client
    illegal_function, illegal_address = 1, 2
    for answer in (
        client.write_register(1, 2),
        client.write_registers(0, [9] * len(NAMES)),
        client.write_coil(0, True),
        client.write_coils(0, [True] * 3),
        client.mask_write_register(address=1, and_mask=0, or_mask=2),
        client.readwrite_registers(read_address=0, read_count=1, address=1, values=[2]),
        client.read_coils(0, count=1),
    ):
        assert answer.isError()
        assert answer.exception_code == illegal_function
    beyond = client.read_holding_registers(0, count=len(NAMES) + 1)
    assert beyond.exception_code == illegal_address
    assert plc.read()["map version"] == MAP_VERSION
    assert client.read_holding_registers(AT["sequence, low word"], count=1).registers == [8]


def test_noise_on_the_port_is_survived(served: tuple[Registers, Plc], port: int) -> None:
    line, plc = served
    noise = random.Random(5)
    for _ in range(200):
        body = noise.randbytes(noise.randint(1, 40))
        head = bytes([0, 1, 0, 0, 0, len(body)]) if noise.random() < 0.7 else b""
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(head + body)
    shows(line, plc, verdict(seq=9))
    assert plc.read()["map version"] == MAP_VERSION


def test_a_silence_voids_the_verdict_until_there_is_another(
    served: tuple[Registers, Plc],
) -> None:
    line, plc = served
    shows(line, plc, verdict("OK", seq=10), verdict=1)
    eventually(lambda: plc.reads(verdict=0, state=STALE))  # nobody beats

    def beats() -> bool:
        line.beat()
        return plc.read()["loop age, ms"] < 1000

    eventually(beats)
    assert plc.reads(verdict=0, state=STALE)
    shows(line, plc, verdict("OK", seq=11), verdict=1, state=VALID)

    def faulty() -> bool:
        line.fault()
        return plc.reads(verdict=0, state=FAULT)

    eventually(faulty)


def test_a_server_that_died_is_started_again_and_knows_the_last_verdict(
    served: tuple[Registers, Plc], port: int
) -> None:
    line, _ = served
    line.show(verdict("OK", seq=12))
    assert line.pid
    os.kill(line.pid, signal.SIGKILL)
    died = line.pid

    def back() -> bool:
        line.beat()
        return line.pid not in (None, died)

    eventually(back)
    plc = Plc(port)

    def there() -> bool:
        line.beat()
        return plc.reads(**{"sequence, low word": 12})

    eventually(there)
    plc.close()


def test_a_loop_that_is_stopped_and_then_killed_is_noticed(tmp_path: Any) -> None:
    code = (
        "import sys, time\n"
        "from runtime.line.modbus import Registers\n"
        "from tests.test_modbus import verdict, LABELS\n"
        "line = Registers(LABELS, sys.argv[1])\n"
        "line.show(verdict('OK'))\n"
        "while True: line.beat(); time.sleep(0.02)"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    with subprocess.Popen([sys.executable, "-c", code, str(port)]) as loop:
        try:
            plc = Plc(port)
            eventually(lambda: plc.reads(verdict=1))
            before = plc.read()["heartbeat"]
            eventually(lambda: plc.read()["heartbeat"] != before)
            loop.send_signal(signal.SIGSTOP)
            eventually(lambda: plc.reads(verdict=0, state=STALE))
            heart = plc.read()["heartbeat"]
            eventually(lambda: plc.read()["loop age, ms"] > 1000 * (STALE_S + HEARTBEAT_S))
            assert plc.read()["heartbeat"] == heart
        finally:
            loop.kill()
        eventually(lambda: not is_served(port))
        plc.close()


def is_served(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


def test_a_port_that_is_taken_and_a_missing_library_are_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(FleetError, match="cannot listen on 127"),
    ):
        Registers(LABELS, str(taken.getsockname()[1]))
    monkeypatch.setitem(sys.modules, "pymodbus.simulator", None)
    with pytest.raises(FleetError, match=r"pip install 'fieldfit\[modbus\]'"):
        Registers(LABELS)
