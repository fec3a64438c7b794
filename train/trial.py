"""Candidates on trial: each gets its threshold, is shown the held-out images, and is judged.

It keeps the list of what was tried and what is kept so far. It does not know how candidates are
made (train/rungs), in what order (train/ladder), nor what is demanded of them (train/gate).
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from runtime.recipe import Metric
from train import gate
from train.evaluate import Seen, SweptFeatures, look, portrait, sweep
from train.gate import FEW, Held, Truth, Verdict, metric_value, retention
from train.head import Head
from train.material import Material
from train.model import ImageClassifier
from train.report import Line
from train.rungs import Details, head_of, with_head
from train.similarity import negative_flips, twin_change
from train.threshold import choose_offsets

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


class Candidate(NamedTuple):
    """A model, what it was seen to answer, and how it was made."""

    name: str
    rung: int
    model: ImageClassifier
    """Its head has the decision threshold in its bias."""
    seen: Seen
    swept: SweptFeatures | None
    head: Head
    details: Details
    seconds: float


class Tried(NamedTuple):
    """A candidate and its verdict; None for the source model as it is."""

    candidate: Candidate
    verdict: Verdict | None


class Unfit(NamedTuple):
    """A rung that was not tried."""

    name: str
    rung: int
    reason: str


class Trials:
    """What was tried in one run; ``kept`` is what would ship now, ``first`` the source model."""

    def __init__(
        self, material: Material, model: ImageClassifier, seen: Seen, swept: SweptFeatures | None,
        seconds: float, told: Callable[[Line], None],
    ) -> None:  # fmt: skip
        self.material, self.settings = material, material.recipe.train
        self.told = told
        self.tried: list[Tried] = []
        self.skipped: list[Unfit] = []
        self.first = self.kept = self.candidate(
            "as is", 0, model, seen, swept, head_of(model), Details(), seconds, field=False
        )
        self._tell(Tried(self.first, None))

    def judge_network(
        self, name: str, rung: int, model: ImageClassifier, details: Details, start: float
    ) -> bool:
        """Judge a trained network; returns whether it forgot too much of the source."""
        seen = look(model, self.material, name)
        verdict = self.judge(
            self.candidate(
                name, rung, model, seen, None, head_of(model), details,
                time.monotonic() - start, field=True,
            )
        )  # fmt: skip
        return any(check.name.startswith("source") for check in verdict.checks if not check.passed)

    def judge(
        self, candidate: Candidate, *, metric: Metric | None = None, guard_source: bool = True
    ) -> Verdict:
        """Ask the gate, keep the candidate if it says so, and tell; see gate.judge."""
        material = self.material
        expected, _ = material.expected_rates()
        has_source = len(material.rows("source", "validation")) > 0
        twins = None
        if self.gate_labels() < FEW and candidate.rung:
            candidate = self.with_sweep(candidate)
            twins = self._twins(self.kept), self._twins(candidate)
        first = self._held(self.first)
        kept = first if self.kept is self.first else self._held(self.kept)
        verdict = gate.judge(
            self._held(candidate), kept, first,
            Truth(
                material.labels[material.rows("target", "validation")],
                material.labels[material.rows("source", "validation")] if has_source else None,
                expected,
                material.dataset.classes,
            ),
            self.settings.gate,
            metric or self.settings.metric,
            twins=twins, guard_source=guard_source, seed=material.recipe.seed,
        )  # fmt: skip
        if candidate.details.notes:
            reason = "; ".join([verdict.reason, *candidate.details.notes])
            verdict = msgspec.structs.replace(verdict, reason=reason)
        if verdict.passed:
            self.kept = candidate
        self._tell(Tried(candidate, verdict))
        return verdict

    def candidate(
        self,
        name: str,
        rung: int,
        model: ImageClassifier,
        seen: Seen,
        swept: SweptFeatures | None,
        head: Head,
        details: Details,
        seconds: float,
        *,
        field: bool,
    ) -> Candidate:
        """Give the head its threshold; ``field``: it is for the field, whose labels have a say."""
        offsets = self.offsets(head, seen, field=field)
        at_threshold = moved(head, offsets)
        return Candidate(
            name, rung, with_head(self.material.recipe, model, at_threshold), seen, swept,
            at_threshold,
            msgspec.structs.replace(details, offsets=tuple(offsets.tolist())), seconds,
        )  # fmt: skip

    def offsets(self, head: Head, seen: Seen, *, field: bool) -> Float64:
        """Where decisions of ``head`` should fall, ``[K]``: chosen on source and field labels."""
        domains = ["source"]
        if self.material.dataset.field == "target" and field and self.choosing_labels() >= FEW:
            domains.append("target")
        views = [
            (head.logits(seen.views[f"{d}-validation"]), self.material.labels[rows])
            for d in domains
            if len(rows := self.material.rows(d, "validation"))
        ]
        if not views:
            return np.zeros(self.material.classes)
        allowed = self._keeps_source(head, seen) if field and self.material.has_source else None
        return choose_offsets(views, self.settings.threshold, allowed)

    def _keeps_source(self, head: Head, seen: Seen) -> Callable[[Float64], bool]:
        """Whether a threshold leaves the source what the gate demands, as far as one can.

        The same ranking may keep or break it: the source has as much say in the threshold as the
        field, and its owner would notice decisions that flip.
        """
        labels = self.material.labels[self.material.rows("source", "validation")]
        before = self.first.head.logits(self.first.seen.views["source-validation"])
        after = head.logits(seen.views["source-validation"])
        return lambda offsets: all(
            check.passed for check in retention(after + offsets, before, labels, self.settings.gate)
        )

    def gate_labels(self) -> int:
        """Labelled held-out field images."""
        return len(self.material.rows("target", "validation", labelled=True))

    def choosing_labels(self) -> int:
        """Held-out field labels that may choose a threshold; the gate may always judge by them."""
        return self.gate_labels() if self.material.field_labels_may_choose else 0

    def _logits(self, candidate: Candidate, domain: str) -> npt.NDArray[np.float32]:
        return candidate.head.logits(candidate.seen.views[f"{domain}-validation"])

    def _held(self, candidate: Candidate) -> Held:
        has_source = len(self.material.rows("source", "validation")) > 0
        return Held(
            self._logits(candidate, "target"),
            self._logits(candidate, "source") if has_source else None,
        )

    def with_sweep(self, candidate: Candidate) -> Candidate:
        """``candidate`` with the degraded twins' features, computed if it has none yet."""
        if candidate.swept is not None:
            return candidate
        swept = sweep(candidate.model, self.material, candidate.name)
        return candidate._replace(swept=swept)

    def _twins(self, candidate: Candidate) -> float:
        drawn = portrait(candidate.seen, candidate.swept, candidate.head).sweep
        if drawn is None:
            return float("nan")
        degraded = np.stack(list(drawn.degraded.values()))
        return twin_change(drawn.clean, degraded)[0]

    def _tell(self, tried: Tried) -> None:
        candidate, verdict = tried
        self.tried.append(tried)
        word = "source model" if verdict is None else "kept" if verdict.passed else "dropped"
        if verdict is not None and verdict.passed and not verdict.verified:
            word = "kept, UNVERIFIED"
        values = {domain: self.value(candidate, domain) for domain in ("target", "source")}
        self.told(
            Line(
                candidate.rung, candidate.name, values["target"], values["source"],
                self._flips(candidate), word, "" if verdict is None else verdict.reason,
            )
        )  # fmt: skip

    def skip(self, unfit: Unfit) -> None:
        """Note that a rung was not tried, and tell why."""
        self.skipped.append(unfit)
        self.told(Line(unfit.rung, unfit.name, None, None, None, "not tried", unfit.reason))

    def value(self, candidate: Candidate, domain: str) -> float | None:
        """The recipe's metric on a domain's validation images; None without labels."""
        rows = self.material.rows(domain, "validation")
        if not (self.material.labels[rows] >= 0).any():
            return None
        logits = self._logits(candidate, domain)
        value = metric_value(logits, self.material.labels[rows], self.settings.metric)
        return None if np.isnan(value) else value

    def _flips(self, candidate: Candidate) -> float | None:
        rows = self.material.rows("source", "validation")
        if not len(rows):
            return None
        before, after = (self._logits(c, "source").argmax(axis=1) for c in (self.first, candidate))
        return negative_flips(before, after, self.material.labels[rows])


def moved(head: Head, offsets: Float64) -> Head:
    """``head`` with offsets ``[K]`` added to its logits."""
    return Head(head.weight, (head.bias + offsets).astype(np.float32))
