"""The section ``samples``: clean against field images of each class, and how many there are.

It does not know how images were split (train/splits) nor how field photos are simulated.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from export.report.facts import Facts
from export.report.page import Section, render
from export.report.thumbnails import thumbnail
from runtime.dataset import Dataset, Domain, Example, Split
from runtime.preprocess import InputSpec
from runtime.recipe import SIMULATED

EACH = 4
"""Images of a class and domain that are shown; more if it has more strata."""
FEW = 12
"""Classes that are pictured, and up to which tables are unfolded: who looks at forty?"""
NAMED = 10
"""Files that were set aside or are duplicates, by name."""

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
NO_LABEL = "no label"


class Counts(NamedTuple):
    """Images of one class, or of all."""

    name: str
    numbers: tuple[int, ...]
    """Of each domain that there is: train, validation, test, and their sum."""


class Picture(NamedTuple):
    """One sample."""

    images: tuple[Markup, ...]
    """One, or a clean image and the field photo that was simulated from it."""
    caption: str


class Pictured(NamedTuple):
    """A class and its samples by what they are called."""

    name: str
    groups: Mapping[str, tuple[Picture, ...]]


def make(facts: Facts) -> Section:
    """The section; every recipe has images."""
    dataset, kinds = facts.dataset, _kinds(facts)
    simulated = facts.recipe.data.target == SIMULATED
    twins = find_twins(dataset.examples) if simulated else {}
    labels = _labels(dataset)
    body = render(
        "samples.html",
        classes=[
            _pictured(label, dataset, kinds, twins, facts.recipe.input)
            for label in [*dataset.classes[:FEW], *labels[len(dataset.classes) :]]
        ],
        unpictured=len(dataset.classes[FEW:]),
        kinds=list(kinds.values()),
        splits=SPLITS,
        counts=count_images(dataset),
        few=len(dataset.classes) <= FEW,
        set_aside=[(Path(s.path).name, s.reason) for s in dataset.set_aside],
        duplicates=[[Path(path).name for path in paths] for paths in dataset.duplicates],
        named=NAMED,
    )
    return Section("samples", "Clean and field images", _lead(facts), body)


def count_images(dataset: Dataset) -> tuple[Counts, ...]:
    """Images of all classes, of each class, and of those without label, if there are any."""
    domains = sorted({e.domain for e in dataset.examples})
    found = Counter((e.label, e.domain, e.split) for e in dataset.examples)
    labels = _labels(dataset)

    def row(name: str, members: Sequence[str | None]) -> Counts:
        numbers: list[int] = []
        for domain in domains:
            by_split = [sum(found[label, domain, split] for label in members) for split in SPLITS]
            numbers += [*by_split, sum(by_split)]
        return Counts(name, tuple(numbers))

    return row("all", labels), *(row(label or NO_LABEL, [label]) for label in labels)


def choose_samples(examples: Sequence[Example], each: int = EACH) -> tuple[Example, ...]:
    """Up to ``each`` of ``examples``, or one of each stratum if those are more, in their order.

    Strata take turns; of one, test images come first, which no choice has seen.
    """
    taken: Counter[str] = Counter()
    turns: list[tuple[int, str, int, Example]] = []
    for example in sorted(examples, key=lambda e: -SPLITS.index(e.split)):
        stratum = example.stratum or ""
        turns.append((taken[stratum], stratum, len(turns), example))
        taken[stratum] += 1
    chosen = sorted(turns, key=lambda turn: turn[:3])[: max(each, len(taken))]
    return tuple(turn[3] for turn in sorted(chosen, key=lambda turn: turn[1:3]))


def find_twins(examples: Sequence[Example]) -> dict[str, Example]:
    """By digest of a simulated field photo the clean image that it was made of, where it can be
    told: the photo's group is then that image's digest."""
    clean = {e.sha256: e for e in examples if e.domain == "source"}
    return {e.sha256: clean[e.group] for e in examples if e.domain == "target" and e.group in clean}


def _labels(dataset: Dataset) -> list[str | None]:
    """The classes, and None if there are images without label."""
    unlabelled = any(e.label is None for e in dataset.examples)
    return [*dataset.classes, *([None] if unlabelled else [])]


def _kinds(facts: Facts) -> dict[Domain, str]:
    """What images of the domains that there are are called."""
    target = "simulated field" if facts.recipe.data.target == SIMULATED else "field"
    source = "field" if facts.dataset.field == "source" else "clean"
    names: dict[Domain, str] = {"source": source, "target": target}
    return {d: names[d] for d in sorted({e.domain for e in facts.dataset.examples})}


def _pictured(
    label: str | None,
    dataset: Dataset,
    kinds: dict[Domain, str],
    twins: dict[str, Example],
    spec: InputSpec,
) -> Pictured:
    def shown(example: Example) -> Markup:
        alt = f"{kinds[example.domain]} image, {label or NO_LABEL}: {Path(example.path).name}"
        return thumbnail(example.path, example.sha256, spec, alt)

    def pictures(examples: Sequence[Example]) -> tuple[Picture, ...]:
        return tuple(
            Picture(
                images=tuple(shown(e) for e in (twins.get(example.sha256), example) if e),
                caption=example.stratum or "",
            )
            for example in choose_samples(examples)
        )

    members = [e for e in dataset.examples if e.label == label]
    if paired := [e for e in members if e.sha256 in twins]:
        groups = {"clean, and the same as a simulated field photo": paired}
    else:
        groups = {kind: [e for e in members if e.domain == d] for d, kind in kinds.items()}
    return Pictured(label or NO_LABEL, {name: pictures(of) for name, of in groups.items() if of})


def _lead(facts: Facts) -> str:
    found = Counter(e.domain for e in facts.dataset.examples)
    if not found["target"]:
        told = f"{found['source']:,} images of one domain: there was nothing to adapt to."
    elif not found["source"]:
        told = f"{found['target']:,} field images; the model came without the images it knows."
    elif facts.recipe.data.target == SIMULATED:
        told = f"{found['source']:,} clean images and {found['target']:,} simulated field photos."
    else:
        told = f"{found['source']:,} clean and {found['target']:,} field images."
    height, width, channels = facts.recipe.input.shape
    colour = "gray" if channels == 1 else "colour"
    return f"{told} They are shown as the model sees them: {width} × {height} pixels, {colour}."
