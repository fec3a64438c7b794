"""Floors only rise, whatever order they are learned in, and losing a copy loses nothing."""

import datetime
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.delivery.floor import (
    RELEASED,
    SLACK,
    Floor,
    Floors,
    Seen,
    check_metadata,
    judge_clock,
    merge,
    second_copy,
)
from runtime.errors import UpdateError

SEEN = st.builds(Seen, st.integers(0, 9), st.integers(0, 9))
FLOOR = st.builds(
    Floor,
    time=st.integers(0, 2**33),
    version=st.sampled_from(["", "0.9", "1.0", "1.0.1", "1.10", "2.0"]),
    metadata=st.dictionaries(st.sampled_from("ab"), SEEN),
)


@given(FLOOR, FLOOR, FLOOR)
def test_floors_merge_in_any_order(one: Floor, other: Floor, third: Floor) -> None:
    assert merge(one, other) == merge(other, one)
    assert merge(merge(one, other), third) == merge(one, merge(other, third))
    assert merge(one, one) == one
    assert merge(merge(one, other), one) == merge(one, other)


def test_a_floor_is_lifted_in_both_copies_and_never_lowered(tmp_path: Path) -> None:
    floors = Floors(tmp_path / "state")
    high = Floor(time=7200, version="1.10", metadata={"a": Seen(2, 5)})
    assert floors.read() == Floor()
    assert floors.lift(high) == high
    assert floors.lift(Floor(time=3600, version="1.9", metadata={"a": Seen(1, 6)})) == merge(
        high, Floor(metadata={"a": Seen(0, 6)})
    )
    one, other = (path.read_bytes() for path in floors.paths)
    assert one == other


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("damage", [None, b"", b"{", b'{"time": "x"}', b"\xff"])
def test_one_copy_is_enough(tmp_path: Path, lost: int, damage: bytes | None) -> None:
    floors = Floors(tmp_path / "state")
    high = floors.lift(Floor(time=7200, version="1.0"))
    whole = floors.paths[lost].read_bytes()
    floors.paths[lost].unlink() if damage is None else floors.paths[lost].write_bytes(damage)
    assert floors.read() == high
    floors.lift(Floor())
    assert floors.paths[lost].read_bytes() == whole


def test_without_any_whole_copy_it_is_said(tmp_path: Path) -> None:
    floors = Floors(tmp_path / "state")
    floors.lift(Floor(version="1.0"))
    floors.paths[0].write_bytes(b"{")
    floors.paths[1].unlink()
    with pytest.raises(UpdateError, match="damaged, so that an old update"):
        floors.read()


def test_an_unchanged_floor_is_not_written_again(tmp_path: Path) -> None:
    floors = Floors(tmp_path / "state")
    floors.lift(Floor(time=7200))
    before = [path.stat().st_ino for path in floors.paths]
    floors.lift(Floor(time=7201))
    assert [path.stat().st_ino for path in floors.paths] == before


def test_the_second_copy_lies_beside_the_state_or_where_it_is_told(tmp_path: Path) -> None:
    assert second_copy(tmp_path / "state", {}) == tmp_path / "state-floor" / "floor.json"
    chosen = second_copy(tmp_path / "state", {"FIELDFIT_FLOOR": "/persist/floor.json"})
    assert chosen == Path("/persist/floor.json")


def test_the_release_is_the_newest_that_the_changelog_dates() -> None:
    """Before the first one, a day that has been."""
    changelog = (Path(__file__).parent.parent / "CHANGELOG.md").read_text()
    _, *releases = re.findall("^## (.*)$", changelog, re.MULTILINE)
    for release in releases[:1]:
        assert release.endswith(f" - {RELEASED:%Y-%m-%d}")
    assert datetime.datetime.now(datetime.timezone.utc) >= RELEASED


def test_a_clock_is_held_against_the_floor_and_the_release() -> None:
    last = RELEASED + datetime.timedelta(days=40)
    floor = Floor(time=int(last.timestamp()))
    right = judge_clock(last + SLACK, floor)
    assert (right.reference, right.wrong) == (last + SLACK, False)
    late = judge_clock(last - SLACK, floor)
    assert (late.reference, late.wrong) == (last, False)
    wrong = judge_clock(last - SLACK * 1.1, floor)
    assert (wrong.reference, wrong.wrong) == (last, True)
    never = judge_clock(datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc), Floor())
    assert (never.reference, never.wrong) == (RELEASED, True)


def test_metadata_may_not_be_older_than_seen_under_the_same_trust() -> None:
    floor = Floor(metadata={"a": Seen(2, 5)})
    check_metadata(floor, "a", Seen(2, 5))
    check_metadata(floor, "another ceremony", Seen(1, 1))
    with pytest.raises(UpdateError, match="expected targets metadata 5 or newer, got 4"):
        check_metadata(floor, "a", Seen(3, 4))
    with pytest.raises(UpdateError, match="expected root metadata 2 or newer, got 1"):
        check_metadata(floor, "a", Seen(1, 9))
