"""Headless Chromium for tests, by its own protocol over a pipe: no driver and no package."""

import base64
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

Message = dict[str, Any]


class Browser:
    """One page in a browser that runs. ``problems`` is what its console and network complained."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._data, self._number = b"", 0
        self._events: list[Message] = []
        self._session = ""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: object) -> Message:
        """Call a method of the Chrome DevTools Protocol."""
        self._number += 1
        call: Message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            call["sessionId"] = self._session
        os.write(self._commands, json.dumps(call).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == self._number:
                assert "error" not in message, (method, message["error"])
                result: Message = message["result"]
                return result
            self._events.append(message)

    def open(self, url: str) -> None:
        """Show ``url``, and wait until all of it is there."""
        self._events.clear()
        self("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._next())

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        done = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait for an expression to be true, for a minute at most."""
        self.run(
            f"""new Promise((done, fail) => {{
            const give = setTimeout(() => fail("still not: " + {json.dumps(condition)}), 60000);
            const look = () => {{ if ({condition}) {{ clearTimeout(give); done(); }}
              else setTimeout(look, 20); }}; look(); }})"""
        )

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Be a screen of that size, in CSS pixels, of a user who likes it dark or not."""
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, *, whole: bool = True) -> bytes:
        """PNG of the page."""
        shot = self("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(shot["data"])

    @property
    def problems(self) -> list[str]:
        """What the page's console, its scripts and its loads complained since it was opened."""
        return [said for event in self._events if (said := _complaint(event))]

    def _next(self) -> Message:
        while b"\0" not in self._data:
            more = os.read(self._answers, 1 << 20)
            assert more, "the browser has ended"
            self._data += more
        whole, _, self._data = self._data.partition(b"\0")
        message: Message = json.loads(whole)
        return message


def _complaint(event: Message) -> str:
    told = event.get("params", {})
    if event["method"] == "Runtime.exceptionThrown":
        return str(told["exceptionDetails"])
    if event["method"] == "Runtime.consoleAPICalled":
        return f"console.{told['type']}: {told['args']}"
    if event["method"] == "Log.entryAdded":
        return f"{told['entry']['level']}: {told['entry']['text']} {told['entry'].get('url', '')}"
    if event["method"] == "Network.loadingFailed":
        return f"not loaded: {told['errorText']}"
    return ""


@contextmanager
def browser(folder: Path, environment: dict[str, str] | None = None) -> Iterator[Browser]:
    """A browser with its profile in ``folder``; the test is skipped where there is none."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no browser here: apt install chromium")
    arguments = [
        chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={folder}",
        "--no-first-run", "--disable-extensions", "--disable-background-networking",
    ]  # fmt: skip
    theirs_in, commands = os.pipe()
    answers, theirs_out = os.pipe()
    # Its protocol speaks on descriptors 3 and 4: no end may be moved onto the other one.
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_in, theirs_out)]
    moves: list[Any] = [(os.POSIX_SPAWN_DUP2, high[0], 3), (os.POSIX_SPAWN_DUP2, high[1], 4)]
    nothing = os.open(os.devnull, os.O_WRONLY)
    moves += [(os.POSIX_SPAWN_DUP2, nothing, 2)]
    pid = os.posix_spawn(chromium, arguments, environment or dict(os.environ), file_actions=moves)
    for end in (theirs_in, theirs_out, nothing, *high):
        os.close(end)
    try:
        yield Browser(commands, answers)
    finally:
        os.close(commands)
        os.close(answers)
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
