"""Let a function be killed, or meet a full disk, at each of its calls that change files, in turn.

The library of ``tests/crash_at.c`` counts the calls. Each round forks, so no import is paid twice.
It knows nothing of what the function does.
"""

import ctypes
import functools
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

HERE = Path(__file__).parent
Mode = Literal["killed", "full"]
"""Killed after the n-th call, or half-way if it writes (after one is before the next); no room on
the disk from the n-th call on."""


class Ended(NamedTuple):
    """How a round ended."""

    call: int
    message: str
    """Of the exception, if there was one."""


@functools.cache
def _compiled() -> bytes:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler: what counts the calls is compiled")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "crash_at.so")
        command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(made), str(HERE / "crash_at.c")]
        subprocess.run([*command, "-ldl"], check=True)
        return made.read_bytes()


def run_with_crashes(module: str, folder: Path, *arguments: str) -> str:
    """What ``python -m module ARGUMENTS`` prints, where ``rounds`` may be used."""
    library = folder / "crash_at.so"
    library.write_bytes(_compiled())
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", module, *arguments],
        cwd=HERE.parent,
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rounds(mode: Mode, prepare: Callable[[], object], act: Callable[[], object]) -> Iterator[Ended]:
    """One round for each call of ``act`` that changes files, each after ``prepare``.

    The caller looks at the files before it asks for the next.
    """
    for call in itertools.count(1):
        prepare()
        ended = _without_room(call, act) if mode == "full" else _killed(call, act)
        if ended is None:
            return
        yield ended


def _killed(call: int, act: Callable[[], object]) -> Ended | None:
    """None if ``act`` ended before its n-th call."""
    child = os.fork()
    if child == 0:
        _control.crash_at(ctypes.c_long(call), 0)
        act()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), code
    return Ended(call, "") if code else None


def _without_room(call: int, act: Callable[[], object]) -> Ended | None:
    message = ""
    _control.crash_at(ctypes.c_long(call), 1)
    try:
        act()
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    calls = _control.crash_calls()
    _control.crash_at(ctypes.c_long(0), 0)
    return Ended(call, message) if calls >= call else None


_control = ctypes.CDLL(None)  # where LD_PRELOAD has put the functions of crash_at.c
