"""Word to the service manager, over a real socket."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.line.notify import Notifier


class Manager:
    """The other end, as systemd holds it."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.setblocking(False)

    def said(self) -> list[str]:
        lines = []
        with contextlib.suppress(BlockingIOError):
            while True:
                lines.append(self.socket.recv(4096).decode())
        return lines


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    opened = Manager(str(tmp_path / "notify"))
    yield opened
    opened.socket.close()


def test_what_the_manager_asks_is_taken_from_the_environment_once(tmp_path: Path) -> None:
    asked = {
        "NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "8000000", "WATCHDOG_PID": str(os.getpid())
    }  # fmt: skip
    Notifier.from_environment(asked)
    assert asked == {}, "a child would answer for this process"


def test_the_watchdog_is_fed_four_times_in_its_interval(manager: Manager, tmp_path: Path) -> None:
    now = [0.0]
    notifier = Notifier(str(tmp_path / "notify"), 8.0, clock=lambda: now[0])
    notifier.ready("onnxruntime CPU")
    fed = []
    for tenth in range(81):
        now[0] = tenth / 10
        notifier.alive()
        fed.append(len(manager.said()))
    assert sum(fed[1:]) == 4
    notifier.status("12 frames")
    notifier.stopping()
    assert manager.said() == ["STATUS=12 frames", "STOPPING=1"]


def test_a_watchdog_that_is_another_process_s_is_not_fed(manager: Manager, tmp_path: Path) -> None:
    asked = {
        "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"
    }  # fmt: skip
    notifier = Notifier.from_environment(asked)
    notifier.alive()
    notifier.ready("so")
    assert manager.said() == ["READY=1\nSTATUS=so"]


def test_an_abstract_socket_is_found() -> None:
    name = f"fieldfit-test-{os.getpid()}"
    manager = Manager(f"\0{name}")
    Notifier(f"@{name}").ready("so")
    assert manager.said() == ["READY=1\nSTATUS=so"]
    manager.socket.close()


def test_a_manager_that_is_away_or_reads_nothing_holds_nothing_up(
    manager: Manager, tmp_path: Path
) -> None:
    for notifier in (Notifier(), Notifier(str(tmp_path / "nobody"), 1.0)):
        notifier.ready("so")
        notifier.alive()
    crowded = Notifier(str(tmp_path / "notify"))
    for _ in range(10_000):
        crowded.status("x" * 1000)
    assert manager.said()
