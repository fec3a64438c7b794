"""Prove a slot on this device before it may answer, without touching the one that answers now.

The bundle is opened in a process of its own, so that a model that crashes, hangs or eats the
memory is a reason and not our end. Its engine is built into the slot and stays there. What is
demanded beyond the golden samples is in ``Limits``; ``judge`` is the pure decision. It knows no
frames, and changes no state: ``runtime.delivery.live`` does.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

import runtime
from runtime import atomic
from runtime.candidates import Request
from runtime.delivery.proof import Findings, Place, ProofFault, Refused, Task
from runtime.delivery.slots import Slot
from runtime.errors import UpdateError
from runtime.manifest import Minimum
from runtime.trials import failure

DEADLINE_S = 1800.0
"""For a proof in all. A first build takes minutes on a small board, and the slot that answers now
does so meanwhile: patience costs nothing."""

_LIMITS = "limits.json"
_MAX_LIMITS_BYTES = 64 * 1024

_NOBODYS_LOSS_MS = 1.0
"""So much more is not too slow, whatever the factor: very small models vary by as much."""

Above0 = Annotated[float, msgspec.Meta(gt=0)]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a slot must keep to, beyond its golden samples."""

    require: Minimum | None = None
    """The least engine, beyond what the manifest requires and the service asks for."""
    latency_ms: Above0 | None = None
    """Most milliseconds of one call, as 99 of 100 calls keep it; then ``slower_than`` is void."""
    slower_than: Above0 = 3.0
    """Most times the median of the slot that answers now. A model may well grow by an
    architecture's size; beyond that somebody should have said so."""
    allow_new_labels: bool = False
    """Accept other labels, or another order: whoever reads the answers is known to be ready."""

    def most_ms(self, median_ms: float | None) -> float | None:
        """What one call may take, where the slot that answers now takes ``median_ms``.

        None if there is neither a limit nor anything to compare with.
        """
        if self.latency_ms is not None or median_ms is None:
            return self.latency_ms
        return max(self.slower_than * median_ms, median_ms + _NOBODYS_LOSS_MS)


class Proof(NamedTuple):
    """Whether a slot may answer here, and why not."""

    passed: bool
    reason: str
    """Why it is refused, or what it rests on."""
    fault: ProofFault | None
    findings: Findings | None
    """None if it did not come that far."""
    seconds: float


def prove(
    slot: Slot,
    *,
    beside: Slot | None = None,
    limits: Limits | None = None,
    request: Request | None = None,
    deadline_s: float = DEADLINE_S,
    started: Callable[["subprocess.Popen[bytes]"], object] = lambda process: None,
) -> Proof:
    """Open ``slot`` in a process of its own, replay its golden samples, time it, and judge.

    ``beside`` is the slot that answers now, for its labels and its speed. Every way to fail is a
    reason: nothing that the bundle does raises. ``started`` is given the process; it may be killed.
    """
    limits, request = limits or Limits(), request or Request()
    task = Task(
        slot=_place(slot),
        beside=_place(beside) if beside else None,
        parent=os.getpid(),
        engine=request.engine,
        form=request.form,
        require=limits.require or request.require,
        threads=request.threads,
        device=request.device,
    )
    start = time.monotonic()
    outcome = _run(task, deadline_s, started)
    took = time.monotonic() - start
    if isinstance(outcome, Refused):
        return Proof(False, outcome.reason, outcome.fault, None, took)
    refused = judge(outcome, limits)
    if refused:
        return Proof(False, refused.reason, refused.fault, outcome, took)
    reason = f"{outcome.engine}; p99 {outcome.p99_ms:.2f} ms"
    return Proof(True, reason, None, outcome, took)


def judge(findings: Findings, limits: Limits) -> Refused | None:
    """Why a bundle that answers as proven may not answer here, or None; a pure decision."""
    labels, now = findings.labels, findings.beside_labels
    if findings.width != len(labels):
        return Refused(
            fault="wrong shape",
            reason=f"expected {len(labels)} logits, one for each label, got {findings.width}",
        )
    if now is not None and labels != now and not limits.allow_new_labels:
        what = "in another order" if set(labels) == set(now) else "others"
        return Refused(
            fault="wrong labels",
            reason=f"its labels are {what}: {', '.join(labels)}; the slot that answers now has "
            f"{', '.join(now)}; if that is wanted, activate it with --allow-new-labels",
        )
    most = limits.most_ms(findings.beside_p50_ms)
    if limits.latency_ms is not None:
        taken, what = findings.p99_ms, "p99 of one call"
    else:
        taken, what = findings.p50_ms, "median of one call"
    if most is None or taken <= most:
        return None
    reason = f"{what} {taken:.2f} ms, the limit is {most:.2f} ms"
    if limits.latency_ms is None:
        reason += (
            f", as the slot that answers now takes {findings.beside_p50_ms:.2f} ms; if that is "
            "wanted, activate it with --latency-ms"
        )
    return Refused(fault="too slow", reason=reason)


def keep_limits(slot: Slot, limits: Limits) -> None:
    """Write down in the slot what whoever tries it has to demand."""
    atomic.write_bytes(slot.folder / _LIMITS, msgspec.json.encode(limits))


def kept_limits(slot: Slot) -> Limits:
    """What was written down, or the defaults.

    Raises UpdateError if that cannot be read.
    """
    path = slot.folder / _LIMITS
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_MAX_LIMITS_BYTES), type=Limits)
    except FileNotFoundError:
        return Limits()
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UpdateError(f"{path}: {error}; activate the slot again") from error


def _place(slot: Slot) -> Place:
    return Place(str(slot.bundle), str(slot.engines))


def _run(
    task: Task, deadline_s: float, started: Callable[["subprocess.Popen[bytes]"], object]
) -> Findings | Refused:
    # This package, whatever lies in the current folder (PYTHONSAFEPATH: Python 3.11 and newer).
    places = [str(Path(runtime.__file__).parent.parent), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(filter(None, places))
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-m", "runtime.delivery.proof"], stdin=pipe, stdout=pipe, stderr=pipe,
        env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
    ) as process:  # fmt: skip
        started(process)
        try:
            answer, said = process.communicate(msgspec.json.encode(task), timeout=deadline_s)
        except subprocess.TimeoutExpired:
            process.kill()
            reason = f"no answer within {deadline_s:g} s: it hangs, or is far too slow"
            return Refused(fault="no answer in time", reason=reason)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        fault: ProofFault = "crashed" if process.returncode < 0 else "failed"
        return Refused(
            fault=fault, reason=failure(process.returncode, said.decode(errors="replace"))
        )
    return msgspec.json.decode(answer, type=Findings | Refused)
