"""What a channel's file may say, who is in a cohort, and what is decided about an offer."""

import msgspec
import pytest

from runtime.delivery.channel import (
    MAX_CHANNEL_BYTES,
    Offer,
    channel_path,
    decide,
    decode,
    encode,
    in_cohort,
)
from runtime.delivery.slot_state import Failure, Pending, Release, State
from runtime.errors import UpdateError
from tests.update_repository import NOW

OFFER = Offer(
    name="solar", version="1.1", path="bundles/solar-1.1.zip", sha256="1" * 64, size=9,
    published=NOW,
)  # fmt: skip


def release(version: str, digit: str) -> Release:
    return Release(sha256=digit * 64, name="solar", version=version, manifest=digit * 64)


def action(state: State, floor: str = "", *, only_higher: bool = False, **fields: object) -> str:
    offer = msgspec.structs.replace(OFFER, **fields)
    return decide(offer, state, floor=floor, only_higher=only_higher, device="a").action


def test_a_channels_file_has_one_encoding() -> None:
    assert decode(encode(OFFER)) == OFFER
    assert encode(decode(encode(OFFER))) == encode(OFFER)


@pytest.mark.parametrize(
    "fields",
    [
        {"percentage": 101}, {"size": 0}, {"sha256": "x"}, {"version": "new"},
        {"path": "../etc/passwd"}, {"path": "bundles/../x"}, {"published": "2026-11-25"},
        {"published": "2026-11-25T00:00:00"},
    ],
)  # fmt: skip
def test_a_channels_file_that_says_nonsense_is_refused(fields: dict[str, object]) -> None:
    data = msgspec.json.encode(msgspec.to_builtins(OFFER) | fields)
    with pytest.raises(UpdateError, match="channel: "):
        decode(data)


def test_a_later_field_is_ignored_and_a_later_format_is_not() -> None:
    known: dict[str, object] = msgspec.to_builtins(OFFER)
    assert decode(msgspec.json.encode(known | {"note": "new"})) == OFFER
    with pytest.raises(UpdateError, match="format 2 is newer than 1"):
        decode(msgspec.json.encode(known | {"format": 2}))
    with pytest.raises(UpdateError, match="the limit is"):
        decode(bytes(MAX_CHANNEL_BYTES + 1))
    with pytest.raises(UpdateError, match="publish it again"):
        decode(b"[" * 60_000)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "x" * 101, "a\n"])
def test_a_channel_has_a_plain_name(name: str) -> None:
    with pytest.raises(UpdateError, match="expected a channel's name"):
        channel_path(name)


def test_a_cohort_grows_and_is_another_one_for_another_bundle() -> None:
    devices = [f"{number:032x}" for number in range(2000)]
    cohorts = [{d for d in devices if in_cohort(d, "a" * 64, p)} for p in (0, 10, 50, 100)]
    assert cohorts[0] < cohorts[1] < cohorts[2] < cohorts[3] == set(devices)
    assert cohorts[0] == set()
    assert 150 < len(cohorts[1]) < 250
    other = {d for d in devices if in_cohort(d, "b" * 64, 10)}
    assert len(other & cohorts[1]) < 60


def test_every_situation_has_its_action() -> None:
    new, old = release("1.1", "1"), release("1.0", "0")
    failed = Failure(release=new, reason="NaN", date="today")
    assert action(State()) == "fetch"
    assert action(State(current=old), "1.0") == "fetch"
    assert action(State(current=new), "1.1") == "nothing new"
    assert action(State(current=old, pending=Pending(release=new)), "1.0") == "pending"
    assert action(State(current=new, pending=Pending(release=old)), "1.1") == "withdraw"
    assert action(State(current=old, failures=(failed,)), "1.0") == "failed here before"
    assert action(State(current=old), "1.0", percentage=0) == "not in cohort"
    assert action(State(current=old), "1.2", allow_lower=True) == "fetch"


def test_a_version_below_the_floor_is_an_error_even_outside_the_cohort() -> None:
    with pytest.raises(UpdateError, match=r"expected solar 1\.2 or newer"):
        action(State(), "1.2", percentage=0)


@pytest.mark.parametrize("floor", ["1.1", "1.2", "1.1.0"])
def test_with_a_wrong_clock_only_a_higher_version_is_new(floor: str) -> None:
    with pytest.raises(UpdateError, match="only a version above"):
        action(State(), floor, only_higher=True, allow_lower=True)
    assert action(State(), "1.0.9", only_higher=True) == "fetch"
    assert action(State(), "", only_higher=True) == "fetch"
