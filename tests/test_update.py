"""An update arrives whole or is refused in one sentence, over HTTP and from a stick alike."""

import datetime
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from runtime.delivery.floor import RELEASED, Floors, second_copy
from runtime.delivery.slots import Slots
from runtime.delivery.update import EXPIRES_SOON, Outcome, Request, update
from runtime.errors import UpdateError
from runtime.private_files import Lock
from tests.update_repository import (
    DAY,
    NOW,
    Forge,
    Handler,
    Keys,
    Server,
    copy_device,
    tiny_bundle,
)

DEVICE = "0123456789abcdef" * 2


class Device(NamedTuple):
    """A device in the field, and the repository that it is told to believe."""

    state: Path
    forge: Forge
    source: str
    served: Server | None

    @property
    def server(self) -> Server:
        assert self.served is not None
        return self.served

    def update(
        self, now: datetime.datetime = NOW, *, source: str | None = None, provision: bool = False
    ) -> Outcome:
        request = Request(
            source=source or self.source,
            channel="line",
            root=self.forge.trust if provision else None,
        )
        return update(self.state, request, device=DEVICE, now=lambda: now)

    def accept(self) -> None:
        """Update, prove and commit: what an honest night does."""
        outcome = self.update(provision=True)
        assert outcome.outcome == "staged"
        slots = Slots(self.state)
        slots.begin_try()
        slots.commit()

    def refuses(
        self, sentence: str, now: datetime.datetime = NOW, *, source: str | None = None,
        provision: bool = False,
    ) -> None:  # fmt: skip
        """It says ``sentence``, and its slots are as they were."""
        before = Slots(self.state).status()
        with pytest.raises(UpdateError, match=sentence) as caught:
            self.update(now, source=source, provision=provision)
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith("(what runs goes on running)")
        assert Slots(self.state).status() == before

    def serve(self, folder: Path) -> None:
        """Another tree at the same address: what an attacker on the way, or a swapped stick, is."""
        shutil.rmtree(self.forge.folder)
        shutil.copytree(folder, self.forge.folder)


MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: nothing here is about a disk, for which an update waits a dozen times."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def template() -> Iterator[Device]:
    """A device that has had version 1.0 from a stick, and runs it."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield _template(Path(name))


def _template(folder: Path) -> Device:
    forge = Forge(folder / "repository")
    forge.publish("1.0")
    device = Device(folder / "state", forge, forge.folder.as_uri(), None)
    device.accept()
    return device


@pytest.fixture
def http(tmp_path: Path, template: Device) -> Iterator[Device]:
    """A device that runs version 1.0 and gets its updates from a web server."""
    forge = template.forge.moved(tmp_path / "repository")
    state = copy_device(template.state, tmp_path / "state")
    with Server(forge.folder) as server:
        yield Device(state, forge, server.url, server)


@pytest.fixture(params=["http", "file"])
def device(request: pytest.FixtureRequest, http: Device) -> Device:
    """The same, over both transports."""
    if request.param == "http":
        return http
    return http._replace(source=http.forge.folder.as_uri())


def current(device: Device) -> str:
    slot = Slots(device.state).current()
    assert slot is not None
    return slot.version


# --- what an honest publisher sees


def test_a_new_version_is_staged_and_put_on_trial(device: Device) -> None:
    offer = device.forge.publish("1.1")
    outcome = device.update()
    assert (outcome.outcome, outcome.offer) == ("staged", offer)
    pending = Slots(device.state).pending()
    assert pending is not None
    assert pending.sha256 == offer.sha256
    assert current(device) == "1.0"
    assert not list((device.state / "downloads").iterdir())
    assert device.update().outcome == "pending"


def test_nothing_new_costs_two_requests_and_five_kilobytes(http: Device) -> None:
    outcome = http.update()
    assert outcome.outcome == "nothing new"
    paths = [served.path for served in http.server.log]
    assert paths == ["/metadata/2.root.json", "/metadata/timestamp.json"]
    assert outcome.requests == 2
    assert outcome.received == sum(served.sent for served in http.server.log) < 5_000


def test_a_bundle_that_failed_here_is_not_fetched_again(device: Device) -> None:
    device.forge.publish("1.1")
    device.update()
    Slots(device.state).rollback("its golden samples differ")
    outcome = device.update()
    assert outcome.outcome == "failed here before"
    assert "its golden samples differ" in outcome.reason
    assert Slots(device.state).pending() is None


def test_an_operator_goes_back_with_a_signed_word_and_without_a_download(device: Device) -> None:
    old = device.forge.publish("1.0")
    device.forge.publish("1.1")
    device.update()
    Slots(device.state).begin_try()
    Slots(device.state).commit()
    device.forge.publish("1.0")
    device.refuses("expected tiny 1.1 or newer")
    device.forge.publish("1.0", allow_lower=True)
    device.server.log.clear()
    assert device.update().outcome == "staged"
    assert not [served for served in device.server.log if "bundles" in served.path]
    pending = Slots(device.state).pending()
    assert pending is not None
    assert pending.sha256 == old.sha256


def test_what_is_on_trial_is_withdrawn_with_the_channel(device: Device) -> None:
    device.forge.publish("1.1")
    device.update()
    device.forge.publish("1.0")
    assert device.update().outcome == "withdrawn"
    assert Slots(device.state).pending() is None
    assert current(device) == "1.0"


def test_only_the_cohort_gets_it_and_more_of_it_later(device: Device) -> None:
    device.forge.publish("1.1", percentage=0)
    outcome = device.update()
    assert outcome.outcome == "not in cohort"
    assert "0 %" in outcome.reason
    device.forge.publish("1.1", percentage=100)
    assert device.update().outcome == "staged"


def test_a_dry_run_says_so_and_stages_nothing(device: Device) -> None:
    device.forge.publish("1.1")
    before = Slots(device.state).status()
    request = Request(source=device.source, dry_run=True)
    assert update(device.state, request, device=DEVICE).outcome == "would stage"
    assert Slots(device.state).status() == before


def kept(device: Device) -> dict[Path, bytes]:
    """Every file that says whom the device believes, and since when."""
    places = [device.state / "trust", device.state / "tuf", device.state / "update.json"]
    files = [file for place in places for file in (place, *place.rglob("*")) if file.is_file()]
    return {file: file.read_bytes() for file in [*files, *Floors(device.state).paths]}


def test_a_root_is_trusted_only_once_its_source_was_checked(device: Device, tmp_path: Path) -> None:
    other = Forge(tmp_path / "other")
    other.publish("2.0", published=NOW + DAY / 2)
    before = kept(device)
    with pytest.raises(UpdateError, match="not signed by those whom this device trusts"):
        update(
            device.state, Request(device.source, "line", other.trust), device=DEVICE,
            now=lambda: NOW,
        )  # fmt: skip
    assert kept(device) == before
    asked = Request(other.folder.as_uri(), "line", other.trust, dry_run=True)
    outcome = update(device.state, asked, device=DEVICE, now=lambda: NOW)
    assert outcome.outcome == "would stage"
    assert kept(device) == before
    assert sorted(path.name for path in device.state.iterdir() if "tuf" in path.name) == ["tuf"]
    assert update(device.state, asked._replace(dry_run=False), device=DEVICE).outcome == "staged"
    assert (device.state / "trust" / "root.json").read_bytes() == other.trust
    assert update(device.state, device=DEVICE).outcome == "pending"


def test_a_dry_run_withdraws_nothing_and_is_no_update_in_the_devices_status(
    device: Device,
) -> None:
    first = device.forge.publish("1.1")
    device.update()
    device.forge.publish("1.0")
    said = (device.state / "last_update.json").read_bytes()
    ask = Request(device.source, "line", dry_run=True)
    assert update(device.state, ask, device=DEVICE, now=lambda: NOW).outcome == "would withdraw"
    with pytest.raises(UpdateError):
        update(device.state, ask._replace(source="file:///nowhere"), device=DEVICE)
    pending = Slots(device.state).pending()
    assert pending is not None
    assert pending.sha256 == first.sha256
    assert (device.state / "last_update.json").read_bytes() == said


def test_keys_change_by_the_old_root_and_the_stolen_one_counts_no_more(device: Device) -> None:
    forge, stolen = device.forge, device.forge.keys.targets
    new = Keys.make().targets
    forge.root.version = 2
    forge.root.revoke_key(stolen.public_key.keyid, "targets")
    forge.root.add_key(new.public_key, "targets")
    forge.write(forge.root, forge.keys.root[:2])
    forge.publish("1.1")
    device.refuses("not signed by those whom this device trusts")
    forge.sign(targets_by=new)
    assert device.update().outcome == "staged"


def test_what_must_soon_be_signed_again_is_told(device: Device) -> None:
    outcome = device.update()
    assert outcome.expiring(NOW) == ""
    late = device.forge.root.expires - EXPIRES_SOON + DAY
    assert outcome.expiring(late).startswith("root on ")


# --- attacks


def test_an_old_repository_is_refused(device: Device, tmp_path: Path) -> None:
    old = device.forge.copy(tmp_path / "old")
    device.forge.publish("1.1")
    device.update()
    device.serve(old)
    device.refuses("older than what this device has seen")


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_old_metadata_mixed_with_new_is_refused(device: Device, role: str) -> None:
    metadata = device.forge.folder / "metadata"
    old = (metadata / f"1.{role}.json").read_bytes()
    device.forge.publish("1.1")
    (metadata / f"2.{role}.json").write_bytes(old)
    device.refuses("older than what this device has seen, or mixed")


def test_a_frozen_repository_is_refused_when_it_expires(device: Device) -> None:
    device.forge.publish("1.1")
    device.refuses("out of date: timestamp expired", NOW + 31 * DAY)


def test_metadata_that_expired_by_the_true_clock_is_refused(device: Device) -> None:
    device.forge.timestamp.expires = NOW - DAY
    device.forge.publish("1.1")
    device.refuses("out of date: timestamp.json is expired")


def test_a_frozen_repository_is_refused_at_the_first_start(device: Device, tmp_path: Path) -> None:
    device.forge.timestamp.expires = NOW - DAY
    device.forge.sign_online()
    fresh = device._replace(state=tmp_path / "fresh")
    fresh.refuses("out of date: timestamp.json is expired", provision=True)


def test_whoever_steals_the_online_key_cannot_offer_a_bundle(device: Device) -> None:
    forge, thief = device.forge, Keys.make()
    forge.publish("1.1")
    forge.sign(targets_by=thief.targets)
    device.refuses("not signed by those whom this device trusts")
    forge.write(forge.targets, [forge.keys.online])
    device.refuses("not signed by those whom this device trusts")


def test_a_root_with_one_signature_of_two_is_refused(device: Device) -> None:
    forge = device.forge
    forge.root.version = 2
    forge.root.add_key(Keys.make().targets.public_key, "targets")
    forge.write(forge.root, forge.keys.root[:1])
    device.refuses("not signed by those whom this device trusts")


def test_an_attacker_with_keys_of_his_own_is_refused(device: Device, tmp_path: Path) -> None:
    other = Forge(tmp_path / "other")
    other.publish("2.0")
    device.serve(other.folder)
    device.refuses("not signed by those whom this device trusts")


def test_edited_targets_are_refused(device: Device) -> None:
    device.forge.publish("1.1")
    file = device.forge.folder / "metadata" / "2.targets.json"
    file.write_bytes(file.read_bytes().replace(b'"length":', b'"length":1'))
    device.refuses("not signed by those whom this device trusts")


def bundle_file(device: Device, version: str) -> Path:
    [file] = (device.forge.folder / "targets/bundles").glob(f"*-{version}.zip")
    return file


def test_a_flipped_byte_is_refused(device: Device) -> None:
    device.forge.publish("1.1")
    file = bundle_file(device, "1.1")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    device.refuses("not what was signed")
    assert not list((device.state / "downloads").iterdir())


@pytest.mark.parametrize("change", [-1, 1])
def test_a_bundle_of_another_length_is_refused_before_a_byte_is_written(
    device: Device, change: int
) -> None:
    offer = device.forge.publish("1.1")
    file = bundle_file(device, "1.1")
    file.write_bytes((file.read_bytes() + b"x")[: offer.size + change])
    device.refuses(f"expected {offer.size:,} bytes, the source has {offer.size + change:,}")
    assert (device.state / "downloads" / f"{offer.sha256}.part").stat().st_size == 0


def endless(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(1 << 16))


@pytest.mark.parametrize("place", ["bundles", "timestamp", "2.root", "2.targets"])
def test_endless_data_is_stopped_at_the_signed_length(http: Device, place: str) -> None:
    offer = http.forge.publish("1.1")
    http.server.lies[place] = endless
    http.refuses("the source sends more")
    part = http.state / "downloads" / f"{offer.sha256}.part"
    assert not part.exists() or part.stat().st_size <= offer.size


@pytest.mark.parametrize("place", ["timestamp.json", "2.targets.json"])
def test_endless_metadata_on_a_stick_is_stopped(http: Device, place: str) -> None:
    http.forge.publish("1.1")
    with (http.forge.folder / "metadata" / place).open("ab") as file:
        file.truncate(1 << 40)  # sparse: it costs nobody a byte
    http.refuses("the source sends more", source=http.forge.folder.as_uri())


def portal(handler: Handler) -> None:
    handler.answer(200, b"<html><title>Welcome to the guest network</title></html>")


def test_a_captive_portal_is_refused(http: Device) -> None:
    http.forge.publish("1.1")
    http.server.lies["/"] = portal
    http.refuses("a captive portal")
    http.server.lies = {"bundles": portal}
    http.refuses("expected .* bytes, the source has 56")
    http.server.lies.clear()
    assert http.update().outcome == "staged"


@pytest.mark.parametrize("place", ["timestamp.json", "2.targets.json", "2.snapshot.json"])
@pytest.mark.parametrize("damage", ["portal", "cut", "empty"])
def test_damaged_metadata_is_refused(device: Device, place: str, damage: str) -> None:
    device.forge.publish("1.1")
    file = device.forge.folder / "metadata" / place
    page = {"portal": b"<html>", "cut": file.read_bytes()[:-9], "empty": b""}[damage]
    file.write_bytes(page)
    device.refuses("expected signed metadata, got something else")


@pytest.mark.parametrize("place", ["timestamp.json", "2.targets", "channels/", "bundles/"])
@pytest.mark.parametrize("status", [404, 500, 503])
def test_what_a_server_cannot_give_is_told(http: Device, place: str, status: int) -> None:
    http.forge.publish("1.1")
    http.server.lies[place] = lambda handler: handler.answer(status, b"sorry")
    http.refuses(f"the server answers {status}")


def test_a_server_that_fails_at_the_root_is_not_taken_for_up_to_date(http: Device) -> None:
    http.server.lies["2.root"] = lambda handler: handler.answer(500, b"")
    http.refuses("the server answers 500")


def test_an_empty_stick_is_told_and_so_is_a_pipe_on_one(http: Device, tmp_path: Path) -> None:
    stick = tmp_path / "stick"
    http.refuses("timestamp.json: no such file", source=stick.as_uri())
    (stick / "metadata").mkdir(parents=True)
    os.mkfifo(stick / "metadata" / "timestamp.json")
    http.refuses("expected a plain file", source=stick.as_uri())


def test_no_server_and_no_such_host_are_told(http: Device) -> None:
    with Server(http.forge.folder) as server:
        gone = server.url
    http.refuses("no connection", source=gone)


def test_a_channel_and_a_bundle_that_are_not_there_are_told(device: Device) -> None:
    with pytest.raises(UpdateError, match="has no channel 'lime'"):
        update(device.state, Request(device.source, "lime"), device=DEVICE)
    device.forge.publish("1.1", sha256="0" * 64)
    device.refuses("which the repository does not have")
    device.forge.publish("1.2", path="bundles/tiny-1.0.zip")
    device.refuses("which the repository does not have")


def test_a_channel_that_lies_about_its_bundle_is_refused(device: Device) -> None:
    device.forge.publish("1.1", data=tiny_bundle("1.2"))
    with pytest.raises(UpdateError, match=r"the channel says tiny 1\.1, the bundle tiny 1\.2"):
        device.update()
    assert Slots(device.state).pending() is None


def test_what_is_signed_and_no_bundle_is_refused(device: Device) -> None:
    device.forge.publish("1.1", data=b"PK no bundle at all")
    device.refuses("damaged zip")


# --- lost state, lost time


def test_a_lost_state_does_not_make_an_old_repository_new(device: Device, tmp_path: Path) -> None:
    old = device.forge.copy(tmp_path / "old")
    device.forge.publish("1.1")
    device.update()
    shutil.rmtree(device.state)
    device.serve(old)
    device.refuses("provision it")
    device.refuses("expected targets metadata 2 or newer, got 1", provision=True)


def test_a_lost_second_copy_is_restored_and_two_damaged_ones_are_told(device: Device) -> None:
    device.update()
    second = second_copy(device.state)
    kept = second.read_bytes()
    second.unlink()
    device.update()
    assert second.read_bytes() == kept
    second.write_bytes(bytes(9))
    device.update()
    assert second.read_bytes() == kept
    for path in Floors(device.state).paths:
        path.write_bytes(bytes(9))
    device.refuses("damaged, so that an old update could not be told from a new one")


@pytest.mark.parametrize("asked_again", [True, False])
def test_a_lost_state_does_not_make_an_old_version_new(device: Device, asked_again: bool) -> None:
    device.forge.publish("1.1")
    device.update()
    Slots(device.state).begin_try()
    Slots(device.state).commit()
    if asked_again:
        device.update()
    shutil.rmtree(device.state)
    device.forge.publish("1.0")
    device.refuses("expected tiny 1.1 or newer", provision=True)


def year(number: int) -> datetime.datetime:
    return datetime.datetime(number, 1, 1, tzinfo=datetime.timezone.utc)


@pytest.mark.parametrize("clock", [1970, 2020])
def test_a_clock_that_is_behind_stops_updates_by_network(http: Device, clock: int) -> None:
    http.forge.publish("1.1")
    http.refuses("set the clock, or update from a stick", year(clock))
    assert not http.server.log


@pytest.mark.parametrize("clock", [1970, 2020])
def test_a_clock_that_is_behind_takes_only_a_higher_version_from_a_stick(
    http: Device, clock: int
) -> None:
    stick = http._replace(source=http.forge.folder.as_uri())
    other = tiny_bundle("1.0", padding=1)
    http.forge.publish("1.0", data=other, allow_lower=True)
    stick.refuses("only a version above 1.0 is taken, got 1.0", year(clock))
    http.forge.publish("1.1")
    assert stick.update(year(clock)).outcome == "staged"


def test_expired_metadata_on_a_stick_is_old_whatever_the_clock_says(http: Device) -> None:
    """By the time at which all was well before."""
    stick = http._replace(source=http.forge.folder.as_uri())
    http.update(NOW + 20 * DAY)
    http.forge.snapshot.expires = NOW + 10 * DAY
    http.forge.publish("1.1")
    stick.refuses("out of date: snapshot expired", year(1970))


def test_a_clock_that_is_ahead_stops_updates_and_is_not_remembered(device: Device) -> None:
    device.forge.publish("1.1")
    device.refuses("the clock of this device says 2040", year(2040))
    assert device.update().outcome == "staged"


def test_a_clock_that_was_set_back_a_little_is_no_reason_to_refuse(device: Device) -> None:
    device.forge.publish("1.1")
    assert device.update(NOW - DAY / 2).outcome == "staged"


def test_a_signed_date_moves_a_clock_that_never_was_right(http: Device, tmp_path: Path) -> None:
    """A device without a battery, provisioned long after this fieldfit was made."""
    stick = http._replace(source=http.forge.folder.as_uri(), state=tmp_path / "fresh")
    later = max(NOW, RELEASED) + 9 * DAY
    http.forge.publish("1.1", published=later)
    assert stick.update(year(1970), provision=True).outcome == "staged"
    assert Floors(stick.state).read().time == pytest.approx(later.timestamp(), abs=3600)


def test_a_date_beyond_what_expires_does_not_stop_the_device_for_ever(device: Device) -> None:
    device.forge.publish("1.1", published=year(2100))
    device.refuses("out of date|set the clock")
    assert Floors(device.state).read().time <= device.forge.timestamp.expires.timestamp()


# --- interruptions


def cut_after(count: int) -> object:
    def lie(handler: Handler) -> None:
        data = (handler.server.folder / handler.path.lstrip("/")).read_bytes()
        handler.answer(200, data, cut=count)

    return lie


def big(device: Device) -> bytes:
    return tiny_bundle("1.1", padding=300_000)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_download_goes_on_where_it_ended(http: Device, ranges: bool) -> None:
    data = big(http)
    http.forge.publish("1.1", data=data)
    http.server.ranges = ranges
    http.server.lies["bundles"] = cut_after(200_000)  # type: ignore[assignment]
    http.refuses("cut")
    [part] = (http.state / "downloads").iterdir()
    assert part.read_bytes() == data[:200_000]
    http.server.lies.clear()
    http.server.log.clear()
    assert http.update().outcome == "staged"
    [served] = [served for served in http.server.log if "bundles" in served.path]
    expected = (200_000, len(data) - 200_000) if ranges else (0, len(data))
    assert (served.start, served.sent) == expected


def test_a_cut_that_leaves_damage_costs_one_more_download(http: Device) -> None:
    """As a power cut does, which can leave zeros where bytes were."""
    data = big(http)
    offer = http.forge.publish("1.1", data=data)
    part = http.state / "downloads" / f"{offer.sha256}.part"
    part.parent.mkdir(exist_ok=True)
    part.write_bytes(bytes(1000))
    assert http.update().outcome == "staged"
    served = [served for served in http.server.log if "bundles" in served.path]
    assert [(s.start, s.sent) for s in served] == [(1000, len(data) - 1000), (0, len(data))]


def test_a_download_that_was_done_already_is_not_done_again(device: Device) -> None:
    data = big(device)
    offer = device.forge.publish("1.1", data=data)
    part = device.state / "downloads" / f"{offer.sha256}.part"
    part.parent.mkdir(exist_ok=True)
    part.write_bytes(data)
    (part.parent / "0.part").write_bytes(bytes(9))
    assert device.update().outcome == "staged"
    assert not list(part.parent.iterdir())
    assert not [served for served in device.server.log if "bundles" in served.path]


def test_a_pulled_stick_is_told(http: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    http.forge.publish("1.1", data=big(http))
    read = os.read

    def worn(descriptor: int, limit: int) -> bytes:
        data = read(descriptor, limit)
        if data.startswith(b"PK"):
            raise OSError(5, "Input/output error")
        return data

    monkeypatch.setattr(os, "read", worn)
    http.refuses("cannot be read: Input/output error", source=http.forge.folder.as_uri())


def test_a_full_disk_says_what_it_needs_and_recovers(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.forge.publish("1.1")
    usage = shutil.disk_usage(device.state)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: usage._replace(free=9))
        device.refuses(r"no room: expected [\d,]+ bytes, got 9; make room")
    assert device.update().outcome == "staged"


def test_one_update_at_a_time(device: Device) -> None:
    lock = Lock.attempt(device.state / "update.lock")
    assert lock is not None
    device.refuses("another update is at work on this device")
    lock.close()
    assert device.update().outcome == "nothing new"


def test_of_two_updates_at_once_one_is_told_to_come_again(http: Device) -> None:
    http.forge.publish("1.1")
    reached, go = threading.Event(), threading.Event()

    def slow(handler: Handler) -> None:
        reached.set()
        go.wait()
        handler.answer(404, b"")

    http.server.lies["2.root"] = slow
    outcomes: list[Outcome] = []
    first = threading.Thread(target=lambda: outcomes.append(http.update()))
    first.start()
    reached.wait()
    with pytest.raises(UpdateError, match="another update is at work"):
        http.update()
    go.set()
    first.join()
    assert [outcome.outcome for outcome in outcomes] == ["staged"]


def test_metadata_that_a_power_cut_emptied_heals_itself(device: Device) -> None:
    for file in (device.state / "tuf").rglob("*.json"):
        file.write_bytes(bytes(file.stat().st_size))
    (device.state / "channel.json").write_bytes(b"")
    device.forge.publish("1.1")
    assert device.update().outcome == "staged"
