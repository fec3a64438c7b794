"""Try libraries in processes of their own: what crashes or hangs there is a reason, not our end.

TensorRT without a driver and an onnxruntime built for another NumPy are known to take the process
with them, and onnxruntime lists providers that do not open. It does not know what follows from an
outcome.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from runtime.engines.library_trial import FALLBACK

TIMEOUT_S = 60.0
"""The first use of CUDA on a small board takes tens of seconds."""

_AT_ONCE = 2
"""Each process that opens a GPU takes some hundred megabytes, and a small board has four GB."""

_CHILD = Path(__file__).parent / "engines" / "library_trial.py"
_ERROR_LOG = re.compile(r"\[E:onnxruntime[^\]]*\]\s*(?:\S+\.(?:cc|h):\d+ )?(.*)")
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Fail): ")
_MAX_REASON = 300


class Outcome(NamedTuple):
    """What became of one trial."""

    answer: dict[str, Any] | None
    """None if it failed."""
    reason: str
    """Why it failed, in one line; empty if it did not."""
    said: str
    """All that the library wrote to stderr, also when it went well."""


def run_trials(
    trials: Mapping[str, Sequence[str]], timeout_s: float = TIMEOUT_S
) -> dict[str, Outcome]:
    """Run trials by name, each with the arguments of ``library_trial``, two at a time."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        outcomes = pool.map(lambda arguments: _run(arguments, timeout_s), trials.values())
        return dict(zip(trials, outcomes, strict=True))


def _run(arguments: Sequence[str], timeout_s: float) -> Outcome:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD.read_text(encoding="utf-8"), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            # Nothing of the current folder may pass for a library (Python 3.11 and newer).
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
    except subprocess.TimeoutExpired as expired:
        said = (expired.stderr or b"").decode(errors="replace")
        return Outcome(None, f"no answer within {timeout_s:g} s", said)
    said = done.stderr.decode(errors="replace")
    if done.returncode:
        return Outcome(None, failure(done.returncode, said), said)
    return Outcome(json.loads(done.stdout.splitlines()[-1]), "", said)


def failure(code: int, said: str) -> str:
    """Why a process ended with ``code``, from what it wrote to stderr: the cause first."""
    lines = [line.strip() for line in _COLOUR.sub("", said).splitlines() if line.strip()]
    logged = [found[1] for line in lines if (found := _ERROR_LOG.search(line))]
    cause = [text for text in logged if FALLBACK not in text][:1]
    words = "; ".join(cause + [_EXCEPTION.sub("", line) for line in lines[-1:]])[:_MAX_REASON]
    if code < 0:
        crash = f"its process crashed ({signal.Signals(-code).name})"
        return f"{crash}: {words}" if words else crash
    return words or f"its process ended with code {code}"
