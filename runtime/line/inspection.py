"""One frame in, one finding out: what the line says about it, and why.

It decides and keeps nothing; it knows no outbox and no camera. Whatever goes wrong with a frame,
the finding is NOT INSPECTED with its reason; it is never that of another frame.
"""

import datetime
import logging
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from runtime.bundle import Bundle
from runtime.classifier import Answer, Classifier
from runtime.engines.engine import Engine
from runtime.errors import DataError, EngineError, FieldfitError
from runtime.line.verdict import Finding, Word
from runtime.manifest import Manifest
from runtime.preprocess import ImageLike
from runtime.sources.frame import Frame

_log = logging.getLogger(__name__)

UInt8 = npt.NDArray[np.uint8]

Fault = Literal["camera", "image", "engine", "program"]
"""Where it went wrong: no image came, it cannot be read, the engine failed, or this program did."""


class Seen(Protocol):
    """``runtime.classifier.Inspection``, or that of a slot."""

    @property
    def answer(self) -> Answer: ...
    @property
    def image(self) -> UInt8: ...
    @property
    def features(self) -> npt.NDArray[np.float32]: ...
    @property
    def by(self) -> Classifier: ...


class Model(Protocol):
    """``Classifier`` or ``LiveClassifier``."""

    @property
    def bundle(self) -> Bundle: ...
    @property
    def engine(self) -> Engine: ...
    def inspect(self, image: ImageLike) -> Seen: ...


class Noticed(Protocol):
    """What a health check noticed on an image: ``runtime.monitoring.image_quality.Flag``."""

    @property
    def word(self) -> str: ...
    @property
    def sentence(self) -> str: ...
    @property
    def alarms(self) -> bool: ...


class Checks(Protocol):
    """``runtime.line.health.Health``."""

    def look(self, source: str, image: UInt8, bundle: Bundle) -> Sequence[Noticed]: ...
    def forget(self, source: str) -> None: ...


class Inspected(NamedTuple):
    """What is said about one frame, and what it was found from."""

    finding: Finding
    fault: Fault | None = None
    """Set if the finding is NOT INSPECTED."""
    seen: Seen | None = None


class Inspector:
    """Looks at frames one after the other; it serves one thread.

    ``boot`` is the kernel's boot id. ``ok`` are the labels that are OK instead of those that the
    bundle names. Without ``checks`` no image is checked.

    Raises DataError if the bundle does not have those labels, or none is named at all.
    """

    def __init__(
        self, model: Model, *, boot: str, ok: Iterable[str] = (), checks: Checks | None = None
    ) -> None:
        self._model, self._boot, self._checks = model, boot, checks
        self._given = tuple(ok)
        self._judging = model.bundle.manifest
        self.ok = ok_labels(self._judging, self._given)
        """The labels that are OK, of the bundle that answers."""

    def inspect(self, frame: Frame, waited_s: float) -> Inspected:
        """What the line says about ``frame``, which ``waited_s`` seconds ago was taken.

        It raises nothing.
        """
        waited = {"wait": waited_s * 1e3}
        if frame.image is None:
            self._forget(frame.source)
            return self._not_inspected(frame, "camera", frame.fault or "there is no image", waited)
        try:
            return self._inspect(frame, frame.image, waited)
        except DataError as error:
            return self._not_inspected(frame, "image", str(error), waited)
        except FieldfitError as error:
            return self._not_inspected(frame, "engine", str(error), waited)
        except Exception as error:  # the line goes on, whatever it is
            _log.exception("%s, %s", frame.source, frame.id)
            reason = f"{type(error).__name__}: {error}"
            return self._not_inspected(frame, "program", reason, waited)

    def give_up(self, frame: Frame, reason: str, waited_s: float) -> Inspected:
        """What the line says about ``frame`` if it may not be looked at."""
        return self._not_inspected(frame, "program", reason, {"wait": waited_s * 1e3})

    def _inspect(self, frame: Frame, image: ImageLike, waited: dict[str, float]) -> Inspected:
        seen = self._model.inspect(image)
        answer, manifest = seen.answer, seen.by.bundle.manifest
        if not math.isfinite(answer.score):
            raise EngineError(f"{seen.by.engine}: the answer is not finite (NaN or overflow)")
        if manifest is not self._judging:  # a new slot answers
            self.ok, self._judging = self._labels(manifest), manifest
        start = time.perf_counter()
        flags = self._look(frame.source, seen)
        look = {"look": (time.perf_counter() - start) * 1e3}
        word, reason = judge(answer, flags, self.ok, manifest.abstain_below)
        finding = Finding(
            **_when_and_where(frame), boot=self._boot, verdict=word, reason=reason,
            flags=tuple(flag.word for flag in flags), label=answer.label, score=answer.score,
            bundle=manifest.name, version=manifest.version, engine=str(seen.by.engine),
            milliseconds={**waited, **answer.milliseconds, **look},
        )  # fmt: skip
        return Inspected(finding, None, seen)

    def _look(self, source: str, seen: Seen) -> Sequence[Noticed]:
        return self._checks.look(source, seen.image, seen.by.bundle) if self._checks else ()

    def _forget(self, source: str) -> None:
        if self._checks:
            self._checks.forget(source)

    def _not_inspected(
        self, frame: Frame, fault: Fault, reason: str, waited: dict[str, float]
    ) -> Inspected:
        finding = Finding(
            **_when_and_where(frame), boot=self._boot, verdict="NOT INSPECTED", reason=reason,
            milliseconds=waited,
        )  # fmt: skip
        return Inspected(finding, fault)

    def _labels(self, manifest: Manifest) -> frozenset[str]:
        try:
            return ok_labels(manifest, self._given)
        except DataError as error:  # the image is not to blame
            raise EngineError(str(error)) from error


def judge(
    answer: Answer, flags: Sequence[Noticed], ok: frozenset[str], abstain_below: float
) -> tuple[Word, str]:
    """The verdict on an image that was read, and why, if it is ABSTAIN."""
    if alarms := [flag.sentence for flag in flags if flag.alarms]:
        return "ABSTAIN", "; ".join(alarms)
    if answer.abstained:
        return "ABSTAIN", (
            f"{answer.label} has a score of {answer.score:.3f}, the bundle asks for "
            f"{abstain_below:.3f}"
        )
    return ("OK" if answer.label in ok else "DEFECT"), ""


def ok_labels(manifest: Manifest, given: Sequence[str]) -> frozenset[str]:
    """The labels that are OK: those ``given``, else those that the bundle names.

    Raises DataError if one is no label of the bundle, or there is none.
    """
    known = ", ".join(manifest.labels)
    for label in given:
        if label not in manifest.labels:
            raise DataError(
                f"{manifest.name} {manifest.version}: has no label {label!r} that --ok names; "
                f"it has {known}"
            )
    if not given and not manifest.ok_labels:
        raise DataError(
            f"{manifest.name} {manifest.version}: does not say which of its labels are OK; pass "
            f"--ok LABEL, one or more of {known}"
        )
    return frozenset(given or manifest.ok_labels)


def _when_and_where(frame: Frame) -> dict[str, Any]:
    return {
        "time": iso(frame.time),
        "monotonic": frame.monotonic,
        "source": frame.source,
        "frame": frame.id,
    }


def iso(seconds: float) -> str:
    """``2026-03-01T08:15:30.123Z`` of seconds since the epoch."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
