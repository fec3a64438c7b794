"""The parent's hold on a camera's process: start it, hear it, end it. It decides nothing."""

import contextlib
import os
import select
import subprocess
import sys
from pathlib import Path

import msgspec

import runtime
from runtime.errors import DataError
from runtime.sources.address import Address
from runtime.sources.camera_process import OPENED, Task
from runtime.sources.frame_ring import RingReader, Taken
from runtime.trials import failure

_SAID_BYTES = 4096
"""The end of what it says on stderr: that is the reason why it ended."""

_END_S, _KILLED_S = 1.0, 0.1
"""For a process to end by itself or by force. One that a driver holds fast ends when the driver
lets go; nobody waits for that."""


class CameraChild:
    """One process with one open camera. It serves one thread; ``dismiss`` may come from any.

    It dies with the thread that made it. ``waits`` as in ``camera_process.Task``.
    """

    def __init__(self, address: Address, *, waits: bool = False) -> None:
        self._memory = os.memfd_create("fieldfit-camera", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        pipe = subprocess.PIPE
        # This package, whatever lies in the current folder (PYTHONSAFEPATH: Python 3.11 and newer).
        places = [str(Path(runtime.__file__).parent.parent), os.environ.get("PYTHONPATH")]
        path = os.pathsep.join(filter(None, places))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "runtime.sources.camera_process"],
                stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, pass_fds=(self._memory,),
                env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            )  # fmt: skip
        except OSError:
            os.close(self._memory)
            raise
        streams = self._process.stdin, self._process.stdout, self._process.stderr
        self._in, self._out, self._err = (stream for stream in streams if stream)
        self._ring: RingReader | None = None
        self._waits = waits
        self._said, self._refused = b"", ""
        self._killed = False
        self._poll = select.poll()
        for stream in (self._out, self._err):
            os.set_blocking(stream.fileno(), False)
            self._poll.register(stream, select.POLLIN)
        task = Task(address=address, memory=self._memory, parent=os.getpid(), waits=waits)
        self._write(msgspec.json.encode(task) + b"\n")

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def hear(self, timeout_s: float) -> bytes | None:
        """What it says, as soon as it says anything; None if there will be nothing any more."""
        ready = [descriptor for descriptor, _ in self._poll.poll(max(0.0, timeout_s) * 1e3 + 1)]
        if self._err.fileno() in ready and not self._hear_errors():
            self._poll.unregister(self._err)
        if self._out.fileno() not in ready:
            return b""
        words = self._out.read(65536)
        if OPENED in (words or b""):
            try:
                self._ring = RingReader(self._memory)
            except DataError as error:
                self._refused = str(error)
                return None
        return words or None

    def take(self, after: int) -> Taken | None:
        """The oldest frame newer than ``after`` that is still there."""
        taken = self._ring.take(after) if self._ring else None
        if taken and self._waits:
            self._write(b".")
        return taken

    def dismiss(self) -> None:
        """Let it let go of the camera and end; if it does not, end it. ``hear`` then says so."""
        self._in.close()
        self._wait(_END_S)
        self._kill()

    def close(self) -> str:
        """End it, and give its memory back; why it ended by itself, empty if it did not."""
        if self.hear(0) is None:
            self._wait(_END_S)
        self._kill()
        self._wait(_KILLED_S)
        self._hear_errors()
        for stream in (self._in, self._out, self._err):
            stream.close()
        os.close(self._memory)
        code = self._process.returncode
        if self._refused or self._killed or not code:
            return self._refused
        return failure(code, self._said.decode(errors="replace"))

    def _kill(self) -> None:
        self._killed = self._killed or self._process.poll() is None
        self._process.kill()

    def _wait(self, timeout_s: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)

    def _hear_errors(self) -> bool:
        """Whether there may come more."""
        heard = self._err.read(65536)
        self._said = (self._said + (heard or b""))[-_SAID_BYTES:]
        return heard != b""

    def _write(self, data: bytes) -> None:
        # It has ended, or another thread has dismissed it: ``hear`` says so.
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._in.write(data)
