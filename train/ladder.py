"""The ladder: which rungs are tried, in what order, and which candidate is kept.

Recalibration, feature extraction, fine-tuning at a low rate, adversarial adaptation: climbed only
as far as the data asks for. It composes; rungs make candidates (train/rungs), a trial judges them
(train/trial), and every step leaves a sentence.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from runtime.recipe import Metric, Strategy
from train import distributed, store
from train.evaluate import pick, sweep
from train.gate import FEW
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
from train.threshold import class_rates, match_rates, rates_off
from train.trial import Candidate, Trials, Tried, Unfit, moved

HEAD_LABELS = 20
"""Labelled field training images below which a head would be fitted to chance."""

TUNING_LABELS = 50
"""And below which the network would be."""


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
        head = head_of(model)
        self.source = Source(model, material.features(model), head)
        seen = pick(self.source.features, material)
        swept = sweep(model, material, "source model")
        self.trials = Trials(material, model, seen, swept, seconds, told)
        self.fitted = head
        """Rung 1's head once there is one, before that the source's."""

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
                self.trials.skip(Unfit(name, rung, unfit))
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
            values[domain] = self.trials.value(self.trials.kept, domain)
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
        if self.trials.choosing_labels() >= FEW:
            name = "threshold"
            offsets = self.trials.offsets(self.source.head, self.trials.first.seen, field=True)
        else:
            name = "prior matching"
            wanted, origin = self.material.expected_rates()
            rates = class_rates(
                self._field_logits(self.trials.first.head).argmax(axis=1), self.material.classes
            )
            off = rates_off(
                rates, wanted, self.settings.gate.max_rate_ratio, self.material.dataset.classes
            )
            if off is None:
                self.trials.skip(
                    Unfit(name, 0, f"predicted class rates are as expected from {origin}")
                )
                return
            offsets = match_rates(self._field_logits(self.source.head), wanted)
        head = moved(self.source.head, offsets)
        details = Details(offsets=tuple(offsets.tolist()))
        model = with_head(self.material.recipe, self.source.model, head)
        self.trials.judge(
            Candidate(
                name, 0, model, self.trials.first.seen, self.trials.first.swept, head, details,
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
        first = self.trials.first
        self.trials.judge(
            self.trials.candidate(
                name, 1, self.source.model, first.seen, first.swept, head, details,
                time.monotonic() - start, field=True,
            )
        )  # fmt: skip

    def _fine_tuning(self) -> None:
        start = time.monotonic()
        tuned, details = self._once(
            "fine-tuning", lambda: fine_tuning(self.material, self.source, self._fitted_head())
        )
        self._judge_network("fine-tuning", 2, tuned, details, start)

    def _adversarial(self) -> None:
        start = time.monotonic()
        tuned, details = self._once(
            "adversarial", lambda: adversarial(self.material, self.source, self._fitted_head())
        )
        self._judge_network(f"adversarial ({details.method})", 3, tuned, details, start)

    def _fitted_head(self) -> Head:
        """Rung 1's, or without field labels the source's; a rung asked for by name makes it first.

        Rungs 2 and 3 both set out from it and the source's backbone: a network that has learned
        the few field labels by heart has nothing left to gain from another loss.
        """
        by_name = self.settings.strategy != "auto" and self.fitted is self.source.head
        if by_name and not self._unfit("feature-extraction"):
            self.fitted, _ = feature_extraction(self.material, self.source)
        return self.fitted

    def _judge_network(
        self, name: str, rung: int, tuned: ImageClassifier, details: Details, start: float
    ) -> None:
        """A trained network, then back towards the source model while too much of that is lost."""
        for share in self.settings.fine_tuning.interpolation:
            model = interpolate(self.material.recipe, self.source.model, tuned, share)
            part = name if share == 1 else f"{name}, {share:g} of the way"
            forgot = self.trials.judge_network(
                part, rung, model, msgspec.structs.replace(details, interpolation=share), start
            )
            if self.trials.kept.rung == rung or not forgot:
                return

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

    def _field_logits(self, head: Head) -> npt.NDArray[np.float32]:
        """Of unlabelled use: every field image that training may see."""
        return head.logits(self.source.features[self.material.rows("target", "train")])

    # --- what became of it

    def _climb(self, ended: str) -> Climb:
        """Sweep what the report shows: candidates of which the backbone was not yet swept."""
        trials = self.trials
        for index, (candidate, verdict) in enumerate(trials.tried):
            if candidate.swept is None and self._reported(candidate):
                swept = trials.with_sweep(candidate)
                trials.tried[index] = Tried(swept, verdict)
                if candidate is trials.kept:
                    trials.kept = swept
        verdict = next(t.verdict for t in trials.tried if t.candidate is trials.kept)
        verified, reason = (verdict.verified, verdict.reason) if verdict else self._as_is()
        return Climb(
            tuple(trials.tried), tuple(trials.skipped), trials.kept, verified, reason, ended
        )

    def _reported(self, candidate: Candidate) -> bool:
        """Of the ways back to the source model only the last one tried is swept."""
        same = [t.candidate for t in self.trials.tried if t.candidate.rung == candidate.rung]
        return candidate is self.trials.kept or candidate is same[-1]

    def _as_is(self) -> tuple[bool, str]:
        if self.material.dataset.field == "source":
            labels = len(self.material.rows("source", "validation", labelled=True))
            return True, f"the source model, chosen on {labels} validation images"
        labels, least = self.trials.gate_labels(), self.settings.gate.min_labels
        words = "nothing that was tried was proven better than the source model as it is"
        if len(self.trials.tried) == 1:
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
