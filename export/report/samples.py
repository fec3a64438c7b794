"""The section ``samples``: clean against field images of each class, and how many there are.

It does not know how images were split (train/splits) nor how field photos are simulated.
"""

from collections import Counter
from collections.abc import Sequence
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
PICTURED = 20
"""Classes that are shown; a page of forty is not looked at."""
FEW = 12
"""Classes up to which tables are unfolded."""
NAMED = 10
"""Files that were set aside or are duplicates, by name."""

DOMAINS: tuple[Domain, ...] = ("source", "target")
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
NO_LABEL = "no label"


class Counts(NamedTuple):
    """Images of one class, or of all."""

    name: str
    numbers: tuple[int, ...]
    """Of each domain that there is: train, validation, test, and their sum."""


class Picture(NamedTuple):
    """One image in a row of samples."""

    image: Markup
    twin: Markup | None
    """What a simulated field photo was made of."""
    caption: str


class Pictured(NamedTuple):
    """A class and its samples, by domain or as pairs."""

    name: str
    groups: tuple[tuple[str, tuple[Picture, ...]], ...]


def make(facts: Facts) -> Section:
    """The section; every recipe has images."""
    dataset = facts.dataset
    domains = [d for d in DOMAINS if any(e.domain == d for e in dataset.examples)]
    names = [*dataset.classes, *([None] if any(e.label is None for e in dataset.examples) else [])]
    # By group, as train/simulate documents it: a group of the user's own names no single image.
    pairs = find_twins(dataset.examples) if facts.recipe.data.target == SIMULATED else {}
    body = render(
        "samples.html",
        classes=[_pictured(name, dataset, pairs, facts.recipe.input) for name in names[:PICTURED]],
        left=len(names[PICTURED:]),
        domains=[_domain_name(domain, facts) for domain in domains],
        splits=SPLITS,
        counts=count_images(dataset),
        few=len(names) <= FEW,
        set_aside=dataset.set_aside,
        reasons=Counter(a.reason for a in dataset.set_aside).most_common(),
        duplicates=dataset.duplicates,
        named=NAMED,
        file_name=lambda path: Path(path).name,
    )
    return Section("samples", "Clean and field images", _lead(facts), body)


def count_images(dataset: Dataset) -> tuple[Counts, ...]:
    """Images of all classes, of each class, and of those without label, if there are any."""
    domains = [d for d in DOMAINS if any(e.domain == d for e in dataset.examples)]
    found = Counter((e.label, e.domain, e.split) for e in dataset.examples)
    names = [*dataset.classes, *([None] if any(e.label is None for e in dataset.examples) else [])]

    def row(title: str, labels: Sequence[str | None]) -> Counts:
        numbers: list[int] = []
        for domain in domains:
            by_split = [sum(found[name, domain, split] for name in labels) for split in SPLITS]
            numbers += [*by_split, sum(by_split)]
        return Counts(title, tuple(numbers))

    return row("all", names), *(row(name or NO_LABEL, [name]) for name in names)


def choose_samples(examples: Sequence[Example], each: int = EACH) -> tuple[Example, ...]:
    """Up to ``each`` of ``examples``, or one of each stratum if those are more, in their order.

    Strata take turns; of one, test images come first, which no choice has seen.
    """
    taken: Counter[str] = Counter()
    turns = []
    for example in sorted(examples, key=lambda e: -SPLITS.index(e.split)):
        stratum = example.stratum or ""
        turns.append((taken[stratum], stratum, len(turns), example))
        taken[stratum] += 1
    chosen = sorted(turns, key=lambda turn: turn[:3])[: max(each, len(taken))]
    return tuple(turn[3] for turn in sorted(chosen, key=lambda turn: (turn[1], turn[2])))


def find_twins(examples: Sequence[Example]) -> dict[str, Example]:
    """By digest of a simulated field photo the clean image that it was made of, where it can be
    told: the photo's group is then that image's digest."""
    clean = {e.sha256: e for e in examples if e.domain == "source"}
    return {
        e.sha256: clean[e.group] for e in examples if e.domain == "target" and e.group in clean
    }


def _pictured(
    name: str | None, dataset: Dataset, twins: dict[str, Example], spec: InputSpec
) -> Pictured:
    members = [e for e in dataset.examples if e.label == name]

    def picture(example: Example) -> Picture:
        twin = twins.get(example.sha256)
        return Picture(
            image=_shown(example, spec),
            twin=None if twin is None else _shown(twin, spec),
            caption=example.stratum or "",
        )

    if paired := [e for e in members if e.sha256 in twins]:
        pictures = tuple(picture(e) for e in choose_samples(paired))
        return Pictured(name or NO_LABEL, (("clean image and its simulated field photo", pictures),))
    groups = []
    for domain in DOMAINS:
        if chosen := choose_samples([e for e in members if e.domain == domain]):
            word = "field" if domain == dataset.field else "clean"
            groups.append((word, tuple(picture(e) for e in chosen)))
    return Pictured(name or NO_LABEL, tuple(groups))


def _shown(example: Example, spec: InputSpec) -> Markup:
    kind = "clean image" if example.domain == "source" else "field image"
    alt = f"{kind}, {example.label or NO_LABEL}: {Path(example.path).name}"
    return thumbnail(example.path, example.sha256, spec, alt)


def _domain_name(domain: Domain, facts: Facts) -> str:
    if domain == "target":
        return "simulated field" if facts.recipe.data.target == SIMULATED else "field"
    return "clean and field" if facts.dataset.field == "source" else "clean"


def _lead(facts: Facts) -> str:
    found = Counter(e.domain for e in facts.dataset.examples)
    clean, field = f"{found['source']:,} clean images", f"{found['target']:,} field images"
    if not found["target"]:
        told = f"{clean}; there is no other domain, so nothing had to be adapted."
    elif not found["source"]:
        told = f"{field}; the model was brought along, its own images were not."
    elif facts.recipe.data.target == SIMULATED:
        told = f"{clean} and {found['target']:,} simulated field photos made of the same images."
    else:
        told = f"{clean} and {field}."
    height, width, channels = facts.recipe.input.shape
    colour = "gray" if channels == 1 else "colour"
    return f"{told} Shown as the model sees them: {width} × {height} pixels, {colour}."
