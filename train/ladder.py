"""The ladder: which rungs are tried, in what order, and which candidate is kept.

Recalibration, feature extraction, fine-tuning at a low rate, adversarial adaptation: climbed only
as far as the data asks for. It composes; rungs make candidates (train/rungs), the gate decides
(train/gate), and every step leaves a sentence.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from runtime.recipe import Metric, Strategy
from train import distributed, store
from train.evaluate import Seen, SweptFeatures, look, pick, portrait, sweep
from train.gate import FEW, Held, Truth, Verdict, judge, metric_value, retention
from train.head import Head
from train.material import Material
from train.model import ImageClassifier
from train.report import Line
from train.rungs import (
    Details,
    Source,
    adversarial,
    coral,
    feature_extraction,
    fine_tuning,
    head_of,
    interpolate,
    with_head,
)
from train.similarity import negative_flips, twin_change
from train.threshold import choose_offsets, class_rates, match_rates, rates_off

Float64 = npt.NDArray[np.float64]

HEAD_LABELS = 20
"""Labelled field training images below which a head would be fitted to chance."""

TUNING_LABELS = 50
"""And below which the network would be."""


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


class Climb(NamedTuple):
    """All that happened."""

    tried: tuple[Tried, ...]
    skipped: tuple[Unfit, ...]
    kept: Candidate
    verified: bool
    reason: str
    ended: str


class Ladder:
    """One climb over one run's material, from a source model."""

    def __init__(
        self,
        material: Material,
        model: ImageClassifier,
        seconds: float,
        told: Callable[[Line], None],
    ) -> None:
        self.material, self.settings = material, material.recipe.train
        self.told = told
        self.tried: list[Tried] = []
        self.skipped: list[Unfit] = []
        features = material.features(model)
        head = head_of(model)
        self.source = Source(model, features, head)
        seen = pick(features, material)
        swept = sweep(model, material, "source model")
        self.first = self.kept = self._candidate(
            "as is", 0, model, seen, swept, head, Details(), seconds, field=False
        )
        self.fitted = head
        """The head that fine-tuning starts from: rung 1's, else the source's."""
        self._tell(Tried(self.first, None))

    # --- order

    def climb(self) -> Climb:
        """Try what the recipe's strategy asks for, in order, and stop when the field is served."""
        strategy = self.settings.strategy
        steps: tuple[tuple[str, Strategy, int, Callable[[], None]], ...] = (
            ("recalibration", "as-is", 0, self._recalibrate),
            ("feature extraction", "feature-extraction", 1, self._feature_extraction),
            ("CORAL", "coral", 1, self._coral),
            ("fine-tuning", "fine-tuning", 2, self._fine_tuning),
            ("adversarial", "adversarial", 3, self._adversarial),
        )
        ended = "every rung that the data allows was tried"
        if self.material.dataset.field == "source":
            return self._climb("nothing to adapt to: the recipe has no target")
        for name, word, rung, attempt in steps:
            if strategy not in ("auto", word):
                continue
            served = self._served() if strategy == "auto" else None
            if served:
                ended = served
                break
            unfit = self._unfit(word)
            if unfit:
                self._skip(Unfit(name, rung, unfit))
                continue
            attempt()
        if strategy != "auto":
            ended = f'the recipe asks for strategy = "{strategy}"'
        return self._climb(ended)

    def _served(self) -> str | None:
        """Why no further rung is needed: the field is answered about as well as the source."""
        gap, least = self.settings.gate.stop_gap, self.settings.gate.min_labels
        values = {}
        for domain in ("source", "target"):
            if len(self.material.rows(domain, "validation", labelled=True)) < least:
                return None
            values[domain] = self._value(self.kept, domain)
        source, field = values["source"], values["target"]
        if source is None or field is None or source - field > gap:
            return None
        return (
            f"{self.settings.metric} in the field, {field:.3f}, is within {gap:g} of the source's "
            f"{source:.3f}"
        )

    def _unfit(self, strategy: Strategy) -> str | None:
        """Why this rung cannot be tried on these images."""
        material = self.material
        labels = material.labels[material.rows("target", "train", labelled=True)]
        one_class = len(np.unique(labels)) < 2
        if strategy == "feature-extraction":
            return _too_few(len(labels), HEAD_LABELS, one_class)
        if strategy == "fine-tuning":
            return _too_few(len(labels), TUNING_LABELS, one_class)
        if strategy == "coral":
            if not material.has_source:
                return "needs source images"
            if self.settings.strategy == "auto" and not _too_few(
                len(labels), HEAD_LABELS, one_class
            ):
                return "for a field without labels; feature extraction uses those there are"
        if strategy == "adversarial":
            if not material.has_source:
                return "needs source images"
            images = len(material.rows("target", "train"))
            least = self.settings.adversarial.min_images
            if self.settings.strategy == "auto" and images < least:
                return f"needs {least} field training images, got {images}"
        return None

    # --- rungs

    def _recalibrate(self) -> None:
        """Rung 0: no weight changes, only where the decision falls."""
        start = time.monotonic()
        if self._choosing_labels() >= FEW:
            name = "threshold"
            offsets = self._offsets(self.source.head, self.first.seen, field=True)
        else:
            name = "prior matching"
            wanted, origin = self.material.expected_rates()
            rates = class_rates(
                self._field_logits(self.first.head).argmax(axis=1), self.material.classes
            )
            off = rates_off(
                rates, wanted, self.settings.gate.max_rate_ratio, self.material.dataset.classes
            )
            if off is None:
                self._skip(Unfit(name, 0, f"predicted class rates are as expected from {origin}"))
                return
            offsets = match_rates(self._field_logits(self.source.head), wanted)
        head = _moved(self.source.head, offsets)
        details = Details(offsets=tuple(offsets.tolist()))
        model = with_head(self.material.recipe, self.source.model, head)
        self._judge(
            Candidate(
                name, 0, model, self.first.seen, self.first.swept, head, details,
                time.monotonic() - start,
            ),
            metric=_seen_by_threshold(self.settings.metric), guard_source=name == "threshold",
        )  # fmt: skip

    def _feature_extraction(self) -> None:
        start = time.monotonic()
        head, details = feature_extraction(self.material, self.source)
        self.fitted = head
        self._judge_head("feature extraction", head, details, start)

    def _coral(self) -> None:
        start = time.monotonic()
        head, details = coral(self.material, self.source)
        self._judge_head("CORAL", head, details, start)

    def _judge_head(self, name: str, head: Head, details: Details, start: float) -> None:
        self._judge(
            self._candidate(
                name, 1, self.source.model, self.first.seen, self.first.swept, head, details,
                time.monotonic() - start, field=True,
            )
        )  # fmt: skip

    def _fine_tuning(self) -> None:
        """Rung 2, then back towards the source model for as long as too much of that is lost."""
        if self.settings.strategy != "auto" and self.fitted is self.source.head:
            self.fitted, _ = feature_extraction(self.material, self.source)
        start = time.monotonic()
        tuned, details = self._once(
            "fine-tuning", lambda: fine_tuning(self.material, self.source, self.fitted)
        )
        for share in self.settings.fine_tuning.interpolation:
            model = interpolate(self.material.recipe, self.source.model, tuned, share)
            name = "fine-tuning" if share == 1 else f"fine-tuning, {share:g} of the way"
            forgot = self._judge_model(
                name, 2, model, msgspec.structs.replace(details, interpolation=share), start
            )
            if self.kept.rung == 2 or not forgot:
                return

    def _adversarial(self) -> None:
        start = time.monotonic()
        begin = self.kept.model if self.kept.rung else self.source.model
        model, details = self._once(
            "adversarial", lambda: adversarial(self.material, self.source, begin)
        )
        self._judge_model(f"adversarial ({details.method})", 3, model, details, start)

    def _once(
        self, name: str, make: Callable[[], tuple[ImageClassifier, Details]]
    ) -> tuple[ImageClassifier, Details]:
        """What an interrupted run had finished is not trained again."""
        material = self.material
        path = material.folder / f"rung-{name}.safetensors"
        model = with_head(material.recipe, self.source.model, self.source.head)
        details = store.recall(path, material.key, model, Details)
        if details is not None:
            return model.eval(), details
        model, details = make()
        if distributed.main():
            store.remember(path, material.key, model, details)
            (material.folder / f"resume-{name}.safetensors").unlink(missing_ok=True)
        return model, details

    # --- judging

    def _judge_model(
        self, name: str, rung: int, model: ImageClassifier, details: Details, start: float
    ) -> bool:
        """Judge a trained network; returns whether it forgot too much of the source."""
        seen = look(model, self.material, name)
        verdict = self._judge(
            self._candidate(
                name, rung, model, seen, None, head_of(model), details,
                time.monotonic() - start, field=True,
            )
        )  # fmt: skip
        return any(check.name.startswith("source") for check in verdict.checks if not check.passed)

    def _judge(
        self, candidate: Candidate, *, metric: Metric | None = None, guard_source: bool = True
    ) -> Verdict:
        material = self.material
        expected, _ = material.expected_rates()
        has_source = len(material.rows("source", "validation")) > 0
        twins = None
        if self._gate_labels() < FEW and candidate.rung:
            candidate = self._swept(candidate)
            twins = self._twins(self.kept), self._twins(candidate)
        first = self._held(self.first)
        kept = first if self.kept is self.first else self._held(self.kept)
        verdict = judge(
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

    def _candidate(
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
        offsets = self._offsets(head, seen, field=field)
        moved = _moved(head, offsets)
        return Candidate(
            name, rung, with_head(self.material.recipe, model, moved), seen, swept, moved,
            msgspec.structs.replace(details, offsets=tuple(offsets.tolist())), seconds,
        )  # fmt: skip

    def _offsets(self, head: Head, seen: Seen, *, field: bool) -> Float64:
        domains = ["source"]
        if self.material.dataset.field == "target" and field and self._choosing_labels() >= FEW:
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

    def _gate_labels(self) -> int:
        return len(self.material.rows("target", "validation", labelled=True))

    def _choosing_labels(self) -> int:
        """Held-out field labels that may choose a threshold; the gate may always judge by them."""
        return self._gate_labels() if self.material.field_labels_may_choose else 0

    def _field_logits(self, head: Head) -> npt.NDArray[np.float32]:
        """Of unlabelled use: every field image that training may see."""
        return head.logits(self.source.features[self.material.rows("target", "train")])

    def _logits(self, candidate: Candidate, domain: str) -> npt.NDArray[np.float32]:
        return candidate.head.logits(candidate.seen.views[f"{domain}-validation"])

    def _held(self, candidate: Candidate) -> Held:
        has_source = len(self.material.rows("source", "validation")) > 0
        return Held(
            self._logits(candidate, "target"),
            self._logits(candidate, "source") if has_source else None,
        )

    def _swept(self, candidate: Candidate) -> Candidate:
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

    # --- the record

    def _tell(self, tried: Tried) -> None:
        candidate, verdict = tried
        self.tried.append(tried)
        word = "source model" if verdict is None else "kept" if verdict.passed else "dropped"
        if verdict is not None and verdict.passed and not verdict.verified:
            word = "kept, UNVERIFIED"
        values = {domain: self._value(candidate, domain) for domain in ("target", "source")}
        self.told(
            Line(
                candidate.rung, candidate.name, values["target"], values["source"],
                self._flips(candidate), word, "" if verdict is None else verdict.reason,
            )
        )  # fmt: skip

    def _skip(self, unfit: Unfit) -> None:
        self.skipped.append(unfit)
        self.told(Line(unfit.rung, unfit.name, None, None, None, "not tried", unfit.reason))

    def _value(self, candidate: Candidate, domain: str) -> float | None:
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

    def _climb(self, ended: str) -> Climb:
        """Sweep what the report shows: candidates of which the backbone was not yet swept."""
        for index, (candidate, verdict) in enumerate(self.tried):
            if candidate.swept is None and self._reported(candidate):
                swept = self._swept(candidate)
                self.tried[index] = Tried(swept, verdict)
                if candidate is self.kept:
                    self.kept = swept
        kept = next(t for t in self.tried if t.candidate is self.kept)
        if kept.verdict is not None:
            verified, reason = kept.verdict.verified, kept.verdict.reason
        else:
            verified, reason = self._as_is()
        return Climb(tuple(self.tried), tuple(self.skipped), self.kept, verified, reason, ended)

    def _reported(self, candidate: Candidate) -> bool:
        """Of the ways back to the source model only the last one tried is swept."""
        same = [t.candidate for t in self.tried if t.candidate.rung == candidate.rung]
        return candidate is self.kept or candidate is same[-1]

    def _as_is(self) -> tuple[bool, str]:
        if self.material.dataset.field == "source":
            labels = len(self.material.rows("source", "validation", labelled=True))
            return True, f"the source model, chosen on {labels} validation images"
        labels, least = self._gate_labels(), self.settings.gate.min_labels
        words = "nothing that was tried was proven better than the source model as it is"
        if len(self.tried) == 1:
            words = "adaptation was not needed" if self._served() else "no rung could be tried"
        if labels < least:
            return False, f"{words}; {labels} labelled held-out field images, {least} are needed"
        return True, words


def _too_few(labels: int, least: int, one_class: bool) -> str | None:
    if labels < least:
        return f"needs {least} labelled field training images, got {labels}"
    return "needs labelled field training images of two classes" if one_class else None


def _seen_by_threshold(metric: Metric) -> Metric:
    """Moving the threshold changes no ranking: AUC would not see it."""
    return "balanced-accuracy" if metric == "auc" else metric


def _moved(head: Head, offsets: Float64) -> Head:
    return Head(head.weight, (head.bias + offsets).astype(np.float32))
