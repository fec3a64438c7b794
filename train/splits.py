"""Which images train, validate and test: a pure function of content and seed.

It does not know files: neither paths nor the order of the list change the outcome.

Images of one group, and byte-identical images, stay together, across both domains: a part seen in
source training must not come back in the target test. The rest is balanced by quota: in each
stratum of a domain every split gets its share, to within one group.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, product
from typing import TypeVar

from runtime.dataset import Example, Split
from runtime.errors import DataError
from runtime.recipe import Splits
from train.domains import Candidate

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

_Stratum = tuple[str, str, str]
_Class = tuple[str, str]
_Block = tuple[str, ...]
_Key = TypeVar("_Key")


def assign_splits(candidates: Sequence[Candidate], shares: Splits, seed: int) -> list[Split]:
    """The split of each candidate, in the order given.

    Splits that candidates already have are honoured and count towards the shares. A class with
    three or more groups is in every split where that is possible.

    Raises DataError if the images of one group have different splits.
    """
    units = _units(candidates)
    free = [unit for unit in units if unit.split is None]
    free.sort(key=lambda unit: (-len(unit.images), _draw("split", seed, unit.key)))
    open_places = _quotas(units, shares)
    for unit in free:  # large ones first: small ones can still even out what they leave
        need = {s: sum(n * open_places[k][s] for k, n in unit.strata.items()) for s in SPLITS}
        unit.split = split = max(SPLITS, key=lambda split: need[split])
        for stratum, count in unit.strata.items():
            open_places[stratum][split] -= count
    _cover_classes(units, free)
    splits: dict[int, Split] = {}
    for unit in units:
        assert unit.split is not None
        splits.update(dict.fromkeys(unit.members, unit.split))
    return [splits[index] for index in range(len(candidates))]


def limit_images(candidates: Sequence[Candidate], limit: int, seed: int) -> list[Candidate]:
    """At most ``limit`` different images of each domain, every stratum by its share; 0 keeps all.

    Byte-identical images of a domain count once and are kept or left together.
    """
    if limit == 0:
        return list(candidates)
    kept: set[tuple[str, str]] = set()
    for domain in sorted({c.domain for c in candidates}):
        strata: dict[str, tuple[str, ...]] = {}
        for c in candidates:
            if c.domain == domain:  # the smallest key: independent of the order of the list
                key = (c.label or "", c.stratum or "", c.split or "")
                strata[c.sha256] = min(strata.get(c.sha256, key), key)
        places = {key: float(count) for key, count in sorted(Counter(strata.values()).items())}
        quotas = _apportion(places, min(limit, len(strata)), at_least_one=set(places))
        for sha256 in sorted(strata, key=lambda sha256: _draw("limit", seed, sha256)):
            if quotas[strata[sha256]] > 0:
                quotas[strata[sha256]] -= 1
                kept.add((domain, sha256))
    return [c for c in candidates if (c.domain, c.sha256) in kept]


def choose_labelled(examples: Sequence[Example], budget: int, seed: int) -> set[str]:
    """Digests of the ``budget`` images whose labels training may use, every class by its share.

    A smaller budget's images are among a larger one's wherever the shares allow.
    """
    classes = Counter(e.label or "" for e in examples)
    if budget >= len(examples):
        return {e.sha256 for e in examples}
    places = {name: float(count) for name, count in sorted(classes.items())}
    quotas = _apportion(places, budget, at_least_one=set(places))
    kept: set[str] = set()
    for e in sorted(examples, key=lambda e: _draw("labels", seed, e.sha256)):
        if quotas[e.label or ""] > 0:
            quotas[e.label or ""] -= 1
            kept.add(e.sha256)
    return kept


class _Unit:
    """Candidates that share one split."""

    def __init__(self, candidates: Sequence[Candidate], members: list[int]) -> None:
        chosen = [candidates[index] for index in members]
        self.members = members
        self.key = min(c.sha256 for c in chosen)
        self.images = {(c.domain, c.sha256): c for c in chosen}
        self.split: Split | None = next((c.split for c in chosen if c.split), None)
        self.strata = Counter(_stratum(c) for c in self.images.values())
        self.classes: set[_Class] = {(c.domain, c.label or "") for c in chosen}


def _stratum(candidate: Candidate) -> _Stratum:
    return candidate.domain, candidate.label or "", candidate.stratum or ""


def _units(candidates: Sequence[Candidate]) -> list[_Unit]:
    """Join candidates by group, then by content."""
    blocks: dict[_Block, list[int]] = defaultdict(list)
    for index, c in enumerate(candidates):
        # Only an explicit split may part identical images, so it is part of an image's key.
        key: _Block = ("group", c.group) if c.group else ("image", c.sha256, c.split or "")
        blocks[key].append(index)
    for key, members in blocks.items():
        _refuse_contradiction(key[1], [candidates[index] for index in members])

    root: dict[_Block, _Block] = {key: key for key in blocks}

    def find(key: _Block) -> _Block:
        while root[key] != key:
            root[key] = root[root[key]]
            key = root[key]
        return key

    holder: dict[str, _Block] = {}
    for key, members in blocks.items():
        for index in members:
            other = find(holder.setdefault(candidates[index].sha256, key))
            root[find(key)] = other
    joined: dict[_Block, list[list[int]]] = defaultdict(list)
    for key, members in blocks.items():
        joined[find(key)].append(members)

    units: list[_Unit] = []
    for parts in joined.values():
        explicit = {candidates[index].split for members in parts for index in members} - {None}
        if len(explicit) <= 1:
            units.append(_Unit(candidates, sorted(chain(*parts))))
            continue
        # The domains place identical images in different splits on purpose. Each part keeps its
        # own; a part without one goes to the first, which keeps validation and test clean.
        for members in parts:
            unit = _Unit(candidates, members)
            unit.split = unit.split or next(split for split in SPLITS if split in explicit)
            units.append(unit)
    return sorted(units, key=lambda unit: unit.key)


def _refuse_contradiction(group: str, members: Iterable[Candidate]) -> None:
    first: dict[Split, Candidate] = {}
    for candidate in sorted(members, key=lambda c: c.path):
        if candidate.split:
            first.setdefault(candidate.split, candidate)
    if len(first) > 1:
        (one, a), (other, b) = list(first.items())[:2]
        raise DataError(
            f"group {group!r} is in two splits: {a.path} in {one}, {b.path} in {other}; a group "
            "is one part, in both domains: give its images one split, or different groups"
        )


def _quotas(units: Sequence[_Unit], shares: Splits) -> dict[_Stratum, dict[Split, int]]:
    """Places that each split has left for free images, by stratum."""
    placed: dict[_Stratum, Counter[Split | None]] = defaultdict(Counter)
    groups: Counter[_Stratum] = Counter()
    for unit in units:
        for stratum, count in unit.strata.items():
            placed[stratum][unit.split] += count
            groups[stratum] += 1
    share: dict[Split, float] = {split: getattr(shares, split) for split in SPLITS}
    quotas: dict[_Stratum, dict[Split, int]] = {}
    for stratum, counts in placed.items():
        total = sum(counts.values())
        wanted: dict[Split, float] = {
            split: max(0.0, share[split] * total - counts[split]) for split in SPLITS
        }
        missing = {s for s in SPLITS if counts[s] == 0} if groups[stratum] >= 3 else set()
        quotas[stratum] = _apportion(wanted, counts[None], at_least_one=missing)
    return quotas


def _apportion(
    weights: Mapping[_Key, float], places: int, *, at_least_one: set[_Key]
) -> dict[_Key, int]:
    """Whole numbers in proportion to ``weights`` that add up to ``places``.

    By largest remainder; the order of ``weights`` decides ties. Keys of ``at_least_one`` take a
    place from the richest as long as that has two.
    """
    total = sum(weights.values())
    ideal = {key: weights[key] * places / total for key in weights} if total else {}
    result = {key: int(value) for key, value in ideal.items()}
    by_remainder = sorted(ideal, key=lambda key: result[key] - ideal[key])
    for key in by_remainder[: places - sum(result.values())]:
        result[key] += 1
    for key in (key for key in result if key in at_least_one):
        rich = max(result, key=lambda key: result[key])
        if result[key] == 0 and result[rich] > 1:
            result[key], result[rich] = 1, result[rich] - 1
    return result


def _cover_classes(units: Sequence[_Unit], free: Sequence[_Unit]) -> None:
    """Move single groups so that no split lacks a class of three or more groups."""
    groups = Counter(class_ for unit in units for class_ in unit.classes)
    holds = Counter((class_, unit.split) for unit in units for class_ in unit.classes)
    for class_, split in product(sorted(groups), SPLITS):
        if groups[class_] < 3 or holds[class_, split]:
            continue
        movable = [
            unit
            for unit in free
            if class_ in unit.classes
            and all(holds[other, unit.split] > 1 or groups[other] < 3 for other in unit.classes)
        ]
        if movable:
            unit = min(movable, key=lambda u: (-holds[class_, u.split], len(u.images)))
            holds.subtract((other, unit.split) for other in unit.classes)
            holds.update((other, split) for other in unit.classes)
            unit.split = split


def _draw(purpose: str, seed: int, sha256: str) -> str:
    """A fixed random order of contents; two purposes do not see the same one."""
    return hashlib.sha256(f"{purpose} {seed} {sha256}".encode()).hexdigest()
