"""One checked data set out of a recipe: both domains, their classes, splits and duplicates.

It does not know what an image looks like: train/domains opens them, train/splits decides.
"""

import difflib
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

from runtime.dataset import Dataset, Domain, Example
from runtime.errors import DataError
from runtime.recipe import SIMULATED, Recipe
from train.domains import Candidate, Listing, Track, check_images, list_domain
from train.evidence import list_evidence, place_evidence
from train.simulate import simulate
from train.splits import SPLITS, assign_splits, choose_labelled, limit_images


def prepare(
    recipe: Recipe,
    *,
    cache: Path,
    known: tuple[str, ...] = (),
    track: Track | None = None,
    draw: Track | None = None,
) -> Dataset:
    """Read, check and split the images of ``recipe``.

    Examples come in the order of domain and digest. Of byte-identical images in one domain one
    is kept; all are in ``duplicates``. ``cache`` is a folder that remembers which images are
    good, and keeps simulated field photos and unpacked evidence. ``known`` are the classes of a
    brought checkpoint; data may name fewer. Field labels beyond the budget ``[data] labels`` are
    taken away from training images, so that nothing can see them. What ``[data] evidence`` brings
    counts towards no budget and no limit, and moves no other image into another split. ``track``
    wraps the images to open in a progress bar, ``draw`` those to simulate.

    Raises DataError if a domain is missing or empty, an image of the source has no label, there
    are not two classes or the domains name different ones, identical images have different
    labels, more than 1 % of a domain cannot be read, or a split stays empty.
    """
    data = recipe.data
    listing = Listing(candidates=())
    if data.source is not None:
        listing = list_domain(data.source, "source")
    if data.target not in (None, SIMULATED):
        target = list_domain(data.target, "target")
        listing = Listing(
            candidates=listing.candidates + target.candidates,
            set_aside=listing.set_aside + target.set_aside,
        )
    evidence = Listing(candidates=list_evidence(data.evidence, cache / "evidence"))
    # Before the slow part: a typo shows at once.
    classes = _classes(listing.candidates + evidence.candidates, known)
    listing = check_images(listing, cache=cache, track=track)
    evidence = check_images(evidence, cache=cache, track=track)
    duplicates = _duplicates(listing.candidates + evidence.candidates)
    chosen = limit_images(listing.candidates, data.limit, recipe.seed)
    examples = _examples(chosen, recipe)
    if data.target == SIMULATED:
        examples = simulate(
            examples,
            seed=recipe.seed,
            folder=cache / SIMULATED,
            window=recipe.input.window,
            track=draw,
        )
    examples = _within_budget(examples, data.labels, recipe.seed)
    known_images = {c.sha256 for c in listing.candidates} | {e.sha256 for e in examples}
    examples += place_evidence(evidence.candidates, known_images, recipe)
    examples.sort(key=lambda e: (e.domain, e.sha256, e.split))
    _refuse_empty_splits(examples, classes, complete=not known)
    return Dataset(
        classes=classes,
        examples=tuple(examples),
        set_aside=listing.set_aside + evidence.set_aside,
        duplicates=duplicates,
        field="source" if data.target is None and not data.evidence else "target",
    )


def _within_budget(examples: Sequence[Example], labels: int | None, seed: int) -> list[Example]:
    """Field training images beyond the budget lose their label; held-out images keep theirs."""
    if labels is None:
        return list(examples)
    training = [e for e in examples if e.domain == "target" and e.split == "train" and e.label]
    kept = choose_labelled(training, labels, seed)
    return [
        msgspec.structs.replace(e, label=None, stratum=None)
        if e.domain == "target" and e.split == "train" and e.sha256 not in kept
        else e
        for e in examples
    ]


def _classes(candidates: Sequence[Candidate], known: tuple[str, ...]) -> tuple[str, ...]:
    """The class names of the source, or those of a brought model; the data's must be among them."""
    names: dict[Domain, set[str]] = {"source": set(), "target": set()}
    for candidate in candidates:
        if candidate.label is not None:
            names[candidate.domain].add(candidate.label)
        elif candidate.domain == "source":
            raise DataError(
                f"source {candidate.path}: has no label; put it into the folder of its class"
            )
    if known:
        _refuse_strange(names["source"] | names["target"], set(known), "the data", "the checkpoint")
        return known
    source, target = sorted(names["source"]), sorted(names["target"])
    if len(source) < 2:
        raise DataError(f"source: expected two or more classes, got only {source[0]!r}")
    _refuse_strange(set(target), set(source), "target", "source")
    return tuple(source)


def _refuse_strange(named: set[str], known: set[str], who: str, whose: str) -> None:
    strange = sorted(named - known)
    if not strange:
        return
    hints = []
    for name in strange:
        close = difflib.get_close_matches(name, sorted(known), n=1)
        hints.append(f"{name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    raise DataError(
        f"{who}: has classes that {whose} lacks: {', '.join(hints)}; {whose}: "
        f"{', '.join(sorted(known))}; {who}: {', '.join(sorted(named))}; rename them, or leave the "
        "images unlabelled: beside the class folders, or with an empty label in a CSV file"
    )


def _duplicates(candidates: Sequence[Candidate]) -> tuple[tuple[str, ...], ...]:
    same: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        same[candidate.sha256].append(candidate)
    for members in same.values():
        labelled = [member for member in members if member.label is not None]
        for one, other in pairwise(labelled):
            if one.label != other.label:
                raise DataError(
                    f"{one.path} ({one.domain}, {one.label!r}) and {other.path} ({other.domain}, "
                    f"{other.label!r}) are the same image with different labels; correct one"
                )
    return tuple(sorted(tuple(sorted(m.path for m in s)) for s in same.values() if len(s) > 1))


def _examples(candidates: Sequence[Candidate], recipe: Recipe) -> list[Example]:
    splits = assign_splits(candidates, recipe.data.splits, recipe.seed)
    # Of identical images the labelled one is worth keeping, else the first by name.
    order = sorted(
        zip(candidates, splits, strict=True), key=lambda cs: (cs[0].label is None, cs[0].path)
    )
    kept: dict[tuple[str, str, str], Example] = {}
    for candidate, split in order:
        example = Example(
            path=candidate.path,
            sha256=candidate.sha256,
            domain=candidate.domain,
            label=candidate.label,
            group=candidate.group,
            stratum=candidate.stratum,
            split=split,
        )
        # Where a CSV file puts identical images into two splits, each split keeps one.
        kept.setdefault((example.domain, example.sha256, split), example)
    return [kept[key] for key in sorted(kept)]


def _refuse_empty_splits(
    examples: Sequence[Example], classes: Sequence[str], *, complete: bool
) -> None:
    """``complete``: the source must teach every class; no model that knows them is brought."""
    way_out = "add images, use more and smaller groups, raise [data] limit or change [data.splits]"
    filled = {(e.domain, e.split) for e in examples}
    for domain in sorted({e.domain for e in examples}):
        for split in SPLITS:
            if (domain, split) not in filled:
                count = sum(e.domain == domain for e in examples)
                raise DataError(f"{domain}: no image of {count} is in the {split} split; {way_out}")
    learned = {e.label for e in examples if (e.domain, e.split) == ("source", "train")}
    for name in classes if complete else ():
        if name not in learned:
            raise DataError(f"source: the train split has no image of class {name!r}; {way_out}")
