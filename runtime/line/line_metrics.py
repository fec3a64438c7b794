"""What the line counts and times, and how Prometheus reads it.

It is told of each frame and asked now and then; it keeps a few hundred durations of each stage and
no frame. Names and meanings are a contract with dashboards (docs/line.md).
"""

import math
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from typing import NamedTuple, get_args

import numpy as np

from runtime.exposition import Sample, Spread, histogram, metric, summary
from runtime.line.inspection import Inspected
from runtime.line.outbox import Counts
from runtime.line.thermal import Heat
from runtime.line.verdict import Word

STAGES = ("wait", "preprocess", "infer", "look", "record", "total")
"""From when a frame was taken until it is looked at; then what is done with it, and all of it."""

QUANTILES = (0.5, 0.9, 0.99)

_RECENT = 600
"""Durations of a stage that its quantiles are of."""

_BUCKETS_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, math.inf,
)  # fmt: skip


class Standing(NamedTuple):
    """What is read rather than counted: how the line stands at this moment."""

    bundle_sha256: str
    bundle_version: str
    provider: str
    degraded: bool
    """A faster engine should run here and does not."""
    ages_s: Mapping[str, float]
    """Since the newest frame of each source."""
    dropped: Mapping[str, int]
    """Frames lost of each source."""
    heat: Heat
    share: float
    """Of its time that the line works; less than 1 where heat keeps it from that."""
    outbox: Counts
    update_state: str
    """``current``, ``on trial`` or ``none`` of the device's slots."""
    expires: Mapping[str, float]
    """Seconds since the epoch, by role of the update's metadata."""
    drift: Mapping[str, float]
    """p-value of the last window by what was tested."""


class LineMetrics:
    """Counts and durations since the line was started."""

    def __init__(self) -> None:
        self.results: Counter[Word] = Counter()
        self.rejected: Counter[str] = Counter()
        """Frames that were not inspected, by fault, and those that were flagged, by flag."""
        self._recent: dict[str, deque[float]] = {s: deque(maxlen=_RECENT) for s in STAGES}
        self._total_s: defaultdict[str, float] = defaultdict(float)
        self._count: Counter[str] = Counter()
        self._inferred = np.zeros(len(_BUCKETS_S), np.int64)

    def add(self, inspected: Inspected, word: Word, milliseconds: Mapping[str, float]) -> None:
        """Count one frame; ``word`` is what was said of it in the end, stages are in STAGES."""
        self.results[word] += 1
        self.rejected.update(inspected.finding.flags)
        if inspected.fault:
            self.rejected[inspected.fault] += 1
        for stage, value in milliseconds.items():
            self._recent[stage].append(value)
            self._total_s[stage] += value / 1e3
            self._count[stage] += 1
        if "infer" in milliseconds:
            self._inferred[np.searchsorted(_BUCKETS_S, milliseconds["infer"] / 1e3)] += 1

    def unkept(self) -> None:
        """A record could not be kept."""
        self.rejected["disk"] += 1

    def quantiles_ms(self) -> dict[str, dict[float, float]]:
        """Quantiles of each stage over its last durations, in milliseconds."""
        return {
            stage: dict(zip(QUANTILES, np.quantile(list(recent), QUANTILES).tolist(), strict=True))
            for stage, recent in self._recent.items()
            if recent
        }

    def text(self, now: Standing) -> str:
        """All of it in the text format of Prometheus."""
        return "".join(
            [
                histogram(
                    "inference_duration_seconds", "Time in the engine, a frame.",
                    dict(zip(_BUCKETS_S, np.cumsum(self._inferred).tolist(), strict=True)),
                    self._total_s["infer"],
                ),
                summary("stage_duration_seconds", "Time in each stage, a frame.", self._spreads()),
                metric(
                    "results_total", "counter", "Frames by verdict.",
                    [({"verdict": word}, self.results[word]) for word in get_args(Word)],
                ),
                metric(
                    "rejected_inputs_total", "counter",
                    "Frames that were not inspected or were flagged, by reason.",
                    _labelled("reason", self.rejected),
                ),
                _standing(now),
            ]
        )  # fmt: skip

    def _spreads(self) -> list[Spread]:
        return [
            (
                {"stage": stage},
                {quantile: value / 1e3 for quantile, value in values.items()},
                self._total_s[stage],
                self._count[stage],
            )
            for stage, values in self.quantiles_ms().items()
        ]


def _standing(now: Standing) -> str:
    model = {"sha": now.bundle_sha256, "version": now.bundle_version, "ep": now.provider}
    return "".join(
        [
            metric("model_info", "gauge", "The bundle that answers.", [(model, 1)]),
            metric(
                "ep_degraded", "gauge", "1 if a faster engine should run here and does not.",
                [({}, now.degraded)],
            ),
            metric(
                "frame_age_seconds", "gauge", "Since the newest frame of each source was taken.",
                _labelled("source", now.ages_s),
            ),
            metric(
                "frames_dropped_total", "counter", "Frames lost because the line was behind.",
                _labelled("source", now.dropped),
            ),
            metric("outbox_rows", "gauge", "Records that wait.", [({}, now.outbox.rows)]),
            metric(
                "outbox_dropped_total", "counter",
                "Records that went unsent because the outbox was full.",
                [({}, now.outbox.dropped)],
            ),
            metric(
                "outbox_unkept_total", "counter", "Records that the disk refused.",
                [({}, now.outbox.unkept)],
            ),
            metric(
                "update_state", "gauge", "1 for the state that the device's slots are in.",
                [({"state": now.update_state}, 1)],
            ),
            metric(
                "update_metadata_expires_timestamp_seconds", "gauge",
                "When signed metadata expires, by role.", _labelled("role", now.expires),
            ),
            metric(
                "drift_p_value", "gauge", "Of the last window's two-sample test.",
                _labelled("of", now.drift),
            ),
            metric(
                "temperature_celsius", "gauge", "Of each zone that can be read.",
                _labelled("zone", now.heat.zones),
            ),
            metric(
                "throttled", "gauge", "1 while the kernel slows the machine down because of heat.",
                [({}, bool(now.heat.throttling))],
            ),
            metric(
                "working_share", "gauge", "Share of its time that heat lets the line work.",
                [({}, now.share)],
            ),
        ]
    )  # fmt: skip


def _labelled(label: str, values: Mapping[str, float]) -> list[Sample]:
    return [({label: name}, value) for name, value in sorted(values.items())]


def sentence(results: Mapping[Word, int], dropped: int) -> str:
    """``12 frames: 9 OK, 3 DEFECT; 2 dropped``."""
    counted = ", ".join(f"{results[word]} {word}" for word in get_args(Word) if results.get(word))
    frames = sum(results.values())
    return f"{frames} frame{'s' * (frames != 1)}{counted and f': {counted}'}; {dropped} dropped"
