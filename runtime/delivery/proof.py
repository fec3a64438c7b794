"""Runs in a process of its own: open a bundle as a device would, replay, time it, say what came.

``python -m runtime.delivery.proof`` reads a Task as JSON from stdin and writes Findings or a
Refused as JSON to stdout; anything else that goes wrong is a traceback, a signal, or no answer in
time. It judges nothing and knows no slots: ``activation`` is the other side.
"""

import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from runtime.candidates import EngineName
from runtime.command import end_with
from runtime.errors import BundleError, EngineError, EngineFault, FieldfitError
from runtime.manifest import Minimum

if TYPE_CHECKING:
    from runtime.engines.engine import Engine, UInt8

_CALLS, _SECONDS, _LEAST = 300, 4.0, 20
"""Each bundle is timed for so many calls, or so long, but for no fewer calls than the last."""

ProofFault = (
    EngineFault
    | Literal["damaged bundle", "wrong shape", "wrong labels", "crashed", "no answer in time"]
)
"""Why a bundle was refused, in words that a metric can count."""


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A bundle folder, and the folder of the engines that were built from it."""

    bundle: str
    engines: str


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to open, what to compare it with, and how; the rest is ``candidates.Request``."""

    slot: Place
    beside: Place | None
    """The bundle that answers now; None if none does."""
    parent: int
    """The process that waits for the answer."""
    engine: EngineName | None
    form: str | None
    require: Minimum | None
    threads: int | None
    device: int


class Findings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag=True):
    """What came of a bundle that opened and answered the golden samples."""

    labels: tuple[str, ...]
    width: int
    """K of the logits ``[N, K]``."""
    engine: str
    """The last of ``steps``: which one, and what the golden samples said."""
    steps: tuple[str, ...]
    """One sentence for each candidate engine."""
    p50_ms: float
    p99_ms: float
    """Wall time of one call at batch 1, of some hundreds."""
    beside_p50_ms: float | None
    """Of the bundle that answers now, measured right after."""
    beside_labels: tuple[str, ...] | None


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag=True):
    """Why the bundle cannot answer here."""

    fault: ProofFault
    reason: str


class _Beside(NamedTuple):
    labels: tuple[str, ...] | None = None
    p50_ms: float | None = None


def main() -> int:
    """Read the task, write what came of it; 0."""
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    end_with(task.parent)
    Path("/proc/self/oom_score_adj").write_text("1000")  # the first to go where memory is short
    # Libraries print; the pipe that carries the answer is not theirs.
    pipe = os.dup(1)
    os.dup2(2, 1)
    logging.disable()  # what was passed over is in the answer, and no cause of a crash
    answer: Findings | Refused
    try:
        answer = _find(task)
    except BundleError as error:
        answer = Refused(fault="damaged bundle", reason=str(error))
    except EngineError as error:
        answer = Refused(fault=error.fault, reason=str(error))
    os.write(pipe, msgspec.json.encode(answer))
    return 0


def _find(task: Task) -> Findings:
    import numpy as np

    from runtime.classifier import Classifier

    with Classifier.open(
        task.slot.bundle, require=task.require, engine=task.engine, form=task.form,
        threads=task.threads, device=task.device, cache=task.slot.engines,
    ) as slot:  # fmt: skip
        image = np.ascontiguousarray(slot.bundle.golden()["images"][:1])
        width = slot.engine.infer(image).logits.shape[1]
        times = _time(slot.engine, image)
        beside = _compare(task)
        return Findings(
            labels=slot.bundle.manifest.labels,
            width=width,
            engine=slot.reasons[-1],
            steps=tuple(slot.reasons),
            p50_ms=times["p50"],
            p99_ms=times["p99"],
            beside_p50_ms=beside.p50_ms,
            beside_labels=beside.labels,
        )


def _compare(task: Task) -> _Beside:
    """The bundle that answers now: whatever ails it here is no fault of the new one's."""
    from runtime.bundle import Bundle
    from runtime.classifier import Classifier

    if task.beside is None:
        return _Beside()
    labels = None
    try:
        labels = Bundle.open(task.beside.bundle).manifest.labels
        with Classifier.open(
            task.beside.bundle, engine=task.engine, form=task.form, threads=task.threads,
            device=task.device, cache=task.beside.engines,
        ) as beside:  # fmt: skip
            images = beside.bundle.golden()["images"][:1]
            times = _time(beside.engine, images)
    except FieldfitError:
        return _Beside(labels)
    return _Beside(labels, times["p50"])


def _time(engine: "Engine", image: "UInt8") -> dict[str, float]:
    """Percentiles of the milliseconds of one call; the golden samples have warmed it up."""
    import numpy as np

    from runtime.metrics import percentiles_ms

    taken: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(taken) < _LEAST or (len(taken) < _CALLS and time.perf_counter() < end):
        start = time.perf_counter()
        engine.infer(image)
        taken.append(time.perf_counter() - start)
    return percentiles_ms(np.array(taken))


if __name__ == "__main__":
    sys.exit(main())
