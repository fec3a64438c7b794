"""How the line stands, put together once a second for its page, its metrics and systemd.

It reads what the parts of the line know of themselves and decides nothing; what is not there stays
absent. It hangs on the loop like everything else that may fail.
"""

import datetime
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from runtime import atomic, machine
from runtime.choose import Step
from runtime.classifier import Classifier
from runtime.delivery.device_status import UPDATE, UpdateRecord, expiries, read_record
from runtime.delivery.fleet_health import NOT_EQUIPPED
from runtime.delivery.live import LiveClassifier
from runtime.delivery.slots import Slots
from runtime.line.evidence import Evidence
from runtime.line.feed import Feed
from runtime.line.health import Health
from runtime.line.inspection import Inspected, Inspector
from runtime.line.line_metrics import LineMetrics, Standing, sentence
from runtime.line.notify import Notifier
from runtime.line.outbox import Outbox
from runtime.line.page import snapshot
from runtime.line.page.snapshot import Board, Condition
from runtime.line.sending import Sending
from runtime.line.thermal import Cooling, Heat
from runtime.line.verdict import Finding
from runtime.monitoring.drift import Moved
from runtime.sources.frame import Frame
from runtime.version import __version__

_FILE_S = 5.0
"""How often the file of metrics is written; collectors ask every 15 to 60 seconds."""

_DEVICE_S = 60.0
"""How often slots and signed metadata are looked at."""


class Parts(NamedTuple):
    """What there is to ask."""

    model: Classifier | LiveClassifier
    state: Path
    device: str
    """Its name for people."""
    feed: Feed
    metrics: LineMetrics
    cooling: Cooling
    heat: Callable[[], Heat]
    inspector: Inspector
    outbox: Outbox
    health: Health
    evidence: Evidence | None = None
    sending: Sending | None = None

    def counted(self) -> dict[str, int]:
        """Frames by verdict, and those that were lost, since the start."""
        results = {str(word): count for word, count in self.metrics.results.items()}
        return {**results, "dropped": sum(self.feed.dropped().values())}


class Showing:
    """Shows ``parts`` on ``board`` and in ``file``, where those are, and tells ``notifier``."""

    def __init__(
        self, parts: Parts, notifier: Notifier, *, board: Board | None, file: Path | None
    ) -> None:
        self._parts, self._notifier = parts, notifier
        self._board, self._file = board, file
        self._live = parts.model if isinstance(parts.model, LiveClassifier) else None
        self._started = datetime.datetime.now(datetime.timezone.utc)
        self._file_at = self._device_at = float("-inf")
        self._update_state = "none"
        self._expires: Mapping[str, datetime.datetime] = {}
        self._last_update: UpdateRecord | None = None
        self._faults: dict[str, str] = {}
        self._machine = machine.describe().model or ""

    def judged(self, frame: Frame, inspected: Inspected, said: Finding) -> None:
        """What hangs on the loop is told this of every frame."""
        self._faults[frame.source] = said.reason if inspected.fault == "camera" else ""
        if self._board:
            self._board.judged(said, inspected.seen.image if inspected.seen else None)

    def tick(self) -> None:
        """A second has gone by."""
        now = time.monotonic()
        if now >= self._device_at:
            self._device_at = now + _DEVICE_S
            self._look_at_device()
        self._notifier.status(self.status())
        writes_file = self._file is not None and now >= self._file_at
        if not (self._board or writes_file):
            return
        text = self.metrics()
        if self._board:
            self._board.publish(self._condition("inspecting"), text)
        if self._file and writes_file:
            self._file_at = now + _FILE_S
            atomic.write_text(self._file, text)

    def end(self, said: str) -> None:
        """The line has stopped, and ``said`` why."""
        text = self.metrics()
        if self._board:
            self._board.publish(self._condition("stopped", said), text)
        if self._file:
            atomic.write_text(self._file, text)

    def status(self) -> str:
        """One line about it all."""
        parts = self._parts
        counted = sentence(parts.metrics.results, sum(parts.feed.dropped().values()))
        return f"{counted}; {self._classifier.engine}"

    def metrics(self) -> str:
        """All of it in the words of Prometheus."""
        parts = self._parts
        standing = self._standing(self._classifier)
        evidence = parts.evidence.metrics() if parts.evidence else ""
        return parts.metrics.text(standing) + evidence

    @property
    def _classifier(self) -> Classifier:
        model = self._parts.model
        return model.classifier if isinstance(model, LiveClassifier) else model

    def _standing(self, classifier: Classifier) -> Standing:
        parts, manifest = self._parts, classifier.bundle.manifest
        return Standing(
            bundle_sha256=self._live.slot.sha256 if self._live else manifest.digest,
            bundle_version=manifest.version,
            provider=classifier.engine.provider,
            degraded=bool(degraded(classifier.steps)),
            ages_s=parts.feed.ages(),
            dropped=parts.feed.dropped(),
            heat=parts.heat(),
            share=parts.cooling.share,
            outbox=parts.outbox.counts(),
            update_state=self._update_state,
            expires={role: moment.timestamp() for role, moment in self._expires.items()},
            drift={test.of: test.p_value for test in self._tests()},
        )

    def _condition(self, phase: snapshot.Phase, said: str = "") -> Condition:
        parts = self._parts
        classifier = self._classifier
        return Condition(
            device=parts.device, fieldfit=__version__, phase=phase, said=said,
            started=self._started, machine=self._machine,
            model=self._model(classifier),
            engine=snapshot.Engine(
                name=str(classifier.engine), reasons=tuple(classifier.reasons),
                degraded=degraded(classifier.steps),
            ),
            cameras=self._cameras(), heat=self._heat(), drift=self._drift(),
            drift_fill=parts.health.fill,
            outbox=self._outbox(), disks=(self._disk(),),
            update=self._update(),
            stages={
                stage: snapshot.Spread(*values.values())
                for stage, values in parts.metrics.quantiles_ms().items()
            },
            evidence=self._evidence(),
        )  # fmt: skip

    def _model(self, classifier: Classifier) -> snapshot.Model:
        manifest, live = classifier.bundle.manifest, self._live
        return snapshot.Model(
            name=manifest.name,
            version=manifest.version,
            slot=live.slot.sha256 if live else "",
            trial=f"{live.slot.release} answers on trial" if live and live.on_trial else "",
            adaptation=str(manifest.adaptation),
            verified=manifest.adaptation.verified,
            ok_labels=tuple(sorted(self._parts.inspector.ok)),
        )

    def _cameras(self) -> tuple[snapshot.Camera, ...]:
        feed = self._parts.feed
        ages = feed.ages()
        return tuple(
            snapshot.Camera(
                name=source.name, kind="camera" if source.live else "files",
                age_s=ages.get(source.name), fault=self._faults.get(source.name, ""),
                dropped=source.dropped,
            )
            for source in feed.sources
        )  # fmt: skip

    def _heat(self) -> snapshot.Heat:
        heat, cooling = self._parts.heat(), self._parts.cooling
        return snapshot.Heat(
            zones=dict(heat.zones), limit_c=cooling.limit_c, throttling=heat.throttling,
            share=cooling.share, reason=cooling.reason,
        )  # fmt: skip

    def _tests(self) -> tuple[Moved, ...]:
        report = self._parts.health.report
        return report.tests if report else ()

    def _drift(self) -> tuple[snapshot.Drift, ...] | None:
        health = self._parts.health
        if not health.knows:
            return None
        report = health.report
        if report is None:
            return ()
        return tuple(
            snapshot.Drift(
                of=test.of, p_value=test.p_value, alpha=report.threshold,
                drifted=test.p_value < report.threshold, window=report.window,
                sentence=report.sentence if test is report.tests[0] else "",
            )
            for test in report.tests
        )  # fmt: skip

    def _outbox(self) -> snapshot.Outbox:
        counts, sending = self._parts.outbox.counts(), self._parts.sending
        broken = sending is not None and not sending.state.connected
        return snapshot.Outbox(
            rows=counts.rows, bytes=counts.bytes, sent=counts.sent, dropped=counts.dropped,
            unkept=counts.unkept, refused=counts.refused, to=sending.to if sending else "",
            fault=sending.state.reason if sending and broken else "",
        )  # fmt: skip

    def _evidence(self) -> snapshot.Evidence | None:
        evidence = self._parts.evidence
        if evidence is None:
            return None
        return snapshot.Evidence(
            kept=sum(evidence.held.values()), bytes=evidence.size,
            limit_bytes=evidence.caps.bytes, refused=evidence.refusals(),
        )  # fmt: skip

    def _disk(self) -> snapshot.Disk:
        usage = shutil.disk_usage(self._parts.state)
        return snapshot.Disk(path=str(self._parts.state), free=usage.free, total=usage.total)

    def _update(self) -> snapshot.Update | None:
        last, expires = self._last_update, dict(self._expires)
        if last is None:
            return snapshot.Update(expires=expires) if expires else None
        return snapshot.Update(expires=expires, outcome=last.outcome, failed=last.failed)

    def _look_at_device(self) -> None:
        self._expires = expiries(self._parts.state / "tuf")
        self._last_update = read_record(self._parts.state / UPDATE, UpdateRecord)
        if self._live is None:
            return
        state = Slots(self._parts.state).status().state
        self._update_state = "on trial" if state.pending else "current"


def starting(device: str) -> Condition:
    """What there is to show until the engine is open."""
    return Condition(
        device=device, fieldfit=__version__, phase="starting", said="opening the engine",
        started=datetime.datetime.now(datetime.timezone.utc),
    )  # fmt: skip


def degraded(steps: Sequence[Step]) -> str:
    """Why an engine that this device is made for does not run; empty if it does."""
    return "; ".join(
        str(step) for step in steps if not step.accepted and step.fault not in NOT_EQUIPPED
    )
