"""The source model: good on clean images, trained here or brought along.

Trained, it is a head fitted on the pretrained features and then the network at a low rate from
there (Kumar et al., ICLR 2022: a fresh head would distort the features before it is of any use).
It does not know the field.
"""

import hashlib
import time
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from runtime.recipe import Recipe
from runtime.version import __version__
from train import console, distributed, store
from train.bring import Brought
from train.finetune import Group, History, fine_tune
from train.gate import metric_value
from train.head import Features, Head, fit_head, log_loss
from train.material import CACHE, Material
from train.model import ImageClassifier, build_model
from train.objective import SOURCE, TaskLoss
from train.rungs import head_of, share_settings, with_head
from train.watch import Watched

Ints = npt.NDArray[np.int64]

START_HANDICAP = 0.02
"""What the head on pretrained features must be ahead by on validation images, about a standard
error of an AUC of .95 on 150 images: its penalty was chosen on the same images, and beside them it
is the weaker model. It is there against a training that collapses."""


class SourceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How the source model came to be."""

    origin: str
    """``trained``, or what is known of the checkpoint that was brought."""
    seconds: float
    head_l2: float | None = None
    history: History | None = None


def source_model(
    material: Material, brought: Brought | None
) -> tuple[ImageClassifier, SourceRecord]:
    """The source model, in eval mode on the CPU: ``brought``, or trained once for each content.

    Raises RecipeError or DataError for what the user can mend.
    """
    recipe = material.recipe
    if brought is not None:
        console.say(brought.note)
        return brought.model, SourceRecord(origin=brought.note, seconds=0.0)
    model = build_model(
        msgspec.structs.replace(recipe.model, weights="random"), recipe.input, material.classes
    )
    key = source_key(material)
    path = CACHE / f"source-{key[:32]}.safetensors"
    known = store.recall(path, key, model, SourceRecord)
    if known is not None:
        console.say(f"source model: trained before ({known.seconds:.0f} s), used again")
        return model.eval(), known
    model, record = _train(material)
    if distributed.main():
        store.remember(path, key, model, record)
        (material.folder / "resume-source.safetensors").unlink(missing_ok=True)
    return model, record


def source_key(material: Material) -> str:
    """Digest of all that decides the source model; the field's images are not among it."""
    recipe = material.recipe
    images = [
        f"{e.split} {e.label} {e.sha256}"
        for e in material.dataset.examples
        if e.domain == "source" and e.split != "test"
    ]
    settings = share_settings(recipe.train), recipe.train.metric
    parts = (
        recipe.seed, recipe.input, recipe.model, _weights_digest(recipe), recipe.source, settings,
        material.dataset.classes, sorted(images), material.device.kind, __version__, START_HANDICAP,
    )  # fmt: skip
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def _weights_digest(recipe: Recipe) -> str:
    path = Path(recipe.model.weights)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _train(material: Material) -> tuple[ImageClassifier, SourceRecord]:
    start = time.monotonic()
    recipe, settings = material.recipe, material.recipe.source
    pretrained = build_model(recipe.model, recipe.input, material.classes)
    rows = material.rows("source", "train", labelled=True)
    validation = material.rows("source", "validation", labelled=True)
    features = material.features(pretrained)
    l2, head = _starting_head(material, features, rows, validation)
    model = with_head(recipe, pretrained, head)

    def validate(model: ImageClassifier) -> float:
        logits = head_of(model).logits(material.held_out_features(model, validation))
        return metric_value(logits, material.labels[validation], recipe.train.metric)

    watched = Watched("source model", recipe.train.metric, material.log("source"))
    with watched as watch:
        history = fine_tune(
            TaskLoss(model),
            [
                Group(
                    name="source", domain=SOURCE, rows=rows, labels=material.labels[rows],
                    weights=np.ones(len(rows), np.float32), teacher=None, share=settings.batch,
                )
            ],
            pixels=material.pixels, schedule=settings, train=recipe.train, min_steps=1, tune=(),
            seed=recipe.seed, key=f"source {source_key(material)}",
            state_path=material.folder / "resume-source.safetensors", device=material.device,
            images_sha256=material.images_sha256, cache=CACHE, validate=validate, watch=watch,
            start_handicap=START_HANDICAP,
        )  # fmt: skip
    record = SourceRecord(
        origin="trained", seconds=time.monotonic() - start, head_l2=l2, history=history
    )
    return model.eval(), record


def _starting_head(
    material: Material, features: Features, rows: Ints, validation: Ints
) -> tuple[float, Head]:
    """Of the penalties to try, the head with the least log-loss on source validation images."""
    labels = material.labels
    tried = []
    for l2 in console.track(material.recipe.source.head_l2, "head on pretrained features"):
        head = fit_head(
            features, labels[rows], np.ones(len(rows), np.float32), classes=material.classes,
            l2=l2, epochs=material.recipe.train.head.epochs, rows=rows,
        )  # fmt: skip
        loss = log_loss(head.logits(features[validation]), labels[validation])
        tried.append((loss, l2, head))
    _, l2, head = min(tried, key=lambda one: one[:2])
    return l2, head
