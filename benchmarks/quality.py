"""What the trained and exported models are worth on held-out images they never saw.

It trains nothing: it reads what ``make train export`` recorded, and puts the field's published
figure beside it.
"""

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.harness import Options, Report, Table
from runtime.errors import DataError

RECIPES = ("solar-all", "solar")
BUILD = Path("build")
MAKE = "make train export RECIPE=train/recipes/{}.toml"

PUBLISHED = ("VGG-19, Deitsch et al. 2019 (as published)", "656", "88.4 %")
"""Deitsch et al., Automatic classification of defective photovoltaic module cells in
electroluminescence images, Solar Energy 185 (2019), arXiv:1807.02894: fine-tuned VGG-19 on a
random 75/25 split of the 2,624 cells. Not the same images as ours: a mark, not a match."""


def measure(options: Options) -> Report:
    """Read the records of every recipe that was trained and exported.

    Raises DataError if there is none, or one is damaged or half renewed.
    """
    found = [name for name in RECIPES if (BUILD / name / "release.json").exists()]
    if not found:
        raise DataError(f"{BUILD}: nothing exported there; run {MAKE.format(RECIPES[0])} first")
    models: list[tuple[str, ...]] = []
    forms: list[tuple[str, ...]] = []
    notes: list[str] = []
    figures: dict[str, object] = {}
    for name in found:
        training, release = _read(name)
        models += _models(name, training, release["field"])
        forms += [_form(name, form) for form in release["forms"]]
        notes.append(_origin(name, training, release))
        figures[name] = {"training": training["rungs"], "release": release}
    if RECIPES[0] in found:
        models.append((*PUBLISHED, "", "", "", ""))
    table = Table(
        title="Checkpoints on held-out test images of the field",
        columns=(
            "model", "images", "accuracy", "95 % interval", "balanced accuracy", "AUC",
            "worst recall",
        ),
        rows=tuple(models),
        notes=(
            "The interval is Wilson's: what another draw of as many images could give.",
            *notes,
        ),
    )  # fmt: skip
    release_table = Table(
        title="Released forms against their checkpoint, on the same images",
        columns=("form", "agrees", "SQNR dB", "accuracy", "worst recall", "MB", "verdict"),
        rows=tuple(forms),
    )
    return Report(title="Quality", tables=(table, release_table), figures=figures)


def _read(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    command = MAKE.format(name)
    folder = BUILD / name
    try:
        training = json.loads((folder / "train" / "training.json").read_text(encoding="utf-8"))
        release = json.loads((folder / "release.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot be read ({error}); run {command} again") from error
    if training["checkpoint_sha256"] != release["checkpoint_sha256"]:
        raise DataError(f"{folder}: trained anew since its export; run {command} again")
    return training, release


def _models(name: str, training: dict[str, Any], field: str) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for rung in training["rungs"]:
        scores = rung["scores"][f"{field}-test"]
        accuracy, labelled = scores["accuracy"], scores["labelled"]
        rows.append(
            (
                f"{name}: {rung['name']}" + (" (kept)" if rung["kept"] else ""),
                str(scores["images"]),
                _percent(accuracy),
                "" if accuracy is None else " to ".join(map(_percent, wilson(accuracy, labelled))),
                _percent(scores["balanced_accuracy"]),
                "" if scores["auc"] is None else f"{scores['auc']:.3f}",
                _percent(scores["worst_recall"]),
            )
        )
    return rows


def _form(name: str, form: dict[str, Any]) -> tuple[str, ...]:
    size = f"{form['bytes'] / 1e6:.1f}"
    verdict = "released" if form["released"] else f"refused: {form['reason']}"
    if not form["attempts"]:
        return f"{name}: {form['form']}", "", "", "", "", size, verdict
    last = form["attempts"][-1]
    if last["kept_float"]:
        verdict += f", {len(last['kept_float'])} layers float"
    quality = last["quality"]
    return (
        f"{name}: {form['form']}",
        _percent(quality["agreement"]),
        f"{quality['sqnr_db']:.1f}",
        _percent(quality["accuracy"]),
        _percent(quality["worst_recall"]),
        size,
        verdict,
    )


def _origin(name: str, training: dict[str, Any], release: dict[str, Any]) -> str:
    versions = {**training["versions"], **release["versions"]}
    images = ", ".join(f"{count} {split}" for split, count in sorted(training["images"].items()))
    return (
        f"{name}: `{MAKE.format(name)}` at {release['git']}, seed {release['seed']}; "
        f"images {images}; {training['device']}; "
        + ", ".join(f"{k} {v}" for k, v in sorted(versions.items()))
    )


def wilson(share: float, count: int, *, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a ``share`` seen in ``count`` draws. (Wilson 1927.)"""
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (centre - half) / scale, (centre + half) / scale


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
