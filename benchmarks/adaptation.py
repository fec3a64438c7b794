"""The adaptation ladder on the embedded data: label budgets, both shifts, three seeds.

It trains with the shipped recipes' settings through the same call as ``python -m train`` and reads
its records; what was trained before is not trained again. Test images are scored, never chosen by.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from benchmarks.harness import Bar, Options, Report, Table
from runtime.errors import DataError
from runtime.recipe import Recipe, TrainSettings, load_recipe

if TYPE_CHECKING:
    from train.evaluate import Scores
    from train.record import Rung, Training

LONG = True
"""Runs only when it is named."""

RECIPES = Path(__file__).parent.parent / "train" / "recipes"
SEEDS = (0, 1, 2)
SIZE = (96, 96)
"""Of both shifts, as in the study that the bars come from; ``solar`` itself ships with 160."""
BUDGETS: tuple[int | None, ...] = (200, 50, None, 0)
WHOLE = 200, 50, 0
"""Budgets at which the adversarial rung is tried as well; elsewhere it is left out to save time."""
SWEPT = 8
"""Images of the robustness sweep, which these tables do not show."""


def measure(options: Options) -> Report:
    """Train every setting with every seed, or read what was trained before.

    Raises DataError if the embedded images are not installed.
    """
    seeds = SEEDS[:1] if options.quick else SEEDS
    chains = [chain for seed in seeds for chain in _chains(seed, quick=options.quick)]
    cores = sorted(os.sched_getaffinity(0))
    with ProcessPoolExecutor(
        len(cores), get_context("spawn"), initializer=_pin, initargs=(cores, os.getpid())
    ) as pool:
        done = list(pool.map(_train, chains))
    trainings = {name: training for chain in done for name, training in chain}
    return _report(trainings, seeds, quick=options.quick)


def _chains(seed: int, *, quick: bool) -> list[list[Recipe]]:
    """What can be trained beside each other; within a chain one source model serves all."""
    solar = load_recipe(RECIPES / "solar.toml")
    field = load_recipe(RECIPES / "solar-field.toml")
    every = load_recipe(RECIPES / "solar-all.toml")
    budgets = BUDGETS[:1] if quick else BUDGETS
    poly = [_changed(solar, f"bench-poly-{_word(labels)}", seed, labels) for labels in budgets]
    if quick:
        return [poly]
    return [
        poly,
        [_changed(field, "bench-field-200", seed, 200)],
        [_named(every, f"bench-all-{seed}", seed, _quick_report(every.train))],
    ]


def _changed(recipe: Recipe, name: str, seed: int, labels: int | None) -> Recipe:
    train = msgspec.structs.replace(
        _quick_report(recipe.train), freeze=("conv_stem", "bn1", "blocks.0", "blocks.1")
    )
    if labels not in WHOLE:
        never = msgspec.structs.replace(train.adversarial, min_images=10**9)
        train = msgspec.structs.replace(train, adversarial=never)
    return msgspec.structs.replace(
        _named(recipe, f"{name}-{seed}", seed, train),
        data=msgspec.structs.replace(recipe.data, labels=labels),
        input=msgspec.structs.replace(recipe.input, size=SIZE),
    )  # fmt: skip


def _named(recipe: Recipe, name: str, seed: int, train: TrainSettings) -> Recipe:
    return msgspec.structs.replace(recipe, name=name, seed=seed, train=train)


def _quick_report(train: TrainSettings) -> TrainSettings:
    similarity = msgspec.structs.replace(train.similarity, images=SWEPT)
    return msgspec.structs.replace(train, similarity=similarity)


def _word(labels: int | None) -> str:
    return "all" if labels is None else str(labels)


def _pin(cores: Sequence[int], parent: int) -> None:
    """One process a core: two that share theirs would wait for each other."""
    os.sched_setaffinity(0, {cores[(os.getpid() - parent) % len(cores)]})


def _train(chain: list[Recipe]) -> "list[tuple[str, Training]]":
    from train.pipeline import train

    return [(recipe.name, train(recipe)[0]) for recipe in chain]


# --- figures


def _report(trainings: "dict[str, Training]", seeds: Sequence[int], *, quick: bool) -> Report:
    settings = {"mono to poly": [f"bench-poly-{_word(labels)}" for labels in BUDGETS]}
    settings["clean to field"] = ["bench-field-200"]
    rows: list[tuple[str, ...]] = []
    for shift, names in settings.items():
        for name in names:
            found = [trainings[f"{name}-{s}"] for s in seeds if f"{name}-{s}" in trainings]
            if found:
                rows += _rows(f"{shift}, {name.rpartition('-')[2]} labels", found)
    ladder = Table(
        title="The ladder on held-out test images, mean (and standard deviation) of the seeds",
        columns=(
            "shift, rung", "field AUC", "gain", "field balanced accuracy", "source AUC change",
            "agreement", "negative flips", "kept", "seconds",
        ),
        rows=tuple(rows),
        notes=(
            f"{len(seeds)} seeds, each with splits, source model and labelled images of its own; "
            f"EfficientNet-Lite0, {SIZE[0]} px, one CPU thread. Labels are those that training "
            "learns from; the labelled validation images decide and judge besides. Kept: by how "
            "many of the climbs. A rung is in the table whether the gate kept it or not; where "
            "it was tried several times, the last one is. Ladder is what shipped. With all labels "
            "the adversarial rung was not tried.",
        ),
    )  # fmt: skip
    bars = [] if quick else _bars(trainings, seeds)
    figures: dict[str, object] = {
        name: [_figures(rung) for rung in training.rungs]
        for name, training in sorted(trainings.items())
    }
    return Report(title="Adaptation", tables=(ladder,), figures=figures, bars=tuple(bars))


def _figures(rung: "Rung") -> dict[str, object]:
    """What the tables are made of, unrounded, and why the rung was kept or dropped."""
    similarity = rung.similarity
    return {
        "name": rung.name, "kept": rung.kept, "reason": rung.reason, "seconds": rung.seconds,
        "scores": msgspec.to_builtins(rung.scores),
        "agreement": similarity.agreement if similarity else None,
        "negative flips": similarity.negative_flips if similarity else None,
    }  # fmt: skip


def _rows(label: str, trainings: "Sequence[Training]") -> list[tuple[str, ...]]:
    names: dict[str, None] = {}
    for training in trainings:
        names |= dict.fromkeys(_kind(rung) for rung in training.rungs)
    rows = []
    for kind in names:
        pairs = [
            (training, rungs[-1])
            for training in trainings
            if (rungs := [r for r in training.rungs if _kind(r) == kind])
        ]
        kept = sum(any(r.kept and _kind(r) == kind for r in t.rungs) for t, _ in pairs)
        rows.append(_row(f"{label}: {kind}", pairs, f"{kept} of {len(trainings)}"))
    shipped = [(t, next(r for r in t.rungs if r.kept)) for t in trainings]
    return [*rows, _row(f"**{label}: ladder**", shipped, "")]


def _kind(rung: "Rung") -> str:
    return rung.name.partition(",")[0]


def _row(name: str, pairs: "Sequence[tuple[Training, Rung]]", kept: str) -> tuple[str, ...]:
    return (
        name,
        _spread([_field(rung).auc for _, rung in pairs]),
        _spread([_gain(training, rung) for training, rung in pairs], signed=True),
        _spread([_field(rung).balanced_accuracy for _, rung in pairs]),
        _spread([_source_change(training, rung) for training, rung in pairs], signed=True),
        _spread([rung.similarity.agreement if rung.similarity else None for _, rung in pairs]),
        _spread([rung.similarity.negative_flips if rung.similarity else None for _, rung in pairs]),
        kept,
        f"{np.mean([rung.seconds for _, rung in pairs]):.0f}",
    )


def _field(rung: "Rung") -> "Scores":
    return rung.scores["target-test"]


def _gain(training: "Training", rung: "Rung") -> float:
    return _known(_field(rung).auc) - _known(_field(training.rungs[0]).auc)


def _source_change(training: "Training", rung: "Rung") -> float:
    before, after = (r.scores["source-test"].auc for r in (training.rungs[0], rung))
    return _known(after) - _known(before)


def _known(value: float | None) -> float:
    if value is None:
        raise DataError("a score is missing in training.json; remove build/bench-* and run again")
    return value


def _spread(values: Sequence[float | None], *, signed: bool = False) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    sign = "+" if signed else ""
    deviation = f" ({np.std(known, ddof=1):.3f})" if len(known) > 1 else ""
    return f"{np.mean(known):{sign}.3f}{deviation}"


def _bars(trainings: "dict[str, Training]", seeds: Sequence[int]) -> list[Bar]:
    def each(name: str, read: "Callable[[Training, Rung], float]") -> tuple[float, ...]:
        found = [trainings[f"{name}-{seed}"] for seed in seeds]
        return tuple(read(t, next(r for r in t.rungs if r.kept)) for t in found)

    def auc(_: "Training", rung: "Rung") -> float:
        return _known(_field(rung).auc)

    def loss(training: "Training", rung: "Rung") -> float:
        return -_source_change(training, rung)

    def balanced(_: "Training", rung: "Rung") -> float:
        return _known(_field(rung).balanced_accuracy)

    def accuracy(_: "Training", rung: "Rung") -> float:
        return _known(rung.scores["source-test"].accuracy)

    def agreement(_: "Training", rung: "Rung") -> float:
        return _known(rung.similarity.agreement if rung.similarity else None)

    def flips(_: "Training", rung: "Rung") -> float:
        return _known(rung.similarity.negative_flips if rung.similarity else None)

    bars = [
        _bar("ELPV, all cells, 75/25: accuracy", 0.884, 0.905, each("bench-all", accuracy)),
        _bar("clean to field, 200 labels: AUC gain", 0.08, 0.11, each("bench-field-200", _gain)),
        _bar("clean to field, 200 labels: source AUC loss", 0.01, 0.0,
             each("bench-field-200", loss), at_most=True),
    ]  # fmt: skip
    for labels, bar, goal in ((50, 0.75, 0.81), (200, 0.82, 0.85), (None, 0.83, 0.87)):
        name, word = f"bench-poly-{_word(labels)}", _word(labels)
        bars.append(_bar(f"mono to poly, {word} labels: AUC", bar, goal, each(name, auc)))
        bars.append(
            _bar(f"mono to poly, {word} labels: source AUC loss", 0.01, 0.01, each(name, loss),
                 at_most=True)
        )  # fmt: skip
    bars.append(
        _bar("mono to poly, no labels: balanced accuracy", 0.60, 0.64,
             each("bench-poly-0", balanced))
    )  # fmt: skip
    for name in ("bench-poly-50", "bench-poly-200", "bench-poly-all", "bench-field-200"):
        short = name.removeprefix("bench-")
        bars.append(_bar(f"{short}: agreement", 0.95, 0.97, each(name, agreement)))
        bars.append(_bar(f"{short}: negative flips", 0.03, 0.02, each(name, flips), at_most=True))
    return bars


def _bar(
    what: str, bar: float, goal: float, values: tuple[float, ...], *, at_most: bool = False
) -> Bar:
    """The mean of what the ladder shipped with each seed, held to ``bar``."""
    mean = float(np.mean(values))
    return Bar(
        what=what,
        bar=f"{'at most' if at_most else 'at least'} {bar:g}, goal {goal:g}",
        value=f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})",
        holds=mean <= bar + 1e-9 if at_most else mean >= bar - 1e-9,
    )
