"""The unit under a real systemd: ready when the engine is open, killed when it hangs, ended clean.

A user's manager in a mount namespace of its own, so that nothing of this machine changes.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime.__main__ import main as fieldfit
from runtime.delivery.identity import device
from runtime.line import unit
from runtime.line.outbox import Outbox
from runtime.line.verdict import Verdict
from runtime.verbs.watch import OUTBOX
from tests.model_zips import model_zip
from tests.test_watch import BLACK, OK, hanging_in_the_dark, put

SYSTEMD = Path("/lib/systemd/systemd")
PATIENCE_S = 60.0

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not SYSTEMD.exists() or not shutil.which("nsenter"),
    reason="needs root and systemd: apt install systemd",
)

ALONE = """
mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system /run/user && chmod 700 /run/user &&
exec /lib/systemd/systemd --user
"""


class Manager:
    """A user's systemd that runs."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "config"
        self._environment = {
            **os.environ, "XDG_RUNTIME_DIR": "/run/user", "XDG_CONFIG_HOME": str(self.config),
            "XDG_CACHE_HOME": str(folder / "cache"),
        }  # fmt: skip
        self.log = folder / "systemd.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", ALONE],
                env=self._environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def ctl(self, *words: str) -> str:
        """What systemctl prints."""
        enter = ["nsenter", f"--mount=/proc/{self._process.pid}/ns/mnt"]
        done = subprocess.run(
            [*enter, "systemctl", "--user", *words],
            env=self._environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    def show(self, name: str) -> str:
        """One property of the unit."""
        return self.ctl("show", unit.NAME, "--value", "-p", name).strip()

    def until(self, name: str, true: Callable[[str], bool]) -> str:
        end = time.monotonic() + PATIENCE_S
        while not true(value := self.show(name)):
            assert time.monotonic() < end, f"{name} is {value}: {self.ctl('status', unit.NAME)}"
            time.sleep(0.05)
        return value

    def end(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    started = Manager(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(started.config))
    end = time.monotonic() + PATIENCE_S
    while "running" not in started.ctl("is-system-running"):
        if started._process.poll() is not None or time.monotonic() > end:
            pytest.skip(f"no systemd runs here: {started.log.read_text()[-200:]}")
        time.sleep(0.1)
    yield started
    started.ctl("kill", "--signal=SIGKILL", unit.NAME)
    started.end()


def test_the_unit_is_ready_killed_when_it_hangs_gives_the_frame_up_and_stops_clean(
    tmp_path: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox, state = tmp_path / "in", tmp_path / "state"
    monkeypatch.setenv("FIELDFIT_STATE", str(state))
    archive = model_zip(tmp_path, "1", model=hanging_in_the_dark())
    put(inbox, 1)
    words = [f"watch:{inbox}", "--bundle", str(archive), "--ok", OK, "--threads", "1"]
    assert fieldfit(["service", "install", "--user", *words]) == 0
    quicker = manager.config / "systemd" / "user" / f"{unit.NAME}.d" / "quicker.conf"
    quicker.parent.mkdir()
    quicker.write_text(
        "[Service]\nWatchdogSec=2\nRestartSec=0\nEnvironment=CUDA_VISIBLE_DEVICES=\n"
    )
    manager.ctl("daemon-reload")

    assert manager.ctl("start", unit.NAME) == "", manager.ctl("status", unit.NAME)
    assert manager.show("ActiveState") == "active"
    manager.until("StatusText", lambda text: text.startswith("1 frame: "))
    before = manager.show("MainPID")

    put(inbox, 2, BLACK)
    put(inbox, 3)
    until(lambda: str(inbox / "0003.png") in {verdict.frame for verdict in kept(state)})
    assert int(manager.show("NRestarts")) == 2, "killed twice, and then the frame was given up"
    assert manager.show("MainPID") not in ("0", before)
    given_up = next(v for v in kept(state) if v.frame.endswith("0002.png"))
    assert given_up.verdict == "NOT INSPECTED"
    assert "the program ended 2 times while it looked at this frame" in given_up.reason
    manager.ctl("stop", unit.NAME)
    assert manager.show("ActiveState") == "inactive", "neither failed nor killed"
    assert [verdict.seq for verdict in kept(state)] == list(range(1, len(kept(state)) + 1))


def kept(state: Path) -> list[Verdict]:
    with Outbox(state / OUTBOX, device(state).id) as outbox:
        return [msgspec.json.decode(row.payload, type=Verdict) for row in outbox.unsent(1000)]


def until(found: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)
