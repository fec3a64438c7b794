"""``python -m export gate BUNDLE``: judge a bundle's forms again, from it and the images alone.

It knows neither checkpoint nor torch. The reference is the bundle's own fp32 form, whose parity
with the checkpoint was proven at export; budgets, seed and digests come from the ``release.json``
that the bundle carries.
"""

import argparse
import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from export.gate import judge
from export.parity import measure
from export.release import Release, judged_sha256, read_release
from export.table import share
from runtime.bundle import Bundle
from runtime.dataset import read_dataset
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.errors import DataError
from runtime.manifest import Quality
from runtime.preprocess import InputSpec, preprocess_batch
from train import console
from train.domains import check_images, list_domain

BATCH = 16

COLUMNS = ("form", "accuracy", "worst recall", "agrees", "SQNR dB", "verdict")

Same = Literal["the recorded images", "other images"]


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """One form, judged now."""

    form: str
    passed: bool
    reason: str
    now: Quality
    """Against the bundle's fp32 form."""
    recorded: Quality
    """Against the checkpoint, when it was exported."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json`` prints."""

    bundle: str
    images: Same
    passed: bool
    forms: tuple[Judged, ...]


class Image(NamedTuple):
    """An image to judge on; ``label`` is None where it is unknown."""

    path: str
    sha256: str
    label: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("bundle", type=Path, help="a bundle's folder or zip")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="IMAGES",
        help="judge on these images instead: images.json of a training, a folder of class folders "
        "or a CSV file; default: those of the release, listed in train/images.json beside the "
        "bundle",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Judge, show, and return the exit code: 1 if a form of the bundle fails now."""
    report = regate(options.bundle, options.data)
    show(report)
    if options.json:
        print(json.dumps(msgspec.to_builtins(report)))
    return 0 if report.passed else 1


def regate(path: Path, data: Path | None = None) -> Report:
    """Judge every form of the bundle at ``path`` against its fp32 form.

    ``data`` are images to judge on; None stands for those that the release was judged on.

    Raises BundleError if the bundle carries no release, DataError if an image is missing or is
    not what its list says, or if the default images are not those of the release.
    """
    bundle = Bundle.open(path)
    release = read_release(bundle)
    listed = path.absolute().parent / "train" / "images.json"
    if data is None and not listed.is_file():
        raise DataError(
            f"{listed}: expected the list of images that {path} was judged on, got nothing; name "
            "it, or other images, with --data"
        )
    images = _images(data or listed)
    same = judged_sha256((i.sha256, i.label) for i in images) == release.judged_sha256
    if not same and data is None:
        raise DataError(
            f"{path}: expected the {release.reference.samples} images that it was judged on, got "
            f"{len(images)} others from {listed}: the data changed since export; export again, or "
            "name images to judge on with --data"
        )
    labels = _label_indices(images, bundle.manifest.labels)
    logits = _answers(bundle, images)
    reference = measure(logits["fp32"], logits["fp32"], labels, seed=release.seed)
    forms = tuple(
        _judged(artifact.form, logits, labels, reference, artifact.quality, release)
        for artifact in bundle.manifest.artifacts
    )
    return Report(
        bundle=str(path),
        images="the recorded images" if same else "other images",
        passed=all(form.passed for form in forms),
        forms=forms,
    )


def show(report: Report) -> None:
    """Print figures now beside those recorded, and every verdict."""
    first = report.forms[0].now
    console.table(
        f"{report.bundle} on {first.samples} images ({report.images}): now (recorded at export)",
        COLUMNS,
        [_row(form) for form in report.forms],
    )
    if report.images == "other images":
        console.say("these are not the images of the release: recorded figures are of others")
    for form in report.forms:
        console.say(f"{form.form} {'passes' if form.passed else 'fails'}: {form.reason}")


def _judged(
    form: str,
    logits: dict[str, npt.NDArray[np.float32]],
    labels: npt.NDArray[np.int64],
    reference: Quality,
    recorded: Quality,
    release: Release,
) -> Judged:
    now = measure(logits["fp32"], logits[form], labels, seed=release.seed)
    verdict = judge(now, reference, release.gate)
    if form == "fp32":
        reason = f"the reference; {release.parity_db:.0f} dB to the checkpoint at export"
        verdict = verdict._replace(reason=reason)
    if not np.isfinite(logits[form]).all():
        verdict = verdict._replace(passed=False, reason="logits are not finite (overflow)")
    return Judged(
        form=form, passed=verdict.passed, reason=verdict.reason, now=now, recorded=recorded
    )


def _images(place: Path) -> list[Image]:
    """The images at ``place`` that no training may have seen."""
    if place.suffix == ".json":
        dataset = read_dataset(place)
        held_out = dataset.select(dataset.field, "test")
        images = [Image(e.path, e.sha256, e.label) for e in held_out]
    else:
        listing = check_images(list_domain(str(place), "target"))
        images = [
            Image(c.path, c.sha256, c.label)
            for c in listing.candidates
            if c.split in (None, "test")
        ]
    if len(images) < 2:
        raise DataError(f"{place}: expected 2 or more test images to judge on, got {len(images)}")
    return images


def _label_indices(images: Sequence[Image], labels: tuple[str, ...]) -> npt.NDArray[np.int64]:
    unknown = {image.label for image in images if image.label} - set(labels)
    if unknown:
        raise DataError(
            f"the images have labels that the bundle does not know: {', '.join(sorted(unknown))}; "
            f"it knows {', '.join(labels)}"
        )
    return np.array([labels.index(i.label) if i.label else -1 for i in images], dtype=np.int64)


def _answers(bundle: Bundle, images: Sequence[Image]) -> dict[str, npt.NDArray[np.float32]]:
    """Logits ``[N, K]`` of every form, the images read once and a few at a time."""
    forms = [artifact.form for artifact in bundle.manifest.artifacts]
    rows: dict[str, list[npt.NDArray[np.float32]]] = {form: [] for form in forms}
    with contextlib.ExitStack() as stack:
        engines = [
            stack.enter_context(OnnxRuntimeEngine(bundle.model(form), form=form)) for form in forms
        ]
        for start in console.track(range(0, len(images), BATCH), "images"):
            batch = _read(images[start : start + BATCH], bundle.manifest.input)
            for engine in engines:
                rows[engine.form].append(engine.infer(batch).logits)
    return {form: np.concatenate(parts) for form, parts in rows.items()}


def _read(images: Sequence[Image], spec: InputSpec) -> npt.NDArray[np.uint8]:
    """``[N, H, W, C]``. What is decoded is what was hashed."""
    contents = []
    for image in images:
        try:
            data = Path(image.path).read_bytes()
        except OSError as error:
            raise DataError(
                f"{image.path}: cannot be read: {error.strerror}; put it back, or name images "
                "with --data"
            ) from error
        if hashlib.sha256(data).hexdigest() != image.sha256:
            raise DataError(
                f"{image.path}: changed since the list of images was made; put the old one back, "
                "or name images with --data"
            )
        contents.append(data)
    return preprocess_batch(contents, spec)


def _row(form: Judged) -> list[str]:
    now, then = form.now, form.recorded
    pairs = [
        (share(now.accuracy), share(then.accuracy)),
        (share(now.worst_recall), share(then.worst_recall)),
        (share(now.agreement), share(then.agreement)),
        (_decibels(now.sqnr_db), _decibels(then.sqnr_db)),
    ]
    cells = [f"{one} ({other})" for one, other in pairs]
    return [form.form, *cells, "passes" if form.passed else "fails"]


def _decibels(value: float) -> str:
    return "equal" if value >= 200 else f"{value:.1f}"
