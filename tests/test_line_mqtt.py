"""Records over MQTT: a real mosquitto that stops, refuses and asks for certificates, and one of
our own that does what no real one can be made to do."""

import contextlib
import os
import re
import select
import shlex
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from benchmarks.broker import Broker, Reader
from benchmarks.outbox_cuts import write_until_killed
from runtime.__main__ import main as fieldfit
from runtime.delivery.broker import (
    AUTHORITIES,
    CERTIFICATE,
    KEY,
    PASSWORD,
    PASSWORD_FILE,
    Address,
    Login,
)
from runtime.delivery.fleet import write_key
from runtime.delivery.fleet_mqtt import collect
from runtime.delivery.status_document import sign_status
from runtime.errors import FleetError
from runtime.line import mqtt
from runtime.line.child import Lifeline
from runtime.line.mqtt import STRIKES, Patience, Progress, Sender
from runtime.line.outbox import Outbox, Row, Unkept
from runtime.line.verdict import Verdict
from tests.outbox_stories import DEVICE, FINDING
from tests.signed_devices import healthy, new_identity

pytest.importorskip("paho.mqtt.client", reason="no paho-mqtt: pip install 'fieldfit[mqtt]'")

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
SOON = Patience(first=0.05, longest=0.2, aside=0.2)
RESULTS = f"fieldfit/{DEVICE}/results"


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Outbox]:
    with Outbox(tmp_path / "outbox.db", DEVICE) as box:
        yield box


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with running(tmp_path / "broker") as broker:
        yield broker


@contextlib.contextmanager
def running(folder: Path, *settings: str) -> Iterator[Broker]:
    try:
        broker = Broker(folder, settings)
    except FleetError as error:
        pytest.skip(str(error))
    with broker:
        yield broker


def append(box: Outbox, count: int = 1) -> list[int]:
    verdicts = [box.append(FINDING) for _ in range(count)]
    return [verdict.seq for verdict in verdicts if not isinstance(verdict, Unkept)]


def until(sender: Sender, true: Callable[[], object]) -> None:
    """Let the loop turn until it is so."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, sender.tend()
        sender.tend()
        time.sleep(0.01)


def seqs(reader: Reader) -> list[int]:
    return [msgspec.json.decode(payload, type=Verdict).seq for payload in reader.payloads()]


# --- what is decided


def test_records_that_are_on_their_way_known_or_aside_are_not_sent_again() -> None:
    progress = Progress()
    progress.on_the_way[7] = 1
    progress.known.add(2)
    progress.put_aside(3)
    rows = [Row(seq, b"") for seq in range(1, 6)]
    assert [row.seq for row in progress.fresh(rows)] == [4, 5]
    assert progress.last == 5
    progress.begin()
    assert progress.last == 0
    assert [row.seq for row in progress.fresh(rows)] == [1, 4, 5]


def test_who_was_on_the_way_three_times_when_it_broke_steps_back_until_it_arrives() -> None:
    progress = Progress()
    put_aside = []
    for _ in range(STRIKES):
        progress.begin()
        progress.on_the_way.update({1: 10, 2: 11})
        put_aside.append(progress.broken())
    assert put_aside == [None, None, 10]
    assert [*progress.aside] == [10]
    progress.begin()
    progress.on_the_way[1] = 10
    assert progress.broken() is None  # it was aside before
    progress.put_aside(11)
    progress.on_the_way[1] = 11
    assert progress.answered(1) == 11
    assert not progress.aside  # one that made trouble does so no more: the others may try, too
    assert progress.broken() is None


def test_a_refused_record_costs_no_other_a_strike() -> None:
    progress = Progress()
    refused = []
    for _ in range(STRIKES):
        progress.on_the_way.update({1: 10, 2: 11})
        refused.append(progress.refused(2))
        assert progress.broken() is None
    assert refused == [None, None, 11]


# --- a real broker


def test_records_arrive_in_order_and_leave_the_outbox(box: Outbox, broker: Broker) -> None:
    append(box, 50)
    with Reader(broker, RESULTS) as reader, Sender(box, broker.url, patience=SOON) as sender:
        assert reader.wait(50) == 50
        append(box, 50)
        assert reader.wait(100) == 100
        assert seqs(reader) == list(range(1, 101))
        until(sender, lambda: not box.rows)
        until(sender, lambda: sender.tend().acknowledged == 100)
        assert sender.tend().connected
        assert {*reader.messages.values()} == {1}
    assert box.counts().sent == 100


def test_a_status_document_is_retained_where_the_fleet_looks_for_it(
    box: Outbox, broker: Broker
) -> None:
    with Sender(box, broker.url, patience=SOON) as sender:
        for document in (b'{"old":1}', b'{"new":1}'):
            box.put_status(document)
            until(sender, lambda: box.unsent_status() is None)
    place = Address.parse(f"{broker.url}/fieldfit/status")
    assert collect(place, quiet_s=0.3) == [(DEVICE, b'{"new":1}')]


def test_what_still_waits_is_sent_when_the_sender_is_closed(box: Outbox, broker: Broker) -> None:
    with Reader(broker, RESULTS) as reader:
        sender = Sender(box, broker.url, patience=SOON)
        until(sender, lambda: sender.tend().connected)
        append(box, 30)
        sender.close()
        assert box.rows == 0
        assert reader.wait(30) == 30


def test_a_broker_that_comes_late_and_goes_loses_nothing(box: Outbox, tmp_path: Path) -> None:
    with running(tmp_path / "broker") as broker, Reader(broker, RESULTS) as reader:
        broker.stop()
        with Sender(box, broker.url, patience=SOON) as sender:
            append(box, 5)
            until(sender, lambda: "refused" in sender.tend().reason)
            for stop in range(2):
                broker.start()
                append(box, 5)  # while it comes, and
                assert reader.wait(10 + 10 * stop) >= 10 + 10 * stop
                append(box, 5)  # while it goes
                broker.stop()
            broker.start()
            until(sender, lambda: not box.rows)
            assert reader.wait(25) == 25
        assert {*seqs(reader)} == {*range(1, 26)}


def test_a_loop_that_is_killed_again_and_again_loses_nothing(
    tmp_path: Path, broker: Broker
) -> None:
    said: list[int] = []
    path = tmp_path / "outbox.db"
    with Reader(broker, RESULTS) as reader:
        for kill in range(3):
            said += write_until_killed(path, DEVICE, broker.url, records=3 + kill)
        with Outbox(path, DEVICE) as box, Sender(box, broker.url, patience=SOON) as sender:
            until(sender, lambda: not box.rows)
            last = box.counts().last
        assert reader.wait(last) == last
        assert len(said) >= 12
        assert {*said} <= {*seqs(reader)} == {*range(1, last + 1)}


def test_the_sender_ends_when_its_loop_is_killed(tmp_path: Path, broker: Broker) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from runtime.line.outbox import Outbox; from runtime.line.mqtt import Sender\n"
        "sender = Sender(Outbox(Path(sys.argv[1]), 'd' * 32), sys.argv[2])\n"
        "print(sender.pid, flush=True); time.sleep(1000)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "outbox.db"), broker.url],
        stdout=subprocess.PIPE,
    ) as loop:
        assert loop.stdout
        pid = int(loop.stdout.readline())
        handle = os.pidfd_open(pid)
        loop.kill()
    try:
        assert select.select([handle], [], [], 30)[0], "it is still there"
    finally:
        os.close(handle)


def test_a_sender_that_hangs_does_not_hold_the_loop_up_and_a_dead_one_is_started_again(
    box: Outbox, broker: Broker
) -> None:
    said: list[str] = []
    with (
        Reader(broker, RESULTS) as reader,
        Sender(box, broker.url, patience=SOON, tell=said.append) as sender,
    ):
        append(box)
        reader.wait(1)
        assert sender.pid
        os.kill(sender.pid, signal.SIGSTOP)
        assert append(box, 20) == list(range(2, 22))
        for _ in range(20):
            sender.tend()
        os.kill(sender.pid, signal.SIGKILL)
        until(sender, lambda: said)
        assert "ended with -9" in said[0]
        until(sender, lambda: len(reader.messages) == 21)


def test_a_record_that_is_too_large_for_the_broker_waits_and_the_others_go_on(
    box: Outbox, tmp_path: Path
) -> None:
    large = msgspec.structs.replace(FINDING, reason="x" * 5000)
    settings = ("allow_anonymous true", "max_packet_size 2000")
    with (
        running(tmp_path / "broker", *settings) as broker,
        Reader(broker, RESULTS) as reader,
        Sender(box, broker.url, patience=SOON) as sender,
    ):
        append(box, 2)
        box.append(large)
        append(box, 2)
        assert reader.wait(4) == 4
        until(sender, lambda: sender.tend().aside == 1 and box.rows == 1)
        assert sender.tend().connected


def test_no_more_are_on_their_way_than_the_broker_takes(
    box: Outbox, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    append(box, 100)
    settings = ("allow_anonymous true", "max_inflight_messages 2")
    with (
        running(tmp_path / "broker", *settings) as broker,
        Sender(box, broker.url, patience=SOON) as sender,
    ):
        until(sender, lambda: not box.rows)
    assert len(capfd.readouterr().err.splitlines()) == 1  # connected, once


def test_a_damaged_record_is_taken_out_and_the_others_go_on(
    box: Outbox, broker: Broker, capfd: pytest.CaptureFixture[str]
) -> None:
    append(box, 3)
    with contextlib.closing(sqlite3.connect(box.path)) as database, database:
        database.execute("UPDATE record SET payload = x'00' WHERE seq = 2")
    with Reader(broker, RESULTS) as reader, Sender(box, broker.url, patience=SOON) as sender:
        until(sender, lambda: not box.rows)
        assert reader.wait(2) == 2
        assert seqs(reader) == [1, 3]
    assert box.counts().refused == 1
    assert "record 2 will not be sent: it is damaged" in capfd.readouterr().err


def test_a_broker_that_lets_nobody_publish_keeps_its_records_waiting(
    box: Outbox, tmp_path: Path
) -> None:
    (tmp_path / "acl").write_text(f"topic read {RESULTS}\n")
    settings = ("allow_anonymous true", f"acl_file {tmp_path / 'acl'}")
    with running(tmp_path / "broker", *settings) as broker:
        append(box, 3)
        with Sender(box, broker.url, patience=SOON) as sender:
            until(sender, lambda: "Not authorized" in sender.tend().reason)
        assert box.rows == 3
        (tmp_path / "acl").write_text(f"topic readwrite {RESULTS}\n")
        broker.stop()
        broker.start()
        with Sender(box, broker.url, patience=SOON) as sender:
            until(sender, lambda: not box.rows)


def test_the_commands_of_the_page_show_what_was_sent(
    box: Outbox, broker: Broker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (commands,) = re.findall(r"```sh\n(mosquitto_sub.*?)```", PAGE.read_text(), re.DOTALL)
    subscribe, status = (shlex.split(line) for line in commands.splitlines())
    identity = new_identity(tmp_path / "state", "line 3")
    write_key(tmp_path, identity.public)
    append(box, 2)
    box.put_status(sign_status(healthy(identity.device.id, "line 3"), identity))
    # A session that lasts, so that nothing is missed between subscribing and reading.
    subscribe = [*on(broker, subscribe), *f"-p {broker.port} -i page -c -x 60 -W 30".split()]
    subprocess.run([*subscribe, "-E"], check=True)
    with Sender(box, f"{broker.url}/plant", patience=SOON) as sender:
        until(sender, lambda: not box.rows and box.unsent_status() is None)
    done = subprocess.run([*subscribe, "-C", "2"], capture_output=True, check=True)
    lines = done.stdout.splitlines()
    assert [msgspec.json.decode(line, type=Verdict).seq for line in lines] == [1, 2]
    words = on(broker, status)
    words[-1] = str(tmp_path / "devices")
    assert fieldfit(words[1:]) in (0, 1)  # by today's clock its report is old
    assert "line 3" in capsys.readouterr().out


def on(broker: Broker, words: list[str]) -> list[str]:
    """The command as it is on the page, at this broker."""
    urls = [word.replace("mqtt://broker.example", broker.url) for word in words]
    return [word.replace("broker.example", "127.0.0.1") for word in urls]


def test_the_page_names_what_is_read_from_the_environment() -> None:
    page = PAGE.read_text()
    named = {*re.findall(r"FIELDFIT_MQTT_[A-Z_]+", page)}
    assert named == {PASSWORD, PASSWORD_FILE, AUTHORITIES, CERTIFICATE, KEY}


# --- TLS and passwords


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A certificate of 127.0.0.1 that is its own authority, and one of another authority."""
    folder = tmp_path / "tls"
    folder.mkdir()
    for name in ("broker", "other"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
             "-nodes", "-days", "2", "-subj", f"/CN={name}", "-addext",
             "subjectAltName=IP:127.0.0.1", "-keyout", f"{folder}/{name}.key", "-out",
             f"{folder}/{name}.pem"],
            check=True, capture_output=True,
        )  # fmt: skip
    return folder


def test_tls_with_certificates_on_both_sides_and_a_password_from_a_file(
    box: Outbox, tmp_path: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(passwords), "line@3", "sésame"], check=True)
    settings = (
        f"certfile {certificates}/broker.pem", f"keyfile {certificates}/broker.key",
        "allow_anonymous false", f"password_file {passwords}",
        f"cafile {certificates}/broker.pem", "require_certificate true",
    )  # fmt: skip
    secret = tmp_path / "secret"
    monkeypatch.setenv(PASSWORD_FILE, str(secret))
    append(box)
    with running(tmp_path / "broker", *settings) as broker:
        url = f"mqtts://line%403@127.0.0.1:{broker.port}/plant"

        def reason(*, ca: str, password: str) -> str:
            monkeypatch.setenv(AUTHORITIES, str(certificates / ca))
            secret.write_text(f"{password}\n")
            with Sender(box, url, patience=SOON) as sender:
                until(sender, lambda: not box.rows or sender.tend().reason not in (
                    "not started", "connecting", "",
                ))  # fmt: skip
                return sender.tend().reason

        assert "certificate verify failed" in reason(ca="other.pem", password="sésame")
        assert "broke" in reason(ca="broker.pem", password="sésame")  # it wants a certificate
        monkeypatch.setenv(CERTIFICATE, str(certificates / "broker.pem"))
        monkeypatch.setenv(KEY, str(certificates / "broker.key"))
        assert "Not authorized" in reason(ca="broker.pem", password="guessed")
        assert box.rows == 1
        assert reason(ca="broker.pem", password="sésame") in ("", "not started", "connecting")
        assert box.rows == 0


def test_a_password_does_not_belong_into_an_address() -> None:
    with pytest.raises(FleetError, match=PASSWORD_FILE) as caught:
        Address.parse("mqtt://line:hunter2@host/a")
    assert "hunter2" not in str(caught.value)


def test_files_of_tls_and_passwords_that_are_none_are_said_at_once(
    box: Outbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FleetError, match=f"{PASSWORD_FILE}=/nowhere: cannot be read"):
        Login.of({PASSWORD_FILE: "/nowhere"})
    (tmp_path / "ca.pem").write_text("no certificate")
    monkeypatch.setenv("FIELDFIT_MQTT_CA", str(tmp_path / "ca.pem"))
    with pytest.raises(FleetError, match=r"ca\.pem: expected certificates"):
        Sender(box, "mqtts://127.0.0.1")
    with pytest.raises(FleetError, match="expected mqtt://host/topic"):
        Sender(box, "http://127.0.0.1")


# --- a broker of our own, which does what none should


class Scripted:
    """Answers each PUBLISH as ``answer`` says: with a PUBACK, by breaking the connection, or not
    at all (None)."""

    def __init__(self, answer: Callable[[bytes], bool | None]) -> None:
        self.got: list[bytes] = []
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"mqtt://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                with self._socket.accept()[0] as client, contextlib.suppress(EOFError, OSError):
                    while self._turn(client):
                        pass

    def _turn(self, client: socket.socket) -> bool:
        kind = self._read(client, 1)[0] >> 4
        size = shift = 0
        while True:
            (byte,) = self._read(client, 1)
            size |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        body = self._read(client, size)
        if kind == 1:
            client.sendall(b"\x20\x03\x00\x00\x00")
        elif kind == 12:
            client.sendall(b"\xd0\x00")
        elif kind == 3:
            (length,) = struct.unpack_from(">H", body)
            message, payload = body[2 + length : 4 + length], body[5 + length :]
            self.got.append(payload)
            answer = self._answer(payload)
            if answer:
                client.sendall(b"\x40\x02" + message)
            return answer is not False
        return kind != 14

    @staticmethod
    def _read(client: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = client.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data


def test_a_record_that_no_connection_survives_does_not_block_the_others(box: Outbox) -> None:
    poison = msgspec.structs.replace(FINDING, reason="poison")
    broker = Scripted(lambda payload: b"poison" not in payload)
    append(box, 3)
    box.append(poison)
    append(box, 3)
    with Sender(box, broker.url, patience=SOON) as sender:
        until(sender, lambda: box.rows == 1)
        until(sender, lambda: sender.tend().aside == 1)
        tried = sum(b"poison" in payload for payload in broker.got)
        append(box)
        until(sender, lambda: box.counts().sent == 7)
        until(sender, lambda: sum(b"poison" in payload for payload in broker.got) > tried)
        assert [row.seq for row in box.unsent(9)] == [4]  # tried again, and never thrown away
    broker.close()


def test_a_record_without_an_answer_stays(box: Outbox) -> None:
    heard = threading.Event()

    def silent(payload: bytes) -> bool:
        heard.set()
        return False

    broker = Scripted(silent)
    append(box, 2)
    with Sender(box, broker.url, patience=SOON) as sender:
        until(sender, heard.is_set)
        until(sender, lambda: len(broker.got) > 3)
    assert [row.seq for row in box.unsent(9)] == [1, 2]
    assert box.counts().sent == 0
    broker.close()


def test_a_broker_that_hears_and_never_answers_is_left_for_another_try(
    box: Outbox, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mqtt, "_ANSWER_S", 0.2)
    tries = 0

    def deaf_at_first(payload: bytes) -> bool | None:
        nonlocal tries
        tries += 1
        return True if tries > 2 else None

    broker = Scripted(deaf_at_first)
    append(box)
    end, lifeline = os.pipe()
    post = mqtt._Post(box, Address.parse(broker.url, "t"), SOON)
    sending = threading.Thread(target=post.run, args=(Lifeline(end),))
    sending.start()
    deadline = time.monotonic() + 30
    while box.rows and time.monotonic() < deadline:
        time.sleep(0.02)
    os.close(lifeline)
    sending.join()
    os.close(end)
    broker.close()
    assert (box.rows, tries) == (0, 3)
    assert "no answer within 0.2 s" in capfd.readouterr().err
