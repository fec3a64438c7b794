"""Answer with the current slot, and change to a new one between two frames, or back.

    live = LiveClassifier("/var/lib/fieldfit")
    for frame in camera:
        answer = live(frame)
        print(answer.label, answer.version)

A slot that was activated is proven and opened beside the one that answers. It then answers on
trial: once it has been stable for a while it is committed, and at the first failure the one before
it, which is still open, answers the same frame. It knows no network and no camera.
"""

import logging
import math
import queue
import statistics
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from runtime.bundle import Bundle
from runtime.candidates import Request
from runtime.classifier import Answer, Classifier
from runtime.delivery.activation import DEADLINE_S, Limits, kept_limits, prove
from runtime.delivery.device_status import record_engine
from runtime.delivery.slots import Slot, Slots
from runtime.engines.engine import Engine
from runtime.errors import BundleError, DataError, EngineError, FieldfitError, UpdateError
from runtime.preprocess import ImageLike
from runtime.private_files import Lock

_log = logging.getLogger(__name__)

LEAD = "live.lock"
"""Held by the process that brings new slots of its folder to trial."""

_REMEMBERED = 300
"""Answers of the current slot whose time says what a slot on trial is compared with."""

_ENOUGH = 30
"""Fewer of them say nothing."""

_LATER_S = 60.0
"""Until what the disk refused is tried again."""

_SLOW_SHARE = 0.01
_SLOW_ONCE = 3
"""So many slow answers are the operating system's, not the model's."""


class LiveAnswer(Answer, frozen=True, kw_only=True):
    """The verdict on one image, and who gave it."""

    slot: str
    """SHA-256 of the bundle."""
    version: str


class LiveInspection(NamedTuple):
    """``Inspection`` with the slot that gave the answer."""

    answer: LiveAnswer
    image: npt.NDArray[np.uint8]
    """uint8 ``[H, W, C]``, as the model saw it."""
    features: npt.NDArray[np.float32]
    """float32 ``[D]``, what the model's last layer saw."""
    by: Classifier


class Stability(NamedTuple):
    """How long a slot answers on trial."""

    seconds: float = 60.0
    answers: int = 30
    """At least so many, however long that takes: a line that stands still proves nothing."""


class Trial:
    """How a slot on trial fares: a pure count of answers against the limits.

    ``limit_ms`` is that of one call; None if there is nothing to compare it with.
    """

    def __init__(self, stability: Stability, limit_ms: float | None, started: float) -> None:
        self._stability = stability
        self._limit_ms = limit_ms
        self._started = started
        self._answers = 0
        self._slow = 0

    def answered(self, milliseconds: float) -> str | None:
        """Count one answer; why the trial has failed, or None."""
        self._answers += 1
        if self._limit_ms is None or milliseconds <= self._limit_ms:
            return None
        self._slow += 1
        if self._slow <= max(_SLOW_ONCE, _SLOW_SHARE * self._answers):
            return None
        return (
            f"too slow: {self._slow} of {self._answers} answers took more than "
            f"{self._limit_ms:.2f} ms"
        )

    def stable(self, now: float) -> bool:
        """Whether it has answered for long enough."""
        enough = self._answers >= self._stability.answers
        return enough and now - self._started >= self._stability.seconds


class _Opened(NamedTuple):
    slot: Slot
    limits: Limits
    classifier: Classifier


_Then = Callable[[], None]
"""What is left to do between two frames once something beside them is done."""


class _Worker:
    """Does one thing after another beside the frames."""

    def __init__(self) -> None:
        self._left = 0
        self._todo: queue.SimpleQueue[Callable[[], _Then | None] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[_Then | None] = queue.SimpleQueue()
        # A daemon: a process that wants to end need not wait for a proof.
        self._thread = threading.Thread(target=self._run, name="fieldfit-live", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether all that was asked is done, and its rest too."""
        return self._left == 0

    def ask(self, job: Callable[[], _Then | None]) -> None:
        """Do ``job`` when those before it are done."""
        self._left += 1
        self._todo.put(job)

    def finish(self) -> None:
        """Do the rest of what is done; to be called between two frames."""
        while self._left:
            try:
                then = self._done.get_nowait()
            except queue.Empty:
                return
            self._left -= 1
            if then:
                then()

    def close(self) -> None:
        """Return when the job under way has ended."""
        self._todo.put(None)
        self._thread.join()

    def _run(self) -> None:
        while job := self._todo.get():
            then = None
            try:
                then = job()
            except Exception:  # an update never stops inference, whatever it is
                _log.exception("beside the frames")
            self._done.put(then)


class LiveClassifier:
    """The classifier of a device whose slots change. It serves one thread at a time.

    ``folder`` is the device's state folder. ``request`` says which engine may run, ``stability``
    how long a new slot is on trial; ``deadline_s`` is that of ``prove``; ``clock`` is monotonic.

    Of several on one folder the first brings new slots to trial; the others follow once they are
    committed.

    Raises UpdateError if no slot was ever committed and none that is on trial can answer,
    EngineError if the current one cannot, nor the one before it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        request: Request | None = None,
        stability: Stability | None = None,
        deadline_s: float = DEADLINE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots = Slots(Path(folder))
        self._request = request or Request()
        self._stability = stability or Stability()
        self._deadline_s, self._clock = deadline_s, clock
        self._closing = False
        self._proof: subprocess.Popen[bytes] | None = None
        self._lead: Lock | None = None
        self._seen: tuple[int, ...] = ()
        self._look_at = math.inf
        """When to look at the state although it has not changed."""
        self._trial: Trial | None = None
        self._before: _Opened | None = None
        """What answered before the trial, still open."""
        self._passed_over = ""
        """A slot that was found to fail here, as long as the state gives it a part."""
        self._milliseconds: deque[float] = deque(maxlen=_REMEMBERED)
        try:
            self._answering = self._open_standing() or self._open_first()
        except BaseException:
            if self._lead:
                self._lead.close()
            raise
        self._worker = _Worker()
        self._leads()

    @property
    def slot(self) -> Slot:
        """The slot that answers."""
        return self._answering.slot

    @property
    def on_trial(self) -> bool:
        """Whether the slot that answers is not committed yet."""
        return self._trial is not None

    @property
    def classifier(self) -> Classifier:
        """The classifier that answers: its engine, its reasons, its bundle."""
        return self._answering.classifier

    @property
    def bundle(self) -> Bundle:
        """The bundle that answers."""
        return self._answering.classifier.bundle

    @property
    def engine(self) -> Engine:
        """The engine that answers."""
        return self._answering.classifier.engine

    def __call__(self, image: ImageLike) -> LiveAnswer:
        """Classify one image, as ``Classifier`` does.

        Raises DataError if it cannot be read, EngineError if the current slot fails.
        """
        return self.inspect(image).answer

    def inspect(self, image: ImageLike) -> LiveInspection:
        """Classify one image, as ``Classifier.inspect`` does.

        Raises DataError if it cannot be read, EngineError if the current slot fails.
        """
        self.poll()
        if self._trial is None:
            inspection = self._ask(image)
            self._milliseconds.append(inspection.answer.milliseconds["infer"])
            return inspection
        try:
            inspection = self._ask(image)
        except DataError:
            raise
        except Exception as error:  # whatever a slot on trial does, the line goes on
            self._step_back(f"failed on a frame: {error}")
            return self._ask(image)
        if slow := self._trial.answered(inspection.answer.milliseconds["infer"]):
            self._step_back(slow)
        return inspection

    def poll(self) -> None:
        """Between two frames: take over what is ready. A look at one file, if nothing is."""
        self._worker.finish()
        if self._state_changed() or self._clock() >= self._look_at:
            self._look_at = math.inf
            self._follow()
        if self._trial is not None and self._worker.idle and self._trial.stable(self._clock()):
            stable = self._answering
            self._worker.ask(lambda: self._commit(stable))

    def close(self) -> None:
        """Free the engines. What is on trial stays so, and is tried again at the next start."""
        self._closing = True
        if self._proof:
            self._proof.kill()
        self._worker.close()
        self._answering.classifier.close()
        if self._before:
            self._before.classifier.close()
        if self._lead:
            self._lead.close()

    def __enter__(self) -> "LiveClassifier":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- between two frames

    def _ask(self, image: ImageLike) -> LiveInspection:
        slot, _, classifier = self._answering
        answer, seen, features, _ = classifier.inspect(image)
        if not math.isfinite(answer.score):
            raise EngineError(f"{classifier.engine}: the answer is not finite (NaN or overflow)")
        fields = msgspec.structs.asdict(answer)
        live = LiveAnswer(**fields, slot=slot.sha256, version=slot.version)
        return LiveInspection(live, seen, features, classifier)

    def _state_changed(self) -> bool:
        try:
            status = self._slots.state_file.stat()
        except OSError:  # a disk that is gone takes no answers along
            return False
        seen = (status.st_ino, status.st_mtime_ns, status.st_size)
        changed = seen != self._seen
        self._seen = seen
        return changed

    def _follow(self) -> None:
        """Do what the state says: somebody may have activated, committed or rolled back."""
        try:
            state = self._slots.status().state
        except (OSError, UpdateError) as error:
            _log.warning("the state cannot be read, so nothing changes: %s", error)
            return
        answering = self._answering.slot.sha256
        pending = state.pending.release.sha256 if state.pending else None
        current = state.current.sha256 if state.current else None
        if self._passed_over not in (current, pending):
            self._passed_over = ""
        if self._trial is not None:
            if current == answering:
                self._settle()
            elif pending != answering:
                self._return("it was rolled back")
            return
        if not self._worker.idle:
            self._seen = ()  # look again when it is done
        elif current not in (None, answering, self._passed_over):
            self._worker.ask(self._open_current)
        elif pending not in (None, self._passed_over):
            self._worker.ask(self._take_up)

    def _begin_trial(self, opened: _Opened) -> None:
        # Should somebody have given it up meanwhile, the look at the state that is next ends this.
        self._seen = ()
        self._before, self._answering = self._answering, opened
        self._start_trial(opened.limits)

    def _start_trial(self, limits: Limits) -> None:
        self._trial = Trial(self._stability, self._limit_ms(limits), self._clock())
        _log.warning("%s answers on trial", self.slot.release)

    def _limit_ms(self, limits: Limits) -> float | None:
        known = len(self._milliseconds) >= _ENOUGH
        return limits.most_ms(statistics.median(self._milliseconds) if known else None)

    def _step_back(self, reason: str) -> None:
        """The one before answers from now on; that is written down beside the frames."""
        failed = self._answering.slot
        self._passed_over = failed.sha256
        self._worker.ask(lambda: self._give_up(failed, reason))
        self._return(reason)

    def _return(self, reason: str) -> None:
        if self._before is None:
            raise UpdateError(
                f"{self.slot.release}: {reason}; no slot before it is left to answer, activate one"
            )
        self._answering.classifier.close()
        self._answering, self._before, self._trial = self._before, None, None

    def _settle(self) -> None:
        if self._before:
            self._before.classifier.close()
        self._before, self._trial = None, None
        self._milliseconds.clear()

    def _replace(self, opened: _Opened) -> None:
        self._answering.classifier.close()
        self._answering = opened
        self._milliseconds.clear()

    # --- beside the frames

    def _leads(self) -> bool:
        try:
            self._lead = self._lead or Lock.attempt(self._slots.folder / LEAD)
        except OSError as error:
            _log.warning("no slot can come to trial: %s: %s", error.filename, error.strerror)
        return self._lead is not None

    def _take_up(self) -> _Then | None:
        if self._closing or not self._leads():
            return None
        try:
            opened = self._open_pending()
        except (OSError, UpdateError) as error:  # of the state: a full disk may have room again
            _log.warning("the slot on trial has to wait: %s", error)
            return self._look_later
        if opened and self._closing:
            opened.classifier.close()
        elif opened:
            return lambda: self._begin_trial(opened)
        return None

    def _look_later(self) -> None:
        self._look_at = self._clock() + _LATER_S

    def _open_pending(self) -> _Opened | None:
        """Prove and open the slot on trial; the try is spent on disk before it begins."""
        slot = self._slots.begin_try()
        if slot is None:
            return None
        try:
            proof = prove(
                slot, beside=self._slots.current(), limits=kept_limits(slot),
                request=self._request, deadline_s=self._deadline_s,
                started=self._started,
            )  # fmt: skip
            if self._closing:
                return None
            if proof.passed:
                return self._open(slot)
            reason = f"{proof.fault}: {proof.reason}"
        except FieldfitError as error:
            reason = str(error)
        self._give_up(slot, reason)
        return None

    def _started(self, proof: "subprocess.Popen[bytes]") -> None:
        self._proof = proof
        if self._closing:
            proof.kill()

    def _open_current(self) -> _Then | None:
        slot = self._slots.current()
        if slot is None:
            return None
        try:
            opened = self._open(slot)
        except FieldfitError as error:
            _log.warning("%s does not open; %s goes on: %s", slot.release, self.slot.release, error)
            self._passed_over = slot.sha256
            return None
        return lambda: self._replace(opened)

    def _commit(self, stable: _Opened) -> _Then | None:
        try:
            self._slots.commit(stable.slot.sha256)
        except (OSError, UpdateError) as error:
            _log.warning("%s is stable and not committed: %s", stable.slot.release, error)
            return lambda: self._prolong(stable)
        return None

    def _prolong(self, stable: _Opened) -> None:
        if self._answering is stable and self._trial is not None:
            self._start_trial(stable.limits)

    def _give_up(self, slot: Slot, reason: str) -> _Then:
        _log.warning("%s is given up: %s", slot.release, reason)
        self._slots.rollback(reason, slot.sha256)
        return self._forget

    def _forget(self) -> None:
        self._passed_over = ""

    # --- at the start

    def _open(self, slot: Slot) -> _Opened:
        limits = kept_limits(slot)
        asked = self._request._replace(require=limits.require or self._request.require)
        classifier = Classifier.open(slot.bundle, **asked._asdict(), cache=slot.engines)
        record_engine(slot, classifier, asked.require)
        return _Opened(slot, limits, classifier)

    def _open_standing(self) -> _Opened | None:
        """The current slot, or the one before it; None if none was ever committed."""
        if self._slots.status().problems:
            self._slots.recover()
        failed = []
        for slot in (self._slots.current(), self._slots.previous()):
            if slot is None:
                continue
            try:
                return self._open(slot)
            except (BundleError, EngineError, UpdateError) as error:
                _log.warning("%s does not open: %s", slot.release, error)
                failed.append(str(error))
                self._passed_over = slot.sha256
                if isinstance(error, BundleError):
                    self._slots.recover()
        if failed:
            raise EngineError(f"neither the current slot nor one before: {'; '.join(failed)}")
        return None

    def _open_first(self) -> _Opened:
        """The slot on trial, where none was ever committed."""
        pending = self._slots.pending()
        opened = self._open_pending() if pending and self._leads() else None
        if opened is None:
            state = self._slots.status().state
            why = f": {state.failures[-1].reason}" if state.failures else ""
            raise UpdateError(
                f"{self._slots.folder}: no slot can answer{why}; put a bundle into one with "
                "fieldfit stage, then fieldfit activate"
            )
        self._trial = Trial(self._stability, opened.limits.most_ms(None), self._clock())
        return opened


def led(folder: Path) -> bool:
    """Whether a process is running that brings new slots of this state folder to trial."""
    if not folder.is_dir():
        return False
    lock = Lock.attempt(folder / LEAD)
    if lock is not None:
        lock.close()
    return lock is None
