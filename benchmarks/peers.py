"""Libraries that a user might pick instead: where they are installed, and processes that run them.

Those that the workstation has no use for live in an environment of their own, ``make bench-peers``.
It does not know what they are asked.
"""

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from runtime.errors import EngineError

ROOT = Path(__file__).parent.parent
PYTHON = Path("build") / "peers" / "bin" / "python"
VARIABLE = "FIELDFIT_PEERS"
WAY_OUT = f"run make bench-peers, or name the Python that has it in ${VARIABLE}"


def environment() -> Path:
    """The Python of the peers' environment, which need not exist."""
    return Path(os.environ.get(VARIABLE, PYTHON))


@functools.cache
def python_with(package: str) -> str | None:
    """A Python that has ``package``: this one, else the peers', else None."""
    if importlib.util.find_spec(package) is not None:
        return sys.executable
    peers = environment()
    code = f"import importlib.util as i, sys; sys.exit(i.find_spec({package!r}) is None)"
    # Absolute but not resolved: the link is what makes it the environment's.
    found = str(Path.cwd() / peers)
    if peers.exists() and subprocess.run([found, "-c", code], check=False).returncode == 0:
        return found
    return None


def versions(*packages: str) -> str:
    """Those of ``packages`` that are installed, with their versions, wherever they are."""
    code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    pythons = {package: python_with(package) for package in packages}
    return ", ".join(
        f"{package} {subprocess.check_output([python, '-c', code, package], text=True).strip()}"
        for package, python in pythons.items()
        if python is not None
    )


class Process:
    """A module that answers JSON requests line by line; its first line says whether it could start.

    The first line is ``{"ready": facts}`` or ``{"failed": reason}``. Raises EngineError with that
    reason, or with the last line of its complaint if it ended without one.
    """

    def __init__(self, python: str, module: str, *arguments: str) -> None:
        self._stack = contextlib.ExitStack()
        self._complaint = self._stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        self._process = subprocess.Popen(
            # As a module: a script's folder would stand before the libraries.
            [python, "-m", module, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaint, text=True,
            # Ultralytics would fetch what it misses.
            env={**os.environ, "PYTHONPATH": str(ROOT), "YOLO_AUTOINSTALL": "false",
                 "YOLO_OFFLINE": "true"},
        )  # fmt: skip
        try:
            first = self._listen()
            if "failed" in first:
                raise EngineError(first["failed"])
        except BaseException:
            self.close()
            raise
        self.facts: dict[str, Any] = first["ready"]

    def ask(self, **request: object) -> dict[str, Any]:
        """The answer to ``request``.

        Raises EngineError if the process ended instead.
        """
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it complained of is more telling
        return self._listen()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._stack.close()

    def __enter__(self) -> "Process":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _listen(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._complaint.seek(0)
            said = self._complaint.read().strip().splitlines()
            raise EngineError((said or [f"its process ended with {code}"])[-1])
        answer: dict[str, Any] = json.loads(line)
        return answer
