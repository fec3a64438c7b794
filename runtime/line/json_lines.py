"""Verdicts on a stream, one JSON object a line, each of them out before the next. It keeps none."""

import os
from typing import IO

import msgspec

from runtime.line.verdict import Finding


class JsonLines:
    """Writes verdicts to ``stream`` until nobody reads them any more.

    A reader that is slow holds the writer up, as with every pipe; one that has gone does not.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._descriptor: int | None = stream.fileno()
        stream.flush()  # ours go past its buffer, after what it holds

    def write(self, verdict: Finding) -> bool:
        """False, now and ever after, once the other end is closed."""
        if self._descriptor is None:
            return False
        data = memoryview(msgspec.json.encode(verdict) + b"\n")
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except BrokenPipeError:
            # What else is printed there, at the latest by the interpreter's end, must not fail.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._descriptor)
            os.close(nowhere)
            self._descriptor = None
            return False
        return True
