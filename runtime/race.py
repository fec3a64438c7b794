"""Which form of a model is fastest on one engine of this machine: measured once, then remembered.

INT8 is not faster than FP16 everywhere, nor than FP32 on every CPU, so no form wins by assumption.
What was measured is kept in a small file under a key of everything that it depends on: the bundle,
the engine and its version, the machine. It does not know how engines are opened, nor judge answers.
"""

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from runtime import atomic
from runtime.benchmark import interleave
from runtime.engines.engine import Engine
from runtime.errors import EngineFault

EQUAL = 1.03
"""Times closer than this are the same: then the form with the higher SQNR is taken."""

_MAX_BYTES = 64 * 1024


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the outcome depends on."""

    bundle: str
    """The manifest's digest."""
    engine: str
    version: str
    machine: str
    threads: int

    @property
    def digest(self) -> str:
        """The name of its file."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:32]


class Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a form is not tried again."""

    fault: EngineFault
    reason: str


class Outcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What came of the forms that were tried."""

    key: Key
    date: str
    """UTC, e.g. ``2026-11-25``."""
    milliseconds: dict[str, float]
    """Median wall time of one call at batch 1, by form."""
    failed: dict[str, Failure]
    """Forms that could not be built here, or answered wrongly."""


class Ranking(NamedTuple):
    """The forms from first to last choice, and a sentence for each but the first."""

    order: tuple[str, ...]
    reasons: dict[str, str]


def race(engines: Sequence[Engine], images: npt.NDArray[np.uint8]) -> dict[str, float]:
    """Median milliseconds of one call on ``images[:1]`` by form; the engines take turns.

    ``images`` are uint8 ``[N, H, W, C]``. About half a second, more where one call is slow.
    """
    timings = interleave(engines, np.ascontiguousarray(images[:1]), seconds=0.5)
    return {timing.form: timing.wall_ms["p50"] for timing in timings}


def rank(milliseconds: Mapping[str, float], sqnr_db: Mapping[str, float]) -> Ranking:
    """Order the forms; a pure decision that gives its reasons.

    The fastest wins, and of those within 3 % of it the one with the highest ``sqnr_db``.
    """
    best = min(milliseconds.values())
    equal = [form for form, ms in milliseconds.items() if ms <= best * EQUAL]
    winner = max(equal, key=lambda form: sqnr_db[form])
    rest = sorted((form for form in milliseconds if form != winner), key=milliseconds.__getitem__)
    took = f"({milliseconds[winner]:.2f} ms)"
    reasons = {
        form: f"as fast as {winner} {took} and further from the checkpoint "
        f"({sqnr_db[form]:.0f} against {sqnr_db[winner]:.0f} dB)"
        if form in equal
        else f"{milliseconds[form] / milliseconds[winner]:.2f}x the time of {winner} {took} here"
        for form in rest
    }
    return Ranking((winner, *rest), reasons)


def recall(folder: Path | None, key: Key) -> Outcome | None:
    """What is remembered under ``key``; None if that is nothing, or cannot be read as such."""
    if folder is None:
        return None
    try:
        with _file(folder, key).open("rb") as file:
            outcome = msgspec.json.decode(file.read(_MAX_BYTES), type=Outcome)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return outcome if outcome.key == key else None


def remember(
    folder: Path | None, key: Key, milliseconds: dict[str, float], failed: dict[str, Failure]
) -> str:
    """Keep the outcome; why that was not possible, or nothing."""
    if folder is None:
        return "there is no cache folder"
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    outcome = Outcome(key=key, date=date, milliseconds=milliseconds, failed=failed)
    try:
        # Plans are believed only in a folder that nobody else can write to, whatever the umask.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic.write_bytes(_file(folder, key), msgspec.json.format(msgspec.json.encode(outcome)))
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return ""


def _file(folder: Path, key: Key) -> Path:
    return folder / "races" / f"{key.digest}.json"
