"""Splits are a pure function of content and seed."""

import hashlib
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import product

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.dataset import Domain, Split
from runtime.errors import DataError
from runtime.recipe import Splits
from train.domains import Candidate
from train.splits import SPLITS, assign_splits, limit_images

SHARES = Splits(train=0.65, validation=0.10, test=0.25)
DOMAINS: tuple[Domain, ...] = ("source", "target")
LABELS = ("bad", "good", "odd")


def candidate(
    number: int,
    *,
    domain: Domain = "source",
    label: str | None = "good",
    group: str | None = None,
    split: Split | None = None,
    copy: int = 0,
) -> Candidate:
    return Candidate(
        path=f"{domain}/{number}-{copy}.png",
        domain=domain,
        label=label,
        group=group,
        split=split,
        sha256=hashlib.sha256(str(number).encode()).hexdigest(),
    )


@dataclass
class Draft:
    domain: Domain
    label: str | None
    group: str | None
    number: int


drafts = st.lists(
    st.builds(
        Draft,
        domain=st.sampled_from(["source", "target"]),
        label=st.sampled_from(LABELS),
        group=st.one_of(st.none(), st.integers(0, 12).map(str)),
        number=st.integers(0, 60),
    ),
    min_size=1,
    max_size=80,
)


def build(items: list[Draft]) -> list[Candidate]:
    # one label for one picture: contradictions are refused elsewhere
    return [
        candidate(d.number, domain=d.domain, label=LABELS[d.number % 3], group=d.group, copy=index)
        for index, d in enumerate(items)
    ]


def by_path(candidates: list[Candidate], seed: int = 0) -> dict[str, Split]:
    splits = assign_splits(candidates, SHARES, seed)
    return {c.path: split for c, split in zip(candidates, splits, strict=True)}


@given(drafts, st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_order_and_paths_do_not_matter(items: list[Draft], shuffle: random.Random) -> None:
    candidates = build(items)
    shuffled = shuffle.sample(candidates, len(candidates))
    assert by_path(candidates) == by_path(shuffled)
    renamed = [msgspec.structs.replace(c, path=f"/z{99 - i}") for i, c in enumerate(candidates)]
    assert assign_splits(renamed, SHARES, 0) == assign_splits(candidates, SHARES, 0)
    chosen = {c.path for c in limit_images(candidates, 7, 0)}
    assert chosen == {c.path for c in limit_images(shuffled, 7, 0)}


@given(drafts)
@settings(max_examples=150, deadline=None)
def test_groups_and_identical_images_never_straddle(items: list[Draft]) -> None:
    candidates = build(items)
    places: dict[tuple[str, str], set[Split]] = defaultdict(set)
    for c, split in zip(candidates, assign_splits(candidates, SHARES, 0), strict=True):
        places["image", c.sha256].add(split)
        if c.group:
            places["group", c.group].add(split)
    assert all(len(splits) == 1 for splits in places.values())


@given(
    st.lists(st.integers(0, 2), min_size=3, max_size=120),
    st.sampled_from([SHARES, Splits(train=0.5, validation=0.25, test=0.25)]),
    st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_every_stratum_gets_its_share_to_within_one(
    labels: list[int], shares: Splits, seed: int
) -> None:
    candidates = [candidate(i, label=LABELS[k]) for i, k in enumerate(labels)]
    splits = assign_splits(candidates, shares, seed)
    counts = Counter(zip((c.label for c in candidates), splits, strict=True))
    for label in {c.label for c in candidates}:
        total = sum(counts[label, split] for split in SPLITS)
        for split in SPLITS:
            assert abs(counts[label, split] - getattr(shares, split) * total) <= 1
            assert total < 3 or counts[label, split] >= 1


@given(st.lists(st.integers(1, 9), min_size=3, max_size=40), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_groups_fill_their_quota_to_within_the_largest(sizes: list[int], seed: int) -> None:
    candidates = [
        candidate(100 * g + i, group=str(g)) for g, size in enumerate(sizes) for i in range(size)
    ]
    counts = Counter(assign_splits(candidates, SHARES, seed))
    for split in SPLITS:
        assert counts[split] >= 1
        off = counts[split] - getattr(SHARES, split) * len(candidates)
        # one group, and the rounding of the quota to whole images
        assert abs(off) <= max(sizes) + 1


def test_a_seed_changes_it_and_only_a_seed() -> None:
    candidates = [candidate(i) for i in range(100)]
    assert by_path(candidates, 0) == by_path(candidates, 0)
    assert by_path(candidates, 0) != by_path(candidates, 1)
    assert limit_images(candidates, 50, 0) != limit_images(candidates, 50, 1)


def test_a_known_outcome_stays() -> None:
    """Splits that move between versions would make old scores incomparable."""
    splits = assign_splits([candidate(i) for i in range(12)], SHARES, 0)
    known = "train train train train train train validation test train test train test"
    assert splits == known.split()


def test_explicit_splits_are_honoured_and_count() -> None:
    candidates = [candidate(i, split="test" if i < 50 else None) for i in range(100)]
    counts = Counter(assign_splits(candidates, SHARES, 0))
    assert set(assign_splits(candidates, SHARES, 0)[:50]) == {"test"}
    assert counts["test"] == 50
    assert counts["validation"] == 7  # 0.10 of 0.75 of the other 50
    assert counts["train"] == 43


def test_a_group_follows_the_split_of_one_member() -> None:
    members = [candidate(i, group="a", split="test" if i == 2 else None) for i in range(5)]
    others = [candidate(i) for i in range(5, 50)]
    assert set(assign_splits(members + others, SHARES, 0)[:5]) == {"test"}


def test_a_group_with_two_splits_is_refused_by_name() -> None:
    candidates = [
        candidate(1, group="module 7", split="train"),
        candidate(2, group="module 7", split="test", domain="target"),
    ]
    with pytest.raises(DataError, match=r"group 'module 7'.*source/1-0\.png in train, target/2"):
        assign_splits(candidates, SHARES, 0)


def test_explicit_splits_may_part_identical_images_but_not_groups() -> None:
    candidates = [
        candidate(1, split="train"),
        candidate(1, split="test", copy=1),
        candidate(1, copy=2),
        candidate(1, copy=3, group="a"),
        candidate(2, group="a", split="validation"),
        candidate(3, group="a"),
    ]
    assert assign_splits(candidates, SHARES, 0) == [
        "train",
        "test",
        "train",
        "validation",
        "validation",
        "validation",
    ]


def test_one_part_in_both_domains_stays_together() -> None:
    candidates = [
        candidate(1000 * d + i, domain=domain, group=str(i))
        for d, domain in enumerate(DOMAINS)
        for i in range(40)
    ]
    splits = assign_splits(candidates, SHARES, 0)
    assert splits[:40] == splits[40:]


@pytest.mark.parametrize("seed", range(20))
def test_a_rare_class_in_mixed_groups_reaches_every_split(seed: int) -> None:
    # 30 good images in 6 groups, three of which hold one bad image each
    good = [candidate(i, group=str(i % 6)) for i in range(30)]
    bad = [candidate(100 + i, label="bad", group=str(i)) for i in range(3)]
    splits = assign_splits(good + bad, SHARES, seed)
    assert set(splits[30:]) == set(SPLITS)
    assert set(splits[:30]) == set(SPLITS)


def test_three_equal_groups_are_one_for_each() -> None:
    candidates = [candidate(10 * g + i, group=str(g)) for g in range(3) for i in range(10)]
    assert set(Counter(assign_splits(candidates, SHARES, 0)).values()) == {10}


def test_small_strata_of_one_class_do_not_all_go_to_training() -> None:
    candidates = [
        msgspec.structs.replace(candidate(i), stratum=f"kind {i // 2}") for i in range(20)
    ]
    assert set(assign_splits(candidates, SHARES, 0)) == set(SPLITS)


@given(drafts, st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_limit_counts_pictures_and_keeps_every_class(items: list[Draft], limit: int) -> None:
    candidates = build(items)
    chosen = limit_images(candidates, limit, 0)
    for domain in DOMAINS:
        there = {c.sha256: c.label for c in candidates if c.domain == domain}
        kept = {c.sha256: c.label for c in chosen if c.domain == domain}
        assert len(kept) == min(limit, len(there))
        if limit >= 3:
            assert set(kept.values()) == set(there.values())
    assert limit_images(candidates, 0, 0) == candidates


def test_limit_keeps_the_shares_of_labels_and_of_explicit_splits() -> None:
    candidates = [
        candidate(i, label=label, split=split)
        for i, (label, split, _) in enumerate(product(("bad", "good"), SPLITS, range(50)))
    ]
    chosen = limit_images(candidates, 60, 0)
    assert set(Counter((c.label, c.split) for c in chosen).values()) == {10}
