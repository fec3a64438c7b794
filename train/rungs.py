"""The rungs of the ladder: each makes one candidate out of the source model and the field's images.

Why in this order: the head first, since it costs seconds and forgets little; then the network, at
a low rate from that head; the adversarial rung last, since it can break what it should mend. A
rung does not know whether its candidate is any good (train/gate) nor when it is tried
(train/ladder).
"""

from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from runtime import metrics
from runtime.recipe import Recipe, Schedule, TrainSettings
from train import console
from train.adversarial import DISCRIMINATOR, distrust, make_objective
from train.coral import recolour
from train.finetune import Group, History, fine_tune
from train.gate import metric_value
from train.head import Features, Head, choose_strength, fit_head, join_targets
from train.material import CACHE, Material, balanced_weights
from train.model import ImageClassifier, build_model
from train.objective import SOURCE, TARGET, Objective, TaskLoss
from train.watch import Watched

Float32 = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

KEPT_SHARE = 0.5
"""Of a replayed source image's target in rung 1, the share that is the source model's own answer:
labels alone would let decisions flip that were right (Yan et al. 2021)."""

CORAL_L2 = 0.1
"""Without field labels nothing can choose the pull towards the source head."""


class Source(NamedTuple):
    """The source model as rungs use it."""

    model: ImageClassifier
    features: Features
    """``[N, D]`` of every image of the run."""
    head: Head


class Details(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a candidate was made; what does not apply is left out."""

    l2: float | None = None
    l2_log_losses: dict[str, float] | None = None
    """Cross-validated, on field labels, by strength."""
    against_forgetting: str | None = None
    interpolation: float | None = None
    """Share of the way from the source model to the fine-tuned one."""
    method: str | None = None
    history: History | None = None
    offsets: tuple[float, ...] = ()
    """Added to the classes' logits: where the decision threshold went."""
    notes: tuple[str, ...] = ()


def head_of(model: ImageClassifier) -> Head:
    """The model's head as arrays."""
    weight, bias = (t.detach().cpu().numpy().copy() for t in (model.head.weight, model.head.bias))
    return Head(weight, bias)


def with_head(recipe: Recipe, model: ImageClassifier, head: Head) -> ImageClassifier:
    """A copy of ``model`` with another head, in eval mode on the CPU."""
    settings = msgspec.structs.replace(recipe.model, weights="random")
    copy = build_model(settings, recipe.input, len(head.bias))
    copy.backbone.load_state_dict(model.backbone.state_dict())
    with torch.no_grad():
        copy.head.weight.copy_(torch.from_numpy(head.weight))
        copy.head.bias.copy_(torch.from_numpy(head.bias))
    return copy


def share_settings(train: TrainSettings) -> tuple[object, ...]:
    """The settings of ``[train]`` that every training of the network depends on."""
    return train.freeze, train.augment, train.degrade, train.head.epochs


def feature_extraction(material: Material, source: Source) -> tuple[Head, Details]:
    """Rung 1: the source head refitted on field labels, pulled to where it was; source replayed.

    Features are those of the frozen backbone. The strength of the pull is chosen by
    cross-validation on the field's training labels.
    """
    settings, labels = material.recipe.train.head, material.labels
    replay = material.rows("source", "train", labelled=True)
    field = material.rows("target", "train", labelled=True)
    weights = balanced_weights((len(replay), len(field)))
    targets = _kept_targets(source, replay, labels[replay], material.classes)
    fits = len(settings.l2) * settings.folds
    with console.progress() as bar:
        task = bar.add_task("feature extraction: strength", total=fits, note="")
        l2, losses = choose_strength(
            source.features,
            (replay, targets, weights[: len(replay)]),
            (field, labels[field], weights[len(replay) :]),
            strengths=settings.l2, folds=settings.folds, start=source.head,
            seed=material.recipe.seed, track=lambda done: bar.update(task, completed=done),
        )  # fmt: skip
        head = fit_head(
            source.features,
            join_targets(targets, labels[field], material.classes),
            weights, classes=material.classes, l2=l2, epochs=settings.epochs, start=source.head,
            rows=np.concatenate([replay, field]),
        )  # fmt: skip
    return head, Details(l2=l2, l2_log_losses={f"{k:g}": v for k, v in losses.items()})


def coral(material: Material, source: Source) -> tuple[Head, Details]:
    """Rung 1 without field labels: the source head refitted on source features, recoloured.

    The source features as they are stay among what is fitted, so that they are not forgotten.
    """
    rows = material.rows("source", "train", labelled=True)
    as_they_are = np.asarray(source.features[rows], dtype=np.float32)
    recoloured = recolour(as_they_are, source.features[material.rows("target", "train")])
    labels = material.labels[rows]
    targets = _kept_targets(source, rows, labels, material.classes)
    head = fit_head(
        np.concatenate([as_they_are, recoloured]),
        join_targets(targets, labels, material.classes),
        np.ones(2 * len(rows), np.float32), classes=material.classes, l2=CORAL_L2,
        epochs=material.recipe.train.head.epochs, start=source.head,
    )  # fmt: skip
    return head, Details(l2=CORAL_L2, method="CORAL")


def _kept_targets(source: Source, rows: Ints, labels: Ints, classes: int) -> Float32:
    """Between the labels and the source model's answers."""
    if not len(rows):
        return np.zeros((0, classes), dtype=np.float32)
    answers = metrics.softmax(source.head.logits(source.features[rows]))
    hard = np.eye(classes)[labels]
    return np.asarray((1 - KEPT_SHARE) * hard + KEPT_SHARE * answers, dtype=np.float32)


def fine_tuning(material: Material, source: Source, start: Head) -> tuple[ImageClassifier, Details]:
    """Rung 2: the network at a low rate, from the source's backbone and the head ``start``."""
    settings = material.recipe.train.fine_tuning
    way: str = settings.against_forgetting
    notes: tuple[str, ...] = ()
    if way == "replay" and not material.has_source:
        way, notes = "lwf", ("no source images to replay: the source model's answers are kept",)
    model = with_head(material.recipe, source.model, start)
    keep = settings.keep_answers if way in ("replay", "lwf") else 0.0
    objective = TaskLoss(model, keep_answers=keep, l2_sp=settings.l2_sp if way == "l2-sp" else 0.0)
    groups = _supervised_groups(material, source, settings.batch, way)
    history = _tune(
        material, "fine-tuning", objective, groups, settings,
        min_steps=settings.min_steps, tune=settings.tune, decisive=True,
    )  # fmt: skip
    return model.eval(), Details(against_forgetting=way, history=history, notes=notes)


def adversarial(material: Material, source: Source, start: Head) -> tuple[ImageClassifier, Details]:
    """Rung 3: domain-adversarial training of both domains, labelled field images included.

    From the source's backbone and the head ``start``.
    """
    settings = material.recipe.train.adversarial
    model = with_head(material.recipe, source.model, start)
    objective = make_objective(
        model, settings, keep_answers=material.recipe.train.fine_tuning.keep_answers,
        seed=material.recipe.seed,
    )  # fmt: skip
    half = settings.batch // 2
    labelled = material.rows("target", "train", labelled=True)
    unlabelled = material.rows("target", "train", labelled=False)
    known = 0 if not len(labelled) else half if not len(unlabelled) else half // 2
    groups = [
        _group(material, source, "source", SOURCE, _source_rows(material), settings.batch - half),
        _group(material, source, "field", TARGET, labelled, known, teacher=False),
        _group(material, source, "unlabelled", TARGET, unlabelled, half - known, teacher=False),
    ]
    history = _tune(
        material, "adversarial", objective, [g for g in groups if g.share], settings,
        min_steps=1, tune=(), decisive=known > 0,
        extra_rate=settings.discriminator_learning_rate,
    )  # fmt: skip
    seen = history.epochs[-1].parts.get(DISCRIMINATOR) if history.epochs else None
    doubt = None if seen is None else distrust(seen)
    return model.eval(), Details(
        method=settings.method, history=history, notes=(doubt,) if doubt else ()
    )


def _source_rows(material: Material) -> Ints:
    return material.rows("source", "train", labelled=True)


def _supervised_groups(material: Material, source: Source, batch: int, way: str) -> list[Group]:
    field = material.rows("target", "train", labelled=True)
    half = batch // 2
    if way == "replay":
        return [
            _group(material, source, "source", SOURCE, _source_rows(material), batch - half),
            _group(material, source, "field", TARGET, field, half, teacher=False),
        ]
    others = material.rows("target", "train", labelled=False)
    if way == "lwf" and len(others):
        return [
            _group(material, source, "field", TARGET, field, half),
            _group(material, source, "unlabelled", TARGET, others, batch - half),
        ]
    return [_group(material, source, "field", TARGET, field, batch)]


def _group(
    material: Material,
    source: Source,
    name: str,
    domain: int,
    rows: Ints,
    share: int,
    *,
    teacher: bool = True,
) -> Group:
    """Images of one kind; ``teacher``: the source model's answers for them are to be kept."""
    logits = source.head.logits(source.features[rows]) if teacher and len(rows) else None
    return Group(
        name=name, domain=domain, rows=rows, labels=material.labels[rows],
        weights=np.ones(len(rows), np.float32), teacher=logits, share=share,
    )  # fmt: skip


def _tune(
    material: Material,
    name: str,
    objective: Objective,
    groups: list[Group],
    schedule: Schedule,
    *,
    min_steps: int,
    tune: tuple[str, ...],
    decisive: bool,
    extra_rate: float | None = None,
) -> History:
    recipe = material.recipe
    with Watched(name, recipe.train.metric, material.log(name)) as watch:
        return fine_tune(
            objective, groups, pixels=material.pixels, schedule=schedule, train=recipe.train,
            min_steps=min_steps, tune=tune, seed=recipe.seed, key=f"{name} {material.key}",
            state_path=material.folder / f"resume-{name}.safetensors", device=material.device,
            images_sha256=material.images_sha256, cache=CACHE,
            validate=_validation(material) if decisive else None, watch=watch,
            extra_rate=extra_rate,
        )  # fmt: skip


def _validation(material: Material) -> Callable[[ImageClassifier], float]:
    """The mean over the domains of the recipe's metric on validation images.

    Both domains, since an epoch that gains in the field what it loses at home is no better.
    """
    metric = material.recipe.train.metric
    parts = [
        rows
        for domain in ("source", "target")
        if len(rows := material.rows(domain, "validation", labelled=True))
    ]

    def validate(model: ImageClassifier) -> float:
        features = material.held_out_features(model, np.concatenate(parts))
        logits = np.split(head_of(model).logits(features), np.cumsum([len(p) for p in parts])[:-1])
        values = [
            metric_value(part, material.labels[rows], metric)
            for part, rows in zip(logits, parts, strict=True)
        ]
        return float(np.nanmean(values))

    return validate


def interpolate(
    recipe: Recipe, source: ImageClassifier, tuned: ImageClassifier, share: float
) -> ImageClassifier:
    """WiSE-FT: weights ``share`` of the way from ``source`` to ``tuned``.

    Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022. BatchNorm statistics are
    the same in both, so that weights are all there is to interpolate.
    """
    result = with_head(recipe, tuned, head_of(tuned))
    old, new = source.state_dict(), tuned.state_dict()
    result.load_state_dict(
        {
            name: torch.lerp(old[name], new[name], share)
            if old[name].is_floating_point()
            else new[name]
            for name in new
        }
    )
    return result.eval()
