"""A real mosquitto that can be stopped and started, and one who reads what comes; no benchmark."""

import os
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runtime.errors import FleetError

_STARTING_S = 10.0


class Broker:
    """Keeps what it has acknowledged, in ``folder``, also while it is stopped."""

    def __init__(self, folder: Path, settings: Iterable[str] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        program = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None:
            raise FleetError("no broker here: apt install mosquitto")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        lines = [
            f"listener {self.port} 127.0.0.1",
            "persistence true", f"persistence_location {folder}/",
            "autosave_on_changes true", "autosave_interval 1", "max_queued_messages 0",
            *(settings or ["allow_anonymous true"]),
        ]  # fmt: skip
        if os.geteuid() == 0:
            lines.append("user root")  # else it becomes one who may not write the folder
        configuration = folder / "mosquitto.conf"
        configuration.write_text("\n".join(lines) + "\n")
        self._command = [program, "-c", str(configuration)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """As a sender takes it."""
        return f"mqtt://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Return when it listens."""
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + _STARTING_S
        while time.monotonic() < deadline:
            with socket.socket() as attempt:
                if attempt.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise FleetError("mosquitto did not start")

    def stop(self) -> None:
        """As its service would; it writes down what it has."""
        if self._process:
            self._process.terminate()
            self._process.wait()
        self._process = None

    def __enter__(self) -> "Broker":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


class Reader:
    """Counts the messages under ``topic`` by their bytes, whatever happens to the broker."""

    def __init__(self, broker: Broker, topic: str) -> None:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        self.messages: Counter[tuple[str, bytes]] = Counter()
        self._came = threading.Condition()
        self._topic = topic
        self._ready = threading.Event()
        # A session that lasts: what comes while the broker is stopped, or we are away, waits.
        self._client = Client(CallbackAPIVersion.VERSION2, client_id="reader", clean_session=False)
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = lambda client, *_: client.subscribe(topic, 1)
        self._client.on_subscribe = lambda *_: self._ready.set()
        self._client.on_message = self._take
        self._client.connect("127.0.0.1", broker.port)
        self._client.loop_start()
        if not self._ready.wait(_STARTING_S):
            raise FleetError("mosquitto did not let the reader subscribe")

    def wait(self, distinct: int, timeout_s: float = 60.0) -> int:
        """Wait for so many different messages; how many there are."""
        with self._came:
            self._came.wait_for(lambda: len(self.messages) >= distinct, timeout_s)
            return len(self.messages)

    def payloads(self) -> list[bytes]:
        """Of the different messages, in the order in which they first came."""
        with self._came:
            return [payload for _, payload in self.messages]

    def close(self) -> None:
        """Stop reading."""
        self._client.disconnect()
        self._client.loop_stop()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _take(self, client: Any, data: Any, message: Any) -> None:
        with self._came:
            self.messages[message.topic, bytes(message.payload)] += 1
            self._came.notify_all()
