"""One checked data set out of a recipe: both domains, their classes, splits and duplicates.

It does not know what an image looks like: train/domains opens them, train/splits decides.
"""

import difflib
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from runtime.dataset import Dataset, Domain, Example
from runtime.errors import DataError
from runtime.recipe import Recipe
from train.domains import Candidate, Listing, Track, check_images, list_domain
from train.splits import SPLITS, assign_splits, limit_images


def prepare(recipe: Recipe, *, cache: Path | None, track: Track | None = None) -> Dataset:
    """Read, check and split the images of ``recipe``.

    Examples come in the order of domain and digest. Of byte-identical images in one domain one
    is kept; all are in ``duplicates``. ``cache`` is a folder that remembers which images are
    good, None opens all of them again. ``track`` wraps the images to open in a progress bar.

    Raises DataError if a domain is missing or empty, an image of the source has no label, there
    are not two classes or the domains name different ones, identical images have different
    labels, more than 1 % of a domain cannot be read, or a split stays empty.
    """
    listing = list_domain(recipe.data.source, "source")
    if recipe.data.target is not None:
        target = list_domain(recipe.data.target, "target")
        listing = Listing(
            candidates=listing.candidates + target.candidates,
            set_aside=listing.set_aside + target.set_aside,
        )
    classes = _classes(listing.candidates)  # before the slow part: a typo shows at once
    listing = check_images(listing, cache=cache, track=track)
    duplicates = _duplicates(listing.candidates)
    chosen = limit_images(listing.candidates, recipe.data.limit, recipe.seed)
    examples = _examples(chosen, recipe)
    _refuse_empty_splits(examples, classes)
    return Dataset(
        classes=classes,
        examples=tuple(examples),
        set_aside=listing.set_aside,
        duplicates=duplicates,
        field="source" if recipe.data.target is None else "target",
    )


def _classes(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """The class names of the source; those of the target must be among them."""
    names: dict[Domain, set[str]] = {"source": set(), "target": set()}
    for candidate in candidates:
        if candidate.label is not None:
            names[candidate.domain].add(candidate.label)
        elif candidate.domain == "source":
            raise DataError(
                f"source {candidate.path}: has no label; put it into the folder of its class"
            )
    source, target = sorted(names["source"]), sorted(names["target"])
    if len(source) < 2:
        raise DataError(f"source: expected two or more classes, got only {source[0]!r}")
    strange = sorted(set(target) - set(source))
    if strange:
        hints = []
        for name in strange:
            close = difflib.get_close_matches(name, source, n=1)
            hints.append(f"{name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
        raise DataError(
            f"target: has classes that the source lacks: {', '.join(hints)}; source: "
            f"{', '.join(source)}; target: {', '.join(target)}; rename them, or leave the images "
            "unlabelled: beside the class folders, or with an empty label in a CSV file"
        )
    return tuple(source)


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


def _refuse_empty_splits(examples: Sequence[Example], classes: Sequence[str]) -> None:
    way_out = "add images, use more and smaller groups, raise [data] limit or change [data.splits]"
    filled = {(e.domain, e.split) for e in examples}
    for domain in sorted({e.domain for e in examples}):
        for split in SPLITS:
            if (domain, split) not in filled:
                count = sum(e.domain == domain for e in examples)
                raise DataError(f"{domain}: no image of {count} is in the {split} split; {way_out}")
    learned = {e.label for e in examples if (e.domain, e.split) == ("source", "train")}
    for name in classes:
        if name not in learned:
            raise DataError(f"source: the train split has no image of class {name!r}; {way_out}")
