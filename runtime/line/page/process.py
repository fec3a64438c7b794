"""The page beside a running line: its server, started as a process of its own and kept alive."""

from collections.abc import Callable
from pathlib import Path

from runtime.line.child import Child
from runtime.line.inspection import Inspected
from runtime.line.verdict import Finding
from runtime.sources.frame import Frame


class PageProcess:
    """``fieldfit page`` on ``state``, which ends with this process, whatever ends it.

    It hangs on the loop, as ``runtime.line.loop.Beside``; ``tell`` gets a sentence when it had to
    be started again.
    """

    def __init__(
        self,
        state: Path,
        address: str,
        tell: Callable[[str], object],
        *,
        token_file: Path | None = None,
    ) -> None:
        tokens = ["--token-file", str(token_file)] if token_file else []
        arguments = ["page", "--state", str(state), "--listen", address, "--lifeline", *tokens]
        self._child = Child("runtime", arguments, tell)

    def judged(self, frame: Frame, inspected: Inspected, said: Finding) -> None:
        """A frame: the board is told of it, not the server."""

    def tick(self) -> None:
        """Start it, if it does not run."""
        self._child.tend()

    def close(self) -> None:
        """End it."""
        self._child.close()
