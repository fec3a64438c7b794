"""The order of training's steps: images, features, head, fine-tuning, and which rung is kept.

Every rung is scored on validation images and the best is kept; log-loss decides a tie. Test
images are scored for the record only: no choice ever sees them.
"""

import hashlib
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from runtime import atomic, metrics
from runtime.dataset import Dataset, Domain, Split, write_dataset
from runtime.errors import DataError
from runtime.recipe import Recipe
from runtime.version import __version__
from train import console
from train.checkpoint import CheckpointFacts, write_checkpoint
from train.data import prepare
from train.device import Device, choose_device
from train.domains import Track
from train.evaluate import score
from train.features import cached_features, predict
from train.finetune import Epoch, fine_tune
from train.head import fit_head, log_loss
from train.model import ImageClassifier, build_model
from train.pixels import load_pixels
from train.record import Rung, Training, finished, rank, training_key, why_dropped, why_kept
from train.watch import Watched

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
CACHE = Path("build") / "cache"


def train(recipe: Recipe) -> tuple[Training, bool]:
    """Adapt the model of ``recipe`` and write ``build/NAME/train/``.

    Returns the record, and whether anything had to be done. Raises RecipeError or DataError for
    what the user can mend; KeyboardInterrupt leaves a state that the next call goes on from.
    """
    start = time.monotonic()
    folder = recipe.build / "train"
    dataset = prepare(recipe, cache=CACHE, track=_track("reading images"))
    write_dataset(folder / "images.json", dataset)
    _describe(dataset)
    key = training_key(recipe, dataset)
    if (done := finished(folder, key)) is not None:
        return done, False
    job = _Job(recipe, dataset, choose_device(), folder, key)
    rungs = job.climb()
    best = max(range(len(rungs)), key=lambda index: (*rank(rungs[index][0]), -index))
    chosen, model = rungs[best]
    reason = why_kept(chosen, [rung for rung, _ in rungs], recipe.train.metric, job.decided_on)
    temperature = job.temperature(model)
    facts = CheckpointFacts(
        name=recipe.name,
        classes=dataset.classes,
        model=recipe.model,
        input=recipe.input,
        recipe_sha256=recipe.sha256,
        dataset_sha256=dataset.sha256,
        rung=chosen.name,
        temperature=temperature,
    )
    digest = write_checkpoint(folder / "checkpoint.safetensors", model, facts)
    training = Training(
        name=recipe.name,
        key=key,
        rungs=tuple(
            msgspec.structs.replace(
                rung,
                kept=rung is chosen,
                reason=reason if rung is chosen else why_dropped(rung, chosen, recipe.train.metric),
            )
            for rung, _ in rungs
        ),
        rung=chosen.name,
        reason=reason,
        decided_on=job.decided_on,
        temperature=temperature,
        checkpoint_sha256=digest,
        recipe_sha256=recipe.sha256,
        dataset_sha256=dataset.sha256,
        images=_counts(dataset),
        device=job.device.reason,
        seconds=time.monotonic() - start,
        versions={
            "fieldfit": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
    )
    data = msgspec.json.format(msgspec.json.encode(training), indent=1)
    atomic.write_bytes(folder / "training.json", data)
    (folder / "resume.safetensors").unlink(missing_ok=True)
    return training, True


class _Job:
    """One run: the arrays that every rung shares."""

    def __init__(
        self, recipe: Recipe, dataset: Dataset, device: Device, folder: Path, key: str
    ) -> None:
        self.recipe, self.dataset, self.device = recipe, dataset, device
        self.folder, self.key = folder, key
        console.say(f"training on {device.reason}")
        torch.manual_seed(recipe.seed)  # weights = "random"
        self.model = build_model(recipe.model, recipe.input, len(dataset.classes))
        self.examples = dataset.examples
        self.labels = np.array([dataset.label_index(e) for e in self.examples], dtype=np.int64)
        self.pixels = load_pixels(
            self.examples, recipe.input, CACHE, lambda i, n: console.track(i, "decoding images", n)
        )
        self.deciding = self._deciding()
        example = self.examples[self.deciding[0]]
        self.decided_on = f"{example.domain} {example.split}"

    def climb(self) -> list[tuple[Rung, ImageClassifier]]:
        """Every rung up to the recipe's strategy, with the model it made."""
        features = self._features()
        rungs = []
        if self.dataset.field == "target":
            rungs.append(self._head_rung("as is", features, ("source",)))
        rungs.append(self._head_rung("feature extraction", features, ("source", "target")))
        if self.recipe.train.strategy == "fine-tuning":
            rungs.append(self._fine_tuning(rungs[-1][1]))
        return rungs

    def temperature(self, model: ImageClassifier) -> float:
        """Fitted on the images that decide."""
        rows = self.deciding
        logits = predict(model, self.pixels, self.device, rows=rows)
        return metrics.fit_temperature(logits, self.labels[rows])

    def _rows(self, domains: Sequence[str], split: Split, *, labelled: bool = False) -> Ints:
        return np.array(
            [
                index
                for index, e in enumerate(self.examples)
                if e.domain in domains and e.split == split and (e.label or not labelled)
            ],
            dtype=np.int64,
        )

    def _deciding(self) -> Ints:
        """Labelled validation images of the field; of the source where the field has too few."""
        for domain in (self.dataset.field, "source"):
            rows = self._rows([domain], "validation", labelled=True)
            if len(set(self.labels[rows].tolist())) > 1:
                return rows
        raise DataError(
            "the validation split has labelled images of fewer than two classes; add images or "
            "raise validation in [data.splits]"
        )

    def _features(self) -> Floats:
        digest = hashlib.sha256(msgspec.json.encode(self.recipe.input))
        for example in self.examples:
            digest.update(example.sha256.encode())
        features = cached_features(
            self.model, self.pixels, digest.hexdigest(), CACHE, self.device,
            lambda i, n: console.track(i, "features of the frozen backbone", n),
        )  # fmt: skip
        self.model.to("cpu")
        return features

    def _weights(self, rows: Ints) -> Floats:
        """Sample weights of mean 1 that give each domain the same total weight."""
        domains = np.array([self.examples[row].domain for row in rows])
        weights = np.ones(len(rows), dtype=np.float32)
        names = np.unique(domains)
        for name in names:
            weights[domains == name] = len(rows) / (len(names) * np.sum(domains == name))
        return weights

    def _head_rung(
        self, name: str, features: Floats, domains: Sequence[Domain]
    ) -> tuple[Rung, ImageClassifier]:
        start = time.monotonic()
        settings = self.recipe.train
        rows = self._rows(domains, "train", labelled=True)
        # "As is" must not profit from field labels, not even by its penalty.
        deciding = self._rows(domains, "validation", labelled=True)
        deciding = self.deciding if "target" in domains and len(self.deciding) else deciding
        best: tuple[float, float, Floats, Floats] | None = None
        with console.progress() as bar:
            for l2 in settings.head_l2:
                task = bar.add_task(f"{name}: head, l2 {l2:g}", total=settings.head_epochs, note="")
                weight, bias = fit_head(
                    features[rows], self.labels[rows], self._weights(rows),
                    classes=len(self.dataset.classes), l2=l2, epochs=settings.head_epochs,
                    report=lambda epoch, loss, task=task: bar.update(  # type: ignore[misc]
                        task, completed=epoch, note=f"loss {loss:.4f}"
                    ),
                )  # fmt: skip
                loss = log_loss(features[deciding] @ weight.T + bias, self.labels[deciding])
                if best is None or loss < best[0]:
                    best = loss, l2, weight, bias
        assert best is not None
        _, l2, weight, bias = best
        model = build_model(
            msgspec.structs.replace(self.recipe.model, weights="random"),
            self.recipe.input,
            len(self.dataset.classes),
        )
        model.backbone.load_state_dict(self.model.backbone.state_dict())
        with torch.no_grad():
            model.head.weight.copy_(torch.from_numpy(weight))
            model.head.bias.copy_(torch.from_numpy(bias))
        rung = self._rung(name, features @ weight.T + bias, start, l2=l2)
        return rung, model

    def _fine_tuning(self, model: ImageClassifier) -> tuple[Rung, ImageClassifier]:
        start = time.monotonic()
        settings = self.recipe.train
        rows = self._rows(("source", "target"), "train", labelled=True)
        tuned = build_model(
            msgspec.structs.replace(self.recipe.model, weights="random"),
            self.recipe.input,
            len(self.dataset.classes),
        )
        tuned.load_state_dict(model.state_dict())

        def validate(model: ImageClassifier) -> float:
            logits = predict(model, self.pixels, self.device, rows=self.deciding)
            return score(logits, self.labels[self.deciding]).metric(settings.metric)

        with Watched(
            "fine-tuning", settings.metric, self.folder / "tensorboard" / self.key[:8]
        ) as watch:
            history = fine_tune(
                tuned, self.pixels, rows, self.labels[rows], self._weights(rows),
                settings=settings, seed=self.recipe.seed, key=self.key,
                state_path=self.folder / "resume.safetensors", device=self.device,
                validate=validate, watch=watch,
            )  # fmt: skip
        logits = predict(
            tuned, self.pixels, self.device, lambda i, n: console.track(i, "scoring", n)
        )
        tuned.to("cpu")
        return self._rung("fine-tuning", logits, start, history=tuple(history)), tuned

    def _rung(
        self,
        name: str,
        logits: Floats,
        start: float,
        *,
        l2: float | None = None,
        history: tuple[Epoch, ...] = (),
    ) -> Rung:
        scores = {}
        for domain in sorted({e.domain for e in self.examples}):
            for split in ("validation", "test"):
                rows = self._rows([domain], split)
                scores[f"{domain}-{split}"] = score(logits[rows], self.labels[rows])
        value = score(logits[self.deciding], self.labels[self.deciding])
        rung = Rung(
            name=name,
            scores=scores,
            value=value.metric(self.recipe.train.metric),
            log_loss=log_loss(logits[self.deciding], self.labels[self.deciding]),
            seconds=time.monotonic() - start,
            l2=l2,
            history=history,
        )
        console.say(
            f"{name}: {self.recipe.train.metric} {rung.value:.4f} on {self.decided_on} images, "
            f"{rung.seconds:.0f} s"
        )
        return rung


def _track(label: str) -> Track:
    return lambda items: console.track(items, label)


def _counts(dataset: Dataset) -> dict[str, int]:
    counts: dict[str, int] = {}
    for example in dataset.examples:
        name = f"{example.domain}-{example.split}"
        counts[name] = counts.get(name, 0) + 1
    return counts


def _describe(dataset: Dataset) -> None:
    splits: tuple[Split, ...] = ("train", "validation", "test")
    rows = []
    for domain in ("source", "target"):
        for name in (*dataset.classes, None):
            counts = [
                sum(e.label == name for e in dataset.select(domain, split)) for split in splits
            ]
            if sum(counts):
                rows.append([f"{domain}: {(name or 'no label')[:50]}", *map(str, counts)])
    console.table("images", ["domain and class", *splits], rows)
    for aside in dataset.set_aside[:10]:
        console.say(f"set aside: {aside.path}: {aside.reason}")
    if len(dataset.set_aside) > 10:
        console.say(f"... and {len(dataset.set_aside) - 10} more, all listed in images.json")
    if dataset.duplicates:
        first = ", ".join(dataset.duplicates[0])
        console.say(f"{len(dataset.duplicates)} images occur more than once, e.g. {first}")
