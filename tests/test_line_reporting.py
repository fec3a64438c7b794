"""The device's signed status travels in the outbox, and arrives where the fleet is looked at."""

import json
import time
from pathlib import Path

import msgspec
import pytest

from benchmarks.broker import Broker
from runtime.__main__ import main as fieldfit
from runtime.delivery.fleet import write_key
from runtime.delivery.identity import Identity
from runtime.delivery.status_document import Status, read_status
from runtime.errors import FleetError
from runtime.line.mqtt import Sender
from runtime.line.outbox import Outbox, Unkept
from runtime.line.reporting import EVERY_S, Reporting
from runtime.monitoring.drift import DriftReport, Moved


def window(p_value: float) -> DriftReport:
    moved = (Moved("score of good", 0.4, p_value, 0.9, 0.5), Moved("feature 1", 0.1, 0.5, 0, 0))
    sentence = "score of good moved from 0.9 to 0.5"
    return DriftReport(200, 1e-3, 5e-4, moved, p_value < 5e-4, sentence)


class Device:
    """A device whose line inspects, and what it last found."""

    def __init__(self, folder: Path) -> None:
        self.identity = Identity.open(folder, "line 3")
        self.outbox = Outbox(folder / "outbox.db", self.identity.device.id)
        self.now = 0.0
        self.window: DriftReport | None = None
        self.reporting = Reporting(
            folder, self.outbox, drift=lambda: self.window, counted=lambda: {"OK": 7},
            clock=lambda: self.now,
        )  # fmt: skip

    def tick(self) -> Status | None:
        """What is new in the outbox after a tick; it counts as sent."""
        self.reporting.tick()
        document = self.outbox.unsent_status()
        if document is None:
            return None
        self.outbox.status_sent(document)
        public = self.identity.public
        return read_status(document, {public.id: public})


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path / "state")


def test_a_status_is_put_into_the_outbox_now_and_then(device: Device) -> None:
    first = device.tick()
    assert first is not None
    assert (first.counters, first.drift) == ({"OK": 7}, None)
    device.now = EVERY_S - 1
    assert device.tick() is None
    device.now = EVERY_S
    second = device.tick()
    assert second is not None
    assert second.moment.sequence > first.moment.sequence


def test_drift_is_reported_when_it_comes_and_when_it_goes(device: Device) -> None:
    device.tick()
    device.window = window(0.3)
    assert device.tick() is None
    device.window = window(1e-5)
    status = device.tick()
    assert status is not None
    assert status.drift is not None
    assert (status.drift.p_value, status.drift.window, status.drift.drifted) == (1e-5, 200, True)
    assert device.tick() is None
    device.window = window(0.3)
    status = device.tick()
    assert status is not None
    assert status.drift is not None
    assert not status.drift.drifted


def test_an_outbox_that_refuses_it_is_said(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.outbox, "put_status", lambda document: Unkept("the disk is full"))
    with pytest.raises(FleetError, match="the status was not kept: the disk is full"):
        device.tick()


def test_what_the_outbox_carries_is_what_the_fleet_shows(
    device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("paho.mqtt.client", reason="no paho-mqtt: pip install 'fieldfit[mqtt]'")
    write_key(tmp_path / "fleet", device.identity.public)
    device.window = window(1e-5)
    try:
        broker = Broker(tmp_path / "broker")
    except FleetError as error:
        pytest.skip(str(error))
    with broker, Sender(device.outbox, f"{broker.url}/plant") as sender:
        device.reporting.tick()
        deadline = time.monotonic() + 30
        while device.outbox.unsent_status() is not None:
            assert time.monotonic() < deadline, sender.tend()
            sender.tend()
            time.sleep(0.01)
        keys = str(tmp_path / "fleet" / "devices")
        place = f"{broker.url}/plant/status"
        assert fieldfit(["fleet", "status", place, "--devices", keys, "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["devices"]
    assert row["name"] == "line 3"
    assert "drifts: score of good moved from 0.9 to 0.5" in row["reasons"]
    assert msgspec.convert(row["status"], Status, strict=False).counters == {"OK": 7}
