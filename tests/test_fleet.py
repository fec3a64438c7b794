"""Many devices at once: folders, MQTT, the table, and the page in a real browser."""

import datetime
import html
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from runtime.__main__ import main as fieldfit
from runtime.delivery.broker import Address
from runtime.delivery.fleet import Fleet, Row, read_fleet, write_key, write_report
from runtime.delivery.fleet_health import Health, judge
from runtime.delivery.fleet_mqtt import collect, publish
from runtime.delivery.fleet_page import page, summary, table
from runtime.delivery.identity import Identity
from runtime.delivery.status_document import MAX_STATUS_BYTES, sign_status
from runtime.errors import FleetError
from tests.signed_devices import NOW, healthy, moment, new_identity

HOUR = datetime.timedelta(hours=1)


class Site:
    """A fleet folder and the devices that report to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "fleet"
        self.identities: dict[str, Identity] = {}
        self._states = folder

    def enroll(self, name: str) -> Identity:
        identity = new_identity(self._states / f"state-{len(self.identities)}", name)
        write_key(self.folder, identity.public)
        self.identities[name] = identity
        return identity

    def report(self, name: str, sequence: int = 7) -> bytes:
        identity = self.identities[name]
        status = healthy(identity.device.id, name, moment=moment(sequence))
        document = sign_status(status, identity)
        write_report(self.folder, identity.device.id, document)
        return document

    def look(self) -> Fleet:
        return read_fleet(self.folder, NOW)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path)
    for name in ("line 1", "line 2"):
        site.enroll(name)
        site.report(name)
    return site


def test_healthy_devices_are_shown_as_such(site: Site) -> None:
    fleet = site.look()
    assert [(row.name, row.health) for row in fleet.rows] == [
        ("line 1", ("healthy", ())),
        ("line 2", ("healthy", ())),
    ]
    assert summary(fleet) == "2 devices: 2 healthy"
    assert len(fleet.documents) == 2


def test_who_is_enrolled_and_silent_is_unknown_and_comes_first(site: Site) -> None:
    site.enroll("line 3")
    first = site.look().rows[0]
    assert (first.name, first.health.level, first.status) == ("line 3", "unknown", None)


def test_a_stranger_s_document_is_refused_and_never_shown(site: Site, tmp_path: Path) -> None:
    stranger = new_identity(tmp_path / "stranger")
    document = sign_status(healthy(stranger.device.id, "I am fine"), stranger)
    write_report(site.folder, stranger.device.id, document)
    fleet = site.look()
    assert fleet.rows[0].health.level == "unknown"
    assert fleet.rows[0].status is None
    assert "I am fine" not in table(fleet, NOW) + page(fleet, NOW, "Devices")
    assert summary(fleet) == "2 devices: 2 healthy; 1 document refused"


def test_a_document_under_another_device_s_name_speaks_for_its_signer_alone(site: Site) -> None:
    one, two = (site.identities[name].device.id for name in ("line 1", "line 2"))
    reports = site.folder / "status"
    shutil.copy(reports / f"{one}.json", reports / f"{two}.json")
    levels = {row.name: row.health.level for row in site.look().rows}
    assert levels == {"line 1": "healthy", "line 2": "unknown"}


def test_old_documents_are_refused_once_newer_ones_were_seen(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    old = site.report("line 1", 7)
    site.report("line 1", 8)
    assert fieldfit(["fleet", "status", str(site.folder), "--expect", "999d"]) in (0, 1)
    write_report(site.folder, site.identities["line 1"].device.id, old)
    fleet = site.look()
    reasons = [reason for row in fleet.rows for reason in row.health.reasons]
    assert any("an old document played again" in reason for reason in reasons)
    assert {row.name: row.status is None for row in fleet.rows if row.name} == {
        "line 1": True,
        "line 2": False,
    }


def test_a_damaged_memory_of_replays_is_an_error_and_not_forgotten(site: Site) -> None:
    (site.folder / "devices" / "seen.json").write_bytes(b"{")
    with pytest.raises(FleetError, match=r"seen\.json: cannot be read"):
        site.look()


def test_another_key_for_an_enrolled_device_is_refused(site: Site, tmp_path: Path) -> None:
    public = site.identities["line 1"].public
    other = new_identity(tmp_path / "other").public
    with pytest.raises(FleetError, match="another key is enrolled"):
        write_key(site.folder, msgspec.structs.replace(public, ed25519=other.ed25519))
    write_key(site.folder, public)  # the same again is fine


def test_keys_may_be_kept_where_only_their_operator_writes(site: Site, tmp_path: Path) -> None:
    kept = (site.folder / "devices").rename(tmp_path / "kept")
    with pytest.raises(FleetError, match="fieldfit fleet enroll --to DIR"):
        site.look()
    assert len(read_fleet(site.folder, NOW, devices=kept).documents) == 2


def test_a_terminal_is_not_driven_by_what_devices_say(site: Site) -> None:
    (site.folder / "status" / "\x1b[2Jevil\u202e.json").write_bytes(b'{"\x1b[31m": 1}')
    identity = site.enroll("line 3")
    status = healthy(identity.device.id, "line 3", fieldfit="\x1b]0;owned\x07")
    assert status.update
    update = msgspec.structs.replace(status.update, failed=True, outcome="\x1b[31m")
    bad = msgspec.structs.replace(status, update=update)
    write_report(site.folder, identity.device.id, sign_status(bad, identity))
    fleet = site.look()
    for text in (table(fleet, NOW), page(fleet, NOW, "Devices")):
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "last update failed: �[31m" in text


# --- the commands


def test_enroll_report_and_look_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, fleet = str(tmp_path / "state"), str(tmp_path / "fleet")
    assert fieldfit(["fleet", "enroll", "--state", state, "--name", "säge", "--to", fleet]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"fingerprint ([0-9a-f]{4}-){5}[0-9a-f]{4}\n", shown)
    assert fieldfit(["fleet", "report", "--state", state, "--to", fleet, "--json"]) == 0
    sent = json.loads(capsys.readouterr().out)
    assert fieldfit(["fleet", "status", fleet, "--json", "--html", f"{fleet}/p.html"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["devices"]
    assert (row["device"], row["name"], row["health"]) == (sent["device"], "säge", "failing")
    assert "runs no bundle" in row["reasons"]
    assert "säge" in (tmp_path / "fleet" / "p.html").read_text()
    assert fieldfit(["fleet", "status", fleet]) == 1
    assert "1 device: 1 failing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "place", ["mqtt://", "mqtt://host", "mqtt://host/", "mqtt://host/a/#", "mqtt://host:x/a"]
)
def test_an_address_without_a_topic_is_refused(place: str) -> None:
    with pytest.raises(FleetError, match="expected mqtt://host/topic"):
        Address.parse(place)


def test_whose_signature_is_whose_must_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert fieldfit(["fleet", "status", "mqtt://127.0.0.1/fleet"]) == 1
    assert "add --devices DIR/devices" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "h", "24", "0h", "-1h", "24s", "1e3h"])
def test_a_time_that_is_none_is_wrong_usage(text: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        fieldfit(["fleet", "status", ".", f"--expect={text}"])
    assert stopped.value.code == 2


# --- MQTT


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a real mosquitto that keeps nothing on disk."""
    pytest.importorskip("paho.mqtt.client", reason="no paho-mqtt: pip install 'fieldfit[mqtt]'")
    program = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("no broker here: apt install mosquitto")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    settings = tmp_path_factory.mktemp("broker") / "mosquitto.conf"
    settings.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n")
    process = subprocess.Popen([program, "-c", str(settings)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with socket.socket() as attempt:
                if attempt.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()


def test_documents_go_over_a_real_broker(site: Site, broker: int) -> None:
    address = Address.parse(f"mqtt://127.0.0.1:{broker}/site/a")
    documents = {}
    for name, identity in site.identities.items():
        publish(address, identity.device.id, site.report(name, 7))
        documents[identity.device.id] = site.report(name, 8)
        publish(address, identity.device.id, documents[identity.device.id])  # takes its place
    assert dict(collect(address, quiet_s=0.3)) == documents
    assert collect(Address.parse(f"mqtt://127.0.0.1:{broker}/site/b"), quiet_s=0.3) == []


def test_the_command_reads_what_a_device_left_at_the_broker(
    tmp_path: Path, broker: int, capsys: pytest.CaptureFixture[str]
) -> None:
    state, fleet = str(tmp_path / "state"), str(tmp_path / "fleet")
    url = f"mqtt://127.0.0.1:{broker}/fieldfit"
    assert fieldfit(["fleet", "enroll", "--state", state, "--name", "line 7", "--to", fleet]) == 0
    assert fieldfit(["fleet", "report", "--state", state, "--to", url]) == 0
    capsys.readouterr()
    assert fieldfit(["fleet", "status", url, "--devices", f"{fleet}/devices", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["devices"]
    assert (row["name"], row["health"]) == ("line 7", "failing")


def test_what_is_too_large_does_not_come_from_the_broker(broker: int) -> None:
    address = Address.parse(f"mqtt://127.0.0.1:{broker}/large")
    publish(address, "evil", b" " * (MAX_STATUS_BYTES + 2000))
    publish(address, "good", b"{}")
    assert collect(address, quiet_s=0.3) == [("good", b"{}")]


def test_a_broker_that_is_not_there_is_told_in_one_sentence() -> None:
    pytest.importorskip("paho.mqtt.client", reason="no paho-mqtt: pip install 'fieldfit[mqtt]'")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(FleetError, match="cannot be reached"):
            publish(Address.parse(f"mqtt://127.0.0.1:{port}/a"), "x", b"{}")


def test_a_broker_that_says_nothing_is_given_up() -> None:
    pytest.importorskip("paho.mqtt.client", reason="no paho-mqtt: pip install 'fieldfit[mqtt]'")
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address = Address.parse(f"mqtt://127.0.0.1:{mute.getsockname()[1]}/a")
        with pytest.raises(FleetError, match="did not answer in time"):
            collect(address, timeout_s=0.2)


# --- the page

ATTACK = "</td><script>document.title='owned';console.error('owned')</script><img src=x onerror=x>"


@pytest.fixture
def crowd() -> Fleet:
    """Each level, a silent one, a refused one, and one that attacks the page."""
    late = healthy("1" * 32, "late", moment=moment(seen=NOW - 30 * HOUR))
    broken = healthy("2" * 32, "broken", bundle=None, engine=None)
    update = healthy().update
    assert update
    evil = healthy(
        "3" * 32, ATTACK[:80], fieldfit=ATTACK,
        update=msgspec.structs.replace(update, failed=True, outcome=ATTACK * 2),
    )  # fmt: skip
    statuses = [healthy("0" * 32, "well"), late, broken, evil]
    rows = [Row(status.device, status.name, status, judge(status, NOW)) for status in statuses]
    rows.append(Row(f"{ATTACK}.json", "", None, Health("unknown", (ATTACK,))))
    return Fleet(tuple(rows), {})


def test_the_page_stands_alone_and_says_what_the_table_says(crowd: Fleet) -> None:
    text = page(crowd, NOW, "Devices")
    assert "default-src 'none'" in text
    assert not re.search(r"<(script|img|iframe|object|embed|base|form)\b", text)
    assert re.findall(r"(?:src|href)=[\"']([^\"']*)", html.unescape(text.split("<body>")[0])) == [
        "data:,"
    ]
    for row in crowd.rows:
        for reason in row.health.reasons:
            assert f"<li>{html.escape(reason)}</li>" in text
        assert f'<span class="level {row.health.level}">' in text
    assert "2 healthy" not in text
    assert '<html lang="en">' in text
    assert text.count('scope="row"') == len(crowd.rows)


def test_a_fleet_without_devices_has_a_page(tmp_path: Path) -> None:
    assert "No device is enrolled." in page(Fleet((), {}), NOW, "Devices")
    assert summary(Fleet((), {})) == "0 devices: none enrolled"


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's ratio of two colours such as ``#a4161a`` or ``#fff``."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        levels = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in levels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_every_text_can_be_read_in_light_and_dark() -> None:
    text = page(Fleet((), {}), NOW, "Devices")
    themes = [dict(re.findall(r"--(\w+): (#\w+);", block)) for block in
              re.findall(r":root \{(.*?)\}", text, re.DOTALL)]  # fmt: skip
    assert len(themes) == 2
    for theme in themes:
        for name in ("text", "soft", "failing", "unknown", "attention", "healthy"):
            for back in ("back", "card"):
                assert contrast(theme[name], theme[back]) >= 4.5, (name, back)


def browse(text: str, folder: Path) -> tuple[str, str]:
    """The page's document and the console's messages in headless Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no browser here: apt install chromium")
    file = folder / "page.html"
    file.write_text(text)
    done = subprocess.run(
        [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--user-data-dir={folder / 'profile'}",
         "--enable-logging=stderr", "--virtual-time-budget=1000", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return done.stdout, "\n".join(re.findall(r".*CONSOLE.*", done.stderr))


def test_a_browser_shows_the_page_and_runs_nothing_of_it(crowd: Fleet, tmp_path: Path) -> None:
    document, console = browse(page(crowd, NOW, "Devices"), tmp_path)
    assert console == ""
    assert "<title>Devices</title>" in document
    assert "<h1>Devices</h1>" in document
    assert not re.search(r"<(script|img)\b", document)
    # What would have shown it: the same attack on a page that forbids nothing is seen here.
    naive = f"<title>Devices</title><table><tr><td>{ATTACK}"
    document, console = browse(naive, tmp_path)
    assert "<title>owned</title>" in document
    assert "owned" in console


def test_the_page_fits_a_phone_and_a_desk(crowd: Fleet, tmp_path: Path) -> None:
    """In frames of these widths, which a page around them measures."""
    inner = html.escape(page(crowd, NOW, "Devices"))
    frames = "".join(f'<iframe srcdoc="{inner}" width="{width}"></iframe>' for width in (390, 1280))
    measure = """<script>onload = () => { document.title = [...document.querySelectorAll("iframe")]
        .map(f => [f.contentWindow.innerWidth, f.contentDocument.documentElement.scrollWidth])
        .join(); }</script>"""
    style = "<style>iframe { border: 0; }</style>"
    document, _ = browse(f"<!doctype html><title></title>{style}{frames}{measure}", tmp_path)
    (found,) = re.findall(r"<title>([\d,]+)</title>", document)
    phone, phone_needs, desk, desk_needs = map(int, found.split(","))
    assert (phone, desk) == (390, 1280)
    assert phone_needs <= phone
    assert desk_needs <= desk
