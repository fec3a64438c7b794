"""A status is what a device signed, byte for byte, and the newest that it signed; or nothing."""

import datetime
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime.delivery import device_status
from runtime.delivery.identity import Identity
from runtime.delivery.live import LiveClassifier
from runtime.delivery.slots import Slots
from runtime.delivery.status_document import (
    MAX_STATUS_BYTES,
    Known,
    Status,
    clipped,
    known_by,
    read_status,
    sign_status,
)
from runtime.errors import FleetError
from tests.model_zips import model_zip
from tests.signed_devices import healthy, moment, new_identity


@pytest.fixture
def one(tmp_path: Path) -> Identity:
    return new_identity(tmp_path / "one")


def signed(one: Identity, **changes: Any) -> bytes:
    return sign_status(healthy(one.device.id, **changes), one)


def resigned(one: Identity, body: bytes) -> bytes:
    """Any bytes as a status, rightly signed: what a stolen key could do."""
    signature = one.sign(b"fieldfit device status\n" + body).hex().encode()
    return b'{"status":' + body + b',"ed25519":"' + signature + b'"}'


def test_what_was_signed_is_read(one: Identity) -> None:
    data = signed(one)
    assert read_status(data, {one.device.id: one.public}) == healthy(one.device.id)
    assert data == signed(one)  # one content has one encoding


def test_every_single_bit_flip_is_refused_or_changes_nothing(one: Identity) -> None:
    data, keys = signed(one), {one.device.id: one.public}
    expected = read_status(data, keys)
    refused = 0
    for position in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        try:
            assert read_status(bytes(flipped), keys) == expected
        except FleetError:
            refused += 1
    assert refused > len(data) * 8 - 8  # what may change is the newline at the end


def test_an_unknown_device_is_refused_before_its_status_is_read(one: Identity) -> None:
    with pytest.raises(FleetError, match="a device that is not enrolled here"):
        read_status(signed(one), {})


def test_another_device_s_key_signs_nothing_in_its_name(one: Identity, tmp_path: Path) -> None:
    other = new_identity(tmp_path / "other")
    forged = resigned(other, msgspec.json.encode(healthy(one.device.id), order="deterministic"))
    keys = {one.device.id: one.public, other.device.id: other.public}
    with pytest.raises(FleetError, match="not signed by the key"):
        read_status(forged, keys)
    with pytest.raises(FleetError, match="to sign"):
        sign_status(healthy(one.device.id), other)


def test_a_signature_of_something_else_is_no_signature_of_a_status(one: Identity) -> None:
    body = msgspec.json.encode(healthy(one.device.id), order="deterministic")
    bare = b'{"status":' + body + b',"ed25519":"' + one.sign(body).hex().encode() + b'"}'
    with pytest.raises(FleetError, match="not signed by the key"):
        read_status(bare, {one.device.id: one.public})


def test_old_documents_played_again_are_refused(one: Identity) -> None:
    keys = {one.device.id: one.public}
    old, new = signed(one, moment=moment(7)), signed(one, moment=moment(8))
    seen = {one.device.id: known_by(read_status(new, keys), new)}
    with pytest.raises(FleetError, match="an old document played again: its number is 7, 8 was"):
        read_status(old, keys, seen)
    assert read_status(new, keys, seen).moment.sequence == 8  # the same one again is no replay
    twin = signed(one, moment=moment(8), name="line 9")
    with pytest.raises(FleetError, match="two different documents with the number 8"):
        read_status(twin, keys, seen)


BODIES: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda s: s.replace(b'"format":1', b'"format":2'), "format 2 is newer than 1"),
    (lambda s: s.replace(b'"format":1,', b'"format":1,"extra":1,'), "unknown field `extra`"),
    (lambda s: s.replace(b'"sequence":7', b'"sequence":-7'), ">= 0"),
    (lambda s: s.replace(b'"uptime_s":1000.0', b'"uptime_s":1e999'), "out of range"),
    (lambda s: s.replace(b'"provider":"tensorrt"', b'"provider":"magic"'), "Invalid enum value"),
    (lambda s: s.replace(b'11:50:00Z"', b'11:50:00"'), "timezone component"),
    (lambda s: s.replace(b'"format":1', b'"format": 1'), "another encoding"),
    (lambda s: s.replace(b'"name":"line 1"', b'"name":"a\\u001b[31m"'), "printable characters"),
    (lambda s: s.replace(b'"model":"Orin Nano"', b'"model":"' + b"x" * 301 + b'"'), "<= 300"),
]


@pytest.mark.parametrize(("change", "message"), BODIES)
def test_even_a_rightly_signed_status_must_be_one(
    one: Identity, change: Callable[[bytes], bytes], message: str
) -> None:
    body = msgspec.json.encode(healthy(one.device.id), order="deterministic")
    changed = change(body)
    assert changed != body
    with pytest.raises(FleetError, match=message):
        read_status(resigned(one, changed), {one.device.id: one.public})


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"{}", b"\xff" * 100, b"[" * 60_000, b'{"status":' * 6_000, b"<html>portal"],
    ids=["empty", "null", "nothing in it", "no text", "deep lists", "deep", "a portal's page"],
)
def test_anything_else_is_refused_in_a_sentence(one: Identity, data: bytes) -> None:
    with pytest.raises(FleetError, match="not a status document"):
        read_status(data, {one.device.id: one.public})


def test_a_huge_document_is_refused_unread(one: Identity) -> None:
    huge = b" " * (MAX_STATUS_BYTES + 1)
    tracemalloc.start()
    try:
        with pytest.raises(FleetError, match="this has more"):
            read_status(huge, {one.device.id: one.public})
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_status_too_large_to_be_read_is_not_signed(one: Identity) -> None:
    counters = {f"{number:0300}": number for number in range(220)}
    with pytest.raises(FleetError, match="may have 65,536 bytes"):
        signed(one, counters=counters)


def test_clipped_text_is_one_line_that_a_status_may_hold() -> None:
    assert clipped("a\n b\t\x0bc") == "a b c"
    assert len(clipped("x" * 1000)) == 300


# --- a device's own report


def test_a_new_device_reports_what_it_knows_and_invents_nothing(
    one: Identity, tmp_path: Path
) -> None:
    data = device_status.report(tmp_path / "one", one)
    status = read_status(data, {one.device.id: one.public})
    assert (tmp_path / "one" / "status.json").read_bytes() == data
    assert status.bundle is None
    assert status.engine is None
    assert status.drift is None
    assert status.counters == {}
    assert b"drift" not in data
    assert b"null" not in data


def test_the_number_rises_whatever_the_clock_says(one: Identity, tmp_path: Path) -> None:
    keys = {one.device.id: one.public}
    state = tmp_path / "one"
    first = read_status(device_status.report(state, one), keys)
    assert first.moment.sequence == int(first.moment.seen.timestamp())
    ahead = msgspec.structs.replace(first, moment=moment(2**40))  # as by a clock set back since
    (state / "status.json").write_bytes(sign_status(ahead, one))
    assert read_status(device_status.report(state, one), keys).moment.sequence == 2**40 + 1
    (state / "status.json").write_bytes(b"damaged")
    later = read_status(device_status.report(state, one), keys).moment.sequence
    assert later >= first.moment.sequence


def describe(one: Identity, previous: Status | None, *, time: datetime.datetime, synchronised: bool,
             sha256: str = "ab" * 32) -> Status:  # fmt: skip
    from runtime import machine
    from runtime.delivery.slot_state import Release, State

    here = msgspec.structs.replace(machine.describe(), time=time, clock_synchronised=synchronised)
    release = Release(sha256=sha256, name="solar", version="1.0", manifest="12" * 32)
    return device_status.describe(
        one.device, here, slots=State(current=release), engine=None, update=None, expires={},
        previous=previous, boot="b", uptime_s=1.0, counters={}, drift=None,
    )  # fmt: skip


def test_since_when_a_bundle_runs_is_told_by_a_clock_that_can_be_believed(one: Identity) -> None:
    day = datetime.datetime(2026, 11, 25, tzinfo=datetime.timezone.utc)
    hour = datetime.timedelta(hours=1)

    def since(status: Status) -> datetime.datetime | None:
        assert status.bundle
        return status.bundle.since

    wrong = describe(one, None, time=day - 20_000 * hour, synchronised=False)
    assert since(wrong) is None
    right = describe(one, wrong, time=day, synchronised=True)
    assert since(right) == day
    restarted = describe(one, right, time=day - 20_000 * hour, synchronised=False)
    assert since(restarted) == day
    later = describe(one, restarted, time=day + hour, synchronised=True)
    assert since(later) == day
    other = describe(one, later, time=day + 2 * hour, synchronised=True, sha256="cd" * 32)
    assert since(other) == day + 2 * hour
    set_back = describe(one, other, time=day, synchronised=True, sha256="cd" * 32)
    assert since(set_back) == day


def test_the_expiry_is_that_of_the_metadata_on_this_device(tmp_path: Path) -> None:
    folder = tmp_path / "tuf"
    folder.mkdir()
    (folder / "root.json").write_text('{"signed": {"expires": "2027-01-02T03:04:05Z", "x": 1}}')
    (folder / "timestamp.json").write_text("damaged")
    (folder / "targets.json").write_bytes(b" " * 5_000_000)
    assert device_status.expiries(folder) == {
        "root": datetime.datetime(2027, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc)
    }
    assert device_status.expiries(tmp_path / "absent") == {}


def test_the_engine_is_told_of_the_slot_that_answers(one: Identity, tmp_path: Path) -> None:
    state, keys = tmp_path / "one", {one.device.id: one.public}
    slots = Slots(state)
    for version in ("1.0.0", "1.1.0"):
        slot = slots.stage(model_zip(tmp_path / version, version))
        slots.activate(slot.sha256)
        slots.begin_try()
        slots.commit()
        status = read_status(device_status.report(state, one), keys)
        assert status.engine is None  # not that of the slot before
        LiveClassifier(state).close()
        status = read_status(device_status.report(state, one), keys)
        assert status.bundle
        assert (status.bundle.name, status.bundle.sha256) == ("tiny", slot.sha256)
        assert status.bundle.version == version
        assert status.engine
        assert (status.engine.provider, status.engine.form) == ("cpu", "fp32")
        assert status.engine.passed_over


def test_how_the_last_update_went_is_told(one: Identity, tmp_path: Path) -> None:
    device_status.record_update(tmp_path / "one", "no\nroute", failed=True)
    status = read_status(device_status.report(tmp_path / "one", one), {one.device.id: one.public})
    assert status.update
    assert (status.update.outcome, status.update.failed) == ("no route", True)


def test_what_is_remembered_is_the_number_and_the_bytes(one: Identity) -> None:
    data = signed(one)
    known = known_by(read_status(data, {one.device.id: one.public}), data)
    assert known == Known(7, known.digest)
    assert len(known.digest) == 64
