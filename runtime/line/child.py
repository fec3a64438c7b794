"""A process beside the loop, which talks to the outside so that nothing there can hold the loop up.

Its standard input is its lifeline: what the loop has to tell goes in, and when it ends, because
the loop closed it or is dead, the process ends, too. What it prints is read when there is time.
Nothing here ever waits for it but ``close``. It does not know what the process does.
"""

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import runtime

LINGER_S = 2.0
"""A process whose lifeline was cut has so long for what it still wants to do."""

_CLOSING_S = LINGER_S + 3.0
_FIRST_S, _LONGEST_S = 1.0, 60.0
_CHUNK = 65536


class Child:
    """``python -m module ARGUMENTS``, started again when it ends, ever more slowly.

    ``tell`` is called with one sentence when it ended by itself.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        tell: Callable[[str], object],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.module = module
        self._command = [sys.executable, "-m", module, *arguments]
        self._tell = tell
        # This package, whatever lies in the current folder (PYTHONSAFEPATH: Python 3.11 and newer).
        places = [str(Path(runtime.__file__).parent.parent), os.environ.get("PYTHONPATH")]
        path = os.pathsep.join(filter(None, places))
        self._environment = {
            **os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **(environment or {})
        }  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self._said = b""
        self._pause_s = _FIRST_S
        self._started = -_LONGEST_S

    @property
    def pid(self) -> int | None:
        """Of the process, if it runs."""
        return self._process.pid if self._process else None

    def tend(self) -> list[bytes]:
        """Start it if it does not run and may be started; the lines it has printed since then."""
        said = self._read()
        if self._process and self._process.poll() is not None:
            self._tell(f"{self.module} ended with {self._process.returncode} and is started again")
            self._let_go()
        now = time.monotonic()
        if self._process is None and now - self._started >= self._pause_s:
            lived = now - self._started > _LONGEST_S
            self._pause_s = _FIRST_S if lived else min(2 * self._pause_s, _LONGEST_S)
            self._started = now
            self._start()
        return said

    def feed(self, data: bytes) -> bool:
        """Tell it ``data``, at most PIPE_BUF bytes; False if it does not run or does not listen."""
        if self._process is None or self._process.stdin is None:
            return False
        try:
            return os.write(self._process.stdin.fileno(), data) == len(data)
        except (BlockingIOError, BrokenPipeError):
            return False

    def close(self) -> None:
        """Cut its lifeline, and wait a few seconds for its end; after that it is killed."""
        if self._process is None:
            return
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(_CLOSING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._let_go()

    def _start(self) -> None:
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(
                self._command, stdin=pipe, stdout=pipe, bufsize=0, env=self._environment,
                start_new_session=True,  # Ctrl-C is the loop's, which then ends its lifeline
            )  # fmt: skip
        except OSError as error:  # no memory, no more processes: later, perhaps
            self._tell(f"{self.module} cannot be started: {error}")
            return
        for stream in (process.stdin, process.stdout):
            if stream:
                os.set_blocking(stream.fileno(), False)
        self._process = process

    def _read(self) -> list[bytes]:
        if self._process is None or self._process.stdout is None:
            return []
        try:
            self._said += os.read(self._process.stdout.fileno(), _CHUNK)
        except BlockingIOError:
            return []
        *lines, self._said = self._said.split(b"\n")
        return lines

    def _let_go(self) -> None:
        if self._process:
            for stream in (self._process.stdin, self._process.stdout):
                if stream:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
        self._process, self._said = None, b""


class Lifeline:
    """The child's end of its standard input."""

    def __init__(self, descriptor: int = 0) -> None:
        self._descriptor = descriptor
        self._cut = False

    def cut(self, wait_s: float = 0.0) -> bool:
        """Whether the other end is closed; waits at most so long for that. What comes is lost."""
        deadline = time.monotonic() + wait_s
        while not self._cut:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._descriptor], [], [], left)[0]:
                return False
            self._cut = not os.read(self._descriptor, _CHUNK)
        return True


def say(line: bytes) -> None:
    """Print ``line`` for the loop, unless that has not read what came before."""
    os.set_blocking(1, False)
    with contextlib.suppress(BlockingIOError, BrokenPipeError):
        os.write(1, line + b"\n")
