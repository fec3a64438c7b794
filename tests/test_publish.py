"""What is published is what a real TUF client gets, and no interruption shows it anything else."""

import contextlib
import datetime
import io
import json
import os
import pty
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import DownloadHTTPError, RepositoryError
from tuf.api.metadata import Metadata, Timestamp
from tuf.ngclient import FetcherInterface, Updater

from benchmarks.broker import Broker
from export.__main__ import main
from export.publish.channels import publish
from export.publish.keys import PASSPHRASE, Ring, passphrases, read_public
from export.publish.options import now
from export.publish.publication import expiring, renew, why_renew
from export.publish.repository import Repository, write
from runtime.bundle import encode_zip
from runtime.delivery import fleet_mqtt
from runtime.delivery.broker import Address
from runtime.delivery.channel import Offer, channel_path, decode
from runtime.delivery.fleet import write_key, write_report
from runtime.delivery.slots import Slots
from runtime.delivery.status_document import BundleStatus, sign_status
from runtime.delivery.update import Request, update
from runtime.errors import ExportError, FleetError
from runtime.manifest import decode as decode_manifest
from runtime.manifest import encode as encode_manifest
from runtime.private_files import Lock
from tests.signed_devices import healthy, moment, new_identity
from tests.update_repository import Forge, Server, tiny_bundle

ROOT = Path(__file__).resolve().parent.parent
DAY = datetime.timedelta(days=1)


class Folder(FetcherInterface):
    """A client's transport to a repository on a stick."""

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            yield Path(url).read_bytes()
        except FileNotFoundError:
            raise DownloadHTTPError("not there", 404) from None


def fetch(
    repository: str | Path, state: Path, trust: Path, channel: str = "line"
) -> tuple[Offer, bytes]:
    """What python-tuf's own client gets: the channel's offer and the bundle's bytes."""
    (state / "targets").mkdir(parents=True, exist_ok=True)
    client = Updater(
        str(state), f"{repository}/metadata", str(state / "targets"), f"{repository}/targets",
        fetcher=None if isinstance(repository, str) else Folder(), bootstrap=trust.read_bytes(),
    )  # fmt: skip

    def get(path: str) -> bytes:
        target = client.get_targetinfo(path)
        assert target is not None, path
        return Path(client.download_target(target)).read_bytes()

    offer = decode(get(channel_path(channel)))
    return offer, get(offer.path)


class Site(NamedTuple):
    """A publisher's workstation."""

    folder: Path

    @property
    def repo(self) -> Path:
        return self.folder / "repo"

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    @property
    def trust(self) -> Path:
        return self.repo / "metadata" / "1.root.json"

    def bundle(self, version: str, name: str = "tiny") -> Path:
        path = self.folder / f"{name}-{version}.zip"
        path.write_bytes(tiny_bundle(version, name=name))
        return path

    def run(self, verb: str, *words: str | Path, keys: Sequence[str | Path] | None = None) -> int:
        """``python -m export VERB WORDS --repo ... --keys ...``."""
        folders = [self.keys] if keys is None else keys
        options = [word for folder in folders for word in ("--keys", str(folder))]
        return main([*verb.split(), *map(str, words), "--repo", str(self.repo), *options])

    def publish(self, version: str, *words: str, channel: str = "line") -> int:
        return self.run("publish", self.bundle(version), "--channel", channel, *words)

    def get(self, state: str = "device", channel: str = "line") -> Offer:
        offer, data = fetch(self.repo, self.folder / state, self.trust, channel)
        assert data == tiny_bundle(offer.version)
        return offer

    def tree(self) -> dict[str, bytes]:
        files = (path for path in self.repo.rglob("*") if path.is_file())
        return {path.relative_to(self.repo).as_posix(): path.read_bytes() for path in files}

    def stick(self, name: str, *roles: str) -> Path:
        """A folder with only the keys of these roles or names."""
        folder = self.folder / name
        folder.mkdir()
        for path in self.keys.iterdir():
            if any(path.name.startswith(role) for role in roles):
                shutil.copy(path, folder)
        return folder

    def fingerprints(self, role: str) -> list[str]:
        return sorted(path.stem.partition("-")[2] for path in self.keys.glob(f"{role}-*.pub"))


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository without bundles, and its keys."""
    folder = tmp_path_factory.mktemp("founded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PASSPHRASE, "a secret")
        assert Site(folder).run("keys init") == 0
    return folder


@pytest.fixture
def site(founded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv(PASSPHRASE, "a secret")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no test here cuts the power
    monkeypatch.chdir(tmp_path)
    return Site(Path(shutil.copytree(founded, tmp_path / "site")))


Says = Callable[[], str]


@pytest.fixture
def says(capfd: pytest.CaptureFixture[str]) -> Says:
    """What was printed since it was last asked, in one line."""
    return lambda: " ".join("".join(capfd.readouterr()).split())


def test_a_client_gets_what_was_published_over_http_and_from_a_stick(site: Site) -> None:
    assert site.publish("1.0", "--cohort", "10") == 0
    with Server(site.repo) as server:
        offer, data = fetch(server.url, site.folder / "http", site.trust)
    assert (offer.version, offer.percentage, offer.allow_lower) == ("1.0", 10, False)
    assert data == tiny_bundle("1.0")
    assert site.get() == offer


def test_asking_again_costs_two_requests(site: Site) -> None:
    site.publish("1.0")
    with Server(site.repo) as server:
        fetch(server.url, site.folder / "device", site.trust)
        server.log.clear()
        client = Updater(
            str(site.folder / "device"), f"{server.url}/metadata", bootstrap=site.trust.read_bytes()
        )
        client.refresh()
        assert [entry.path for entry in server.log] == [
            "/metadata/2.root.json",
            "/metadata/timestamp.json",
        ]


def test_a_rollout_is_widened_by_saying_it_again(site: Site, says: Says) -> None:
    site.publish("1.0", "--cohort", "10")
    assert site.publish("1.0", "--cohort", "50") == 0
    assert site.get().percentage == 50
    before = site.tree()
    says()
    assert site.publish("1.0", "--cohort", "50") == 0
    assert "offers tiny 1.0" in says()
    assert site.tree() == before


def test_a_version_is_published_once(site: Site, says: Says) -> None:
    site.publish("1.0")
    other = site.folder / "tiny-1.0.zip"
    other.write_bytes(tiny_bundle("1.0", padding=1))
    assert site.run("publish", other, "--channel", "elsewhere") == 1
    assert "was published with other contents" in says()


def test_a_channel_goes_up_only_unless_it_is_rolled_back(site: Site, says: Says) -> None:
    site.publish("1.9")
    site.publish("1.10")
    before = site.tree()
    assert site.publish("1.9") == 1
    assert "python -m export rollback --channel line --to 1.9" in says()
    assert site.tree() == before
    old = site.get()
    assert site.run("rollback", "--channel", "line", "--to", "1.9") == 0
    offer = site.get()
    assert (old.version, offer.version, offer.allow_lower) == ("1.10", "1.9", True)
    assert Repository.read(site.repo).targets.signed.version == 4
    assert site.publish("1.9.5") == 1, "devices that had 1.10 would not take it"
    assert "has offered tiny 1.10, and devices take nothing lower, got 1.9.5; raise" in says()
    assert site.publish("1.11") == 0
    assert (site.get().version, site.get().allow_lower) == ("1.11", False)


def test_a_rollback_goes_to_more_and_more_devices_and_to_another_version(site: Site) -> None:
    for version in ("1.0", "1.1", "2.0"):
        site.publish(version)
    back = ("rollback", "--channel", "line", "--to")
    assert site.run(*back, "1.0", "--cohort", "10") == 0
    assert site.run(*back, "1.0") == 0
    assert (site.get().version, site.get().percentage) == ("1.0", 100)
    assert site.run(*back, "1.1") == 0
    assert (site.get().version, site.get().allow_lower) == ("1.1", True)
    assert site.publish("2.0") == 0, "what was taken back may be offered again"
    assert (site.get().version, site.get().allow_lower) == ("2.0", False)


def test_what_cannot_be_rolled_back_to_is_named(site: Site, says: Says) -> None:
    site.publish("1.0")
    site.publish("2.0")
    assert site.run("rollback", "--channel", "line", "--to", "1.5") == 1
    assert "has no tiny 1.5; it has 1.0, 2.0" in says()
    assert site.run("rollback", "--channel", "line", "--to", "2.0") == 1
    assert "2.0 is not lower" in says()
    assert site.run("rollback", "--channel", "other", "--to", "1.0") == 1
    assert "channels there: line" in says()


def test_a_channel_carries_one_model(site: Site, says: Says) -> None:
    site.publish("1.0")
    assert site.run("publish", site.bundle("2.0", "other"), "--channel", "line") == 1
    assert "carries tiny, got other" in says()


def test_an_unverified_bundle_needs_a_word(site: Site, says: Says) -> None:
    with zipfile.ZipFile(io.BytesIO(tiny_bundle("1.0"))) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    manifest = decode_manifest(files["manifest.json"])
    doubtful = msgspec.structs.replace(manifest.adaptation, verified=False, reason="no labels")
    manifest = msgspec.structs.replace(manifest, adaptation=doubtful)
    path = site.folder / "doubtful.zip"
    path.write_bytes(encode_zip(files | {"manifest.json": encode_manifest(manifest)}))
    before = site.tree()
    assert site.run("publish", path, "--channel", "line") == 1
    assert "UNVERIFIED: no labels; label more field images, or say --allow-unverified" in says()
    assert site.tree() == before
    assert site.run("publish", path, "--channel", "line", "--allow-unverified") == 0


def test_a_damaged_bundle_is_refused(site: Site, says: Says) -> None:
    path = site.bundle("1.0")
    path.write_bytes(path.read_bytes()[:-1])
    assert site.run("publish", path, "--channel", "line") == 1
    assert "damaged zip" in says()


@pytest.mark.parametrize("channel", ["../line", "line/1", "", ".hidden"])
def test_a_channel_has_a_plain_name(site: Site, says: Says, channel: str) -> None:
    before = site.tree()
    assert site.publish("1.0", channel=channel) == 1
    assert "expected a channel's name" in says()
    assert site.tree() == before


def test_a_mistyped_channel_is_a_new_one_and_that_is_said(site: Site, says: Says) -> None:
    site.publish("1.0", channel="line1")
    site.publish("1.0", channel="line2")
    says()
    assert site.publish("1.1", "--dry-run", channel="lin1") == 0
    assert "channel lin1: is new; so far there are line1, line2" in says()
    assert site.publish("1.1", channel="line1") == 0
    assert "is new" not in says()


def test_promotion_signs_the_same_digest_again(site: Site, says: Says) -> None:
    site.publish("1.0", channel="canary")
    assert site.run("promote", "--from", "canary", "--to", "line", "--cohort", "20") == 0
    canary, line = site.get(channel="canary"), site.get(channel="line")
    assert (line.sha256, line.percentage) == (canary.sha256, 20)
    assert len(list((site.repo / "targets" / "bundles").iterdir())) == 1
    site.publish("2.0")
    assert site.run("promote", "--from", "canary", "--to", "line") == 1
    assert "has offered tiny 2.0" in says()


def test_promotion_waits_for_healthy_canaries(site: Site, says: Says) -> None:
    site.publish("1.0", channel="canary")
    offer = site.get(channel="canary")
    fleet, device = site.folder / "fleet", new_identity(site.folder / "state")
    write_key(fleet, device.public)
    status = healthy(
        device.device.id,
        moment=moment(seen=now() - datetime.timedelta(minutes=1)),
        bundle=BundleStatus(name="tiny", version="1.0", sha256=offer.sha256, since=now() - 2 * DAY),
        update=None,
    )
    write_report(fleet, device.device.id, sign_status(status, device))
    words = ("--from", "canary", "--to", "line", "--for", "24h", "--require-healthy")
    assert site.run("promote", *words, "2", "--fleet", fleet) == 1
    assert "not promoted: 1 of 2 devices have run it, healthy, for 24 h" in says()
    assert site.run("promote", *words, "1") == 1
    assert "expected --fleet DIR" in says()
    assert site.run("promote", *words, "1", "--fleet", "mqtt://127.0.0.1:1/x") == 1
    assert "whose signature is whose? add --devices" in says()
    assert site.run("promote", *words, "1", "--fleet", fleet) == 0
    assert site.get().sha256 == offer.sha256


def test_promotion_reads_canaries_from_a_broker(site: Site) -> None:
    pytest.importorskip("paho.mqtt.client", reason="no paho-mqtt: pip install 'fieldfit[mqtt]'")
    try:
        broker = Broker(site.folder / "broker")
    except FleetError as error:
        pytest.skip(str(error))
    site.publish("1.0", channel="canary")
    fleet, device = site.folder / "fleet", new_identity(site.folder / "state")
    write_key(fleet, device.public)
    bundle = BundleStatus(
        name="tiny", version="1.0", sha256=site.get(channel="canary").sha256, since=now() - 2 * DAY
    )
    status = healthy(device.device.id, moment=moment(seen=now()), bundle=bundle, update=None)
    with broker:
        place = f"{broker.url}/plant/status"
        fleet_mqtt.publish(Address.parse(place), device.device.id, sign_status(status, device))
        words = ("--from", "canary", "--to", "line", "--require-healthy", "1", "--fleet", place)
        assert site.run("promote", *words, "--devices", fleet / "devices") == 0
    assert site.get().sha256 == bundle.sha256


def test_a_dry_run_says_what_would_change_and_changes_nothing(
    site: Site, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.publish("1.0")
    monkeypatch.delenv(PASSPHRASE)
    before = site.tree()
    says()
    words = (site.bundle("2.0"), "--channel", "line", "--dry-run")
    assert site.run("publish", *words, keys=[]) == 0
    said = says()
    assert "channel line: tiny 1.0" in said
    assert "-> tiny 2.0" in said
    assert site.tree() == before
    monkeypatch.setenv(PASSPHRASE, "a secret")
    site.publish("2.0")
    for name, data in site.tree().items():
        if before.get(name) != data and "channels/" not in name:  # its digest has the time in it
            assert f"would write {name}" in said


def test_without_the_online_key_it_is_signed_and_waits(site: Site, says: Says) -> None:
    offline, online = site.stick("offline", "targets"), site.stick("online", "online")
    site.publish("1.0")
    words = (site.bundle("2.0"), "--channel", "line")
    assert site.run("publish", *words, keys=[offline]) == 0
    assert "next: python -m export refresh" in says()
    assert site.get().version == "1.0"
    assert site.run("refresh", keys=[online]) == 0
    assert "newer targets wait" in says()
    assert site.get().version == "2.0"


def test_refresh_renews_with_the_online_key_alone_and_only_when_due(site: Site, says: Says) -> None:
    site.publish("1.0")
    before = site.tree()
    assert site.run("refresh", keys=[site.stick("online", "online")]) == 0
    assert "nothing to renew" in says()
    assert site.tree() == before
    repository = Repository.read(site.repo)
    later = repository.timestamp.signed.expires - 13.5 * DAY
    assert why_renew(repository, 30, later - 2 * DAY) is None
    assert why_renew(repository, 30, later) == "13 days left"
    assert why_renew(repository, 30, later + 30 * DAY) == "expired"
    held = Ring([site.folder / "online"], passphrases(None))
    write(site.repo, renew(repository, held, repository.days, later), lambda share, name: None)
    assert Repository.read(site.repo).timestamp.signed.expires == later + 30 * DAY
    assert site.get().version == "1.0"


def test_days_for_sticks_are_remembered(site: Site) -> None:
    site.publish("1.0", "--usb")
    site.publish("2.0")
    left = Repository.read(site.repo).snapshot.signed.expires - now()
    assert 179 * DAY < left <= 180 * DAY
    assert site.run("refresh", "--days", "7") == 0
    assert Repository.read(site.repo).days == 7


def test_what_offline_keys_signed_is_called_for_in_time(site: Site) -> None:
    site.publish("1.0")
    repository = Repository.read(site.repo)
    assert expiring(repository, now() + 300 * DAY) == []
    first, second = expiring(repository, now() + 340 * DAY)
    assert first.startswith("root expires on ")
    assert "refresh --targets" in second
    assert site.run("refresh", "--targets") == 0
    assert Repository.read(site.repo).targets.signed.version == 3


def test_keys_are_encrypted_and_private(site: Site, says: Says) -> None:
    secrets = sorted(site.keys.glob("*.pem"))
    assert len(secrets) == 5
    for path in secrets:
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")


def _typed(words: Sequence[str], answers: Sequence[str]) -> int:
    """The exit code of a command at a terminal of its own, with each passphrase asked for."""
    child, terminal = pty.fork()
    if child == 0:
        sys.stdin = os.fdopen(0)
        os._exit(main(list(words)))
    for answer in answers:
        asked = b""
        while not asked.endswith(b": "):
            asked += os.read(terminal, 1)
        os.write(terminal, answer.encode() + b"\n")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(terminal)
    return code


def test_a_passphrase_is_asked_for_twice_for_a_new_key(
    site: Site, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PASSPHRASE)
    words = ["keys", "new", "--role", "online", "--keys", str(site.folder / "new")]
    assert _typed(words, ["one", "other"]) == 1
    assert not (site.folder / "new").exists()
    assert _typed(words, ["one", "one"]) == 0
    (public,) = (site.folder / "new").glob("*.pub")
    key = read_public(public).keyid
    for secret, opens in (("one", True), ("other", False)):
        monkeypatch.setenv(PASSPHRASE, secret)
        ring = Ring([site.folder / "new"], passphrases(None))
        with contextlib.nullcontext() if opens else pytest.raises(ExportError, match="wrong pass"):
            assert len(ring.signers([key])) == 1


def test_keys_show_names_keys_thresholds_and_days(site: Site, says: Says) -> None:
    assert site.run("keys show", "--json", keys=[]) == 0
    roles = {line["role"]: line for line in json.loads(says())}
    assert roles["root v1"]["threshold"] == "2 of 3"
    assert roles["root v1"]["keys"].split() == site.fingerprints("root")
    assert roles["timestamp v1"]["keys"].split() == site.fingerprints("online")
    assert roles["snapshot v1"]["left"] in ("29 days", "30 days")
    assert site.run("keys show", keys=[]) == 0
    assert "root v1 2 of 3" in says()


def test_the_first_keys_do_not_lie_where_devices_read(tmp_path: Path, says: Says) -> None:
    site = Site(tmp_path)
    assert site.run("keys init", keys=[site.repo / "keys"]) == 1
    assert "is copied to devices" in says()
    assert not site.repo.exists()


def test_a_repository_is_made_once(site: Site, says: Says) -> None:
    before = site.tree()
    assert site.run("keys init") == 1
    assert "is a repository already" in says()
    assert site.tree() == before


def test_a_ceremony_that_was_cut_short_is_held_again(site: Site, tmp_path: Path) -> None:
    """The root is written last: without it nobody trusts what is there."""
    site.trust.unlink()
    assert site.run("keys init", keys=[tmp_path / "other"]) == 0
    words = (site.bundle("1.0"), "--channel", "line")
    assert site.run("publish", *words, keys=[tmp_path / "other"]) == 0
    assert site.get().version == "1.0"


def test_a_repository_of_other_tools_is_named(site: Site, says: Says) -> None:
    shutil.rmtree(site.repo)
    Forge(site.repo).publish("1.0")
    assert site.publish("2.0") == 1
    assert "was not made by `python -m export keys init`" in says()


class Refusal(NamedTuple):
    """A mistake, and what is said of it."""

    spoil: Callable[[Site], None]
    says: str


def _env(value: str) -> Callable[[Site], None]:
    return lambda site: os.environ.__setitem__(PASSPHRASE, value)


def _file(name: str, data: bytes) -> Callable[[Site], None]:
    def spoil(site: Site) -> None:
        (site.folder / name).write_bytes(data)

    return spoil


def _remove(pattern: str) -> Callable[[Site], None]:
    def spoil(site: Site) -> None:
        for path in site.folder.glob(pattern):
            path.unlink()

    return spoil


def _flip(name: str) -> Callable[[Site], None]:
    def spoil(site: Site) -> None:
        path = site.folder / name
        data = bytearray(path.read_bytes())
        data[len(data) * 3 // 4] ^= 1
        path.write_bytes(data)

    return spoil


def _link(site: Site) -> None:
    (site.repo / "targets" / "more").symlink_to(site.keys)


REFUSALS = {
    "wrong passphrase": Refusal(_env("wrong"), "wrong passphrase, or a damaged file"),
    "empty passphrase": Refusal(_env(""), "expected its passphrase, got an empty one"),
    "no passphrase and no terminal": Refusal(
        lambda site: os.environ.__delitem__(PASSPHRASE), "no terminal to ask"
    ),
    "targets key missing": Refusal(
        _remove("keys/targets-*"), "targets: 1 more signature(s) needed, by key "
    ),
    "no keys in the folder": Refusal(_remove("keys/*.pub"), "expected a folder with keys"),
    "damaged key": Refusal(_file("keys/zzz.pub", b"hello"), "expected a public key (PEM)"),
    "a file of somebody else's": Refusal(
        _file("repo/notes.txt", b"hello"), "notes.txt: does not belong in a repository (file)"
    ),
    "a key in the repository": Refusal(
        _file("repo/metadata/root.pem", b"hello"), "root.pem: does not belong in a repository"
    ),
    "a link": Refusal(_link, "does not belong in a repository (link)"),
    "flipped root": Refusal(_flip("repo/metadata/1.root.json"), "1.root.json: damaged"),
    "flipped targets": Refusal(_flip("repo/metadata/2.targets.json"), "2.targets.json: damaged"),
    "flipped snapshot": Refusal(_flip("repo/metadata/2.snapshot.json"), "2.snapshot.json: damaged"),
    "flipped timestamp": Refusal(_flip("repo/metadata/timestamp.json"), "timestamp.json: damaged"),
    "no timestamp": Refusal(_remove("repo/metadata/timestamp.json"), "timestamp.json: missing"),
    "newest targets lost": Refusal(
        _remove("repo/metadata/2.targets.json"), "targets.json of version 2 is missing"
    ),
    "channel file lost": Refusal(_remove("repo/targets/channels/*"), "line.json: missing"),
    "no root": Refusal(
        lambda site: shutil.rmtree(site.repo / "metadata"), "expected a repository, found no root"
    ),
}


@pytest.mark.parametrize("mistake", REFUSALS)
def test_a_mistake_is_one_line_and_changes_nothing(site: Site, says: Says, mistake: str) -> None:
    site.publish("1.0")
    says()
    REFUSALS[mistake].spoil(site)
    before = site.tree()
    assert site.publish("2.0") == 1
    said = says()
    assert REFUSALS[mistake].says in said
    assert "Traceback" not in said
    assert site.tree() == before


def test_a_place_that_is_no_repository_is_named(site: Site, says: Says) -> None:
    shutil.rmtree(site.repo)
    assert site.publish("1.0") == 1
    assert "expected a repository's folder" in says()
    assert not site.repo.exists()
    site.repo.write_bytes(b"hello")
    assert site.publish("1.0") == 1
    assert "expected a repository's folder" in says()


def test_a_missing_passphrase_file_is_named(site: Site, says: Says) -> None:
    assert site.publish("1.0", "--passphrase-file", "nowhere") == 1
    assert "nowhere: no such file" in says()


def test_a_stick_with_only_public_halves_hides_no_key(site: Site) -> None:
    public = site.stick("public", "root", "targets", "online")
    for path in public.glob("*.pem"):
        path.unlink()
    words = (site.bundle("1.0"), "--channel", "line")
    assert site.run("publish", *words, keys=[site.keys, public]) == 0


def test_a_full_disk_leaves_the_old_state_and_one_line(site: Site, says: Says) -> None:
    """The limit on file sizes is the one kind of full disk that needs no privileges."""
    site.publish("1.0")
    path = site.folder / "tiny-2.0.zip"
    path.write_bytes(tiny_bundle("2.0", padding=200_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert site.run("publish", path, "--channel", "line") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in says()
    assert site.get().version == "1.0"
    assert site.run("publish", path, "--channel", "line") == 0


def test_a_bundle_that_changes_meanwhile_is_not_published(site: Site) -> None:
    path = site.bundle("1.0")
    plan = publish(Repository.read(site.repo), path, "line", 100, now())
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    before = site.tree()
    with pytest.raises(ExportError, match="its source changed meanwhile"):
        write(site.repo, plan.files, lambda share, name: None)
    assert site.tree() == before


def test_two_do_not_publish_at_once(site: Site, says: Says) -> None:
    lock = Lock.attempt(site.repo / ".lock")
    assert lock is not None
    try:
        assert site.publish("1.0") == 1
        assert "another command is writing there" in says()
    finally:
        lock.close()
    assert site.publish("1.0") == 0


def test_a_bundle_that_was_changed_in_the_repository_is_not_offered_again(
    site: Site, says: Says
) -> None:
    site.publish("1.0", channel="canary")
    (stored,) = (site.repo / "targets" / "bundles").iterdir()
    stored.write_bytes(stored.read_bytes() + b"x")
    assert site.run("promote", "--from", "canary", "--to", "line") == 1
    assert "changed since it was signed" in says()
    assert site.publish("1.0") == 0, "publishing it again mends it"
    assert site.get().version == "1.0"


def test_root_keys_are_replaced_by_people_apart(site: Site, says: Says) -> None:
    """Two old and two new signatures, each given on a machine without the repository."""
    site.publish("1.0")
    site.get("old device")
    first, second, third = site.fingerprints("root")
    sticks = [site.stick(f"person{i}", f"root-{key}") for i, key in enumerate((first, second), 1)]
    assert main(["keys", "new", "--role", "root", "--keys", str(site.folder / "person4")]) == 0
    (public,) = (site.folder / "person4").glob("*.pub")
    proposal = site.folder / "change"
    words = ("--role", "root", "--revoke", third, "--add", public, "--out", proposal)
    assert site.run("keys rotate", *words, keys=sticks[:1]) == 0
    assert f"root: key {third} is revoked" in says()

    def install() -> int:
        return site.run("keys install", proposal, keys=[])

    before = site.tree()
    assert install() == 1
    assert "1 more of the old root keys must sign" in says()
    assert site.tree() == before
    sign = ["keys", "sign", str(proposal), "--keys"]
    assert main([*sign, str(site.folder / "person4")]) == 0
    assert install() == 1, "one old and two new signatures are too few"
    assert "1 more of the old root keys must sign" in says()
    assert main([*sign, str(site.stick("thief", "online"))]) == 1
    assert "none of the keys at hand is a root key here" in says()
    assert main([*sign, str(sticks[1])]) == 0
    assert "next: python -m export keys install" in says()
    assert install() == 0
    assert Repository.read(site.repo).root.version == 2
    assert site.get("old device").version == "1.0"
    assert site.get("new device").version == "1.0"
    assert install() == 1
    assert "make a new one from this repository" in says()


def _rotate(site: Site, role: str, name: str = "change") -> int:
    """Replace the only key of a role by one in ``new``."""
    words = ("--role", role, "--new-keys", site.folder / "new", "--out", site.folder / name)
    assert site.run("keys rotate", *words, keys=[site.keys]) == 0
    return site.run("keys install", site.folder / name, keys=[site.folder / "new"])


def test_a_stolen_online_key_is_worth_nothing_afterwards(site: Site) -> None:
    site.publish("1.0")
    site.get()
    thief = Ring([site.stick("thief", "online")], passphrases(None))
    assert _rotate(site, "online") == 0
    assert site.get().version == "1.0"
    assert site.get("new device").version == "1.0"
    forged = Repository.read(site.repo).timestamp.signed
    forged.version += 1000
    _forge_timestamp(site, forged, thief)
    with pytest.raises(RepositoryError, match="timestamp was signed by 0/1 keys"):
        site.get()


def test_a_device_that_a_stolen_key_led_far_ahead_comes_back(site: Site) -> None:
    """The fast-forward attack: new keys make devices forget the thief's version numbers."""
    site.publish("1.0")
    thief = Ring([site.stick("thief", "online")], passphrases(None))
    honest = (site.repo / "metadata" / "timestamp.json").read_bytes()
    forged = Repository.read(site.repo).timestamp.signed
    forged.version = 10**6
    _forge_timestamp(site, forged, thief)
    assert site.get().version == "1.0"
    (site.repo / "metadata" / "timestamp.json").write_bytes(honest)
    with pytest.raises(RepositoryError, match="must be >= 1000000"):
        site.get()
    assert _rotate(site, "online") == 0
    assert site.get().version == "1.0"


def _forge_timestamp(site: Site, signed: Timestamp, ring: Ring) -> None:
    metadata = Metadata(signed)
    (signer,) = ring.signers(Repository.read(site.repo).roots[0].signed.roles["timestamp"].keyids)
    metadata.sign(signer)
    metadata.to_file(str(site.repo / "metadata" / "timestamp.json"))


def test_a_stolen_targets_key_is_worth_nothing_afterwards(site: Site, says: Says) -> None:
    site.publish("1.0")
    site.get()
    says()
    words = ("--role", "targets", "--new-keys", site.folder / "new", "--out", site.folder / "out")
    assert site.run("keys rotate", *words) == 0
    keys = [site.folder / "new", site.stick("online", "online")]
    assert site.run("keys install", site.folder / "out", keys=keys) == 0
    assert "channel line: tiny 1.0" in says(), "for people to compare with what they published"
    assert site.get().version == "1.0"
    assert site.publish("2.0") == 1
    assert "targets: 1 more signature(s) needed" in says()
    assert site.run("publish", site.bundle("2.0"), "--channel", "line", keys=keys) == 0
    assert site.get().version == "2.0"


def test_a_proposal_that_was_changed_on_the_way_does_not_count(site: Site, says: Says) -> None:
    stranger = CryptoSigner.generate_ed25519().public_key.keyval["public"]
    words = ("--role", "online", "--new-keys", site.folder / "new", "--out", site.folder / "out")
    assert site.run("keys rotate", *words) == 0
    path = site.folder / "out"
    content = json.loads(path.read_text())
    (keyid,) = content["proposed"]["signed"]["roles"]["timestamp"]["keyids"]
    content["proposed"]["signed"]["keys"][keyid]["keyval"]["public"] = stranger
    path.write_text(json.dumps(content))
    assert site.run("keys install", path) == 1
    assert "2 more of the old root keys must sign" in says()
    path.write_text("{}")
    assert site.run("keys install", path) == 1
    assert "expected a proposal" in says()


def test_a_rotation_names_what_it_needs(site: Site, says: Says) -> None:
    assert site.run("keys rotate", "--role", "root") == 1
    assert f"expected --revoke with one or more of {site.fingerprints('root')[0]}" in says()
    assert site.run("keys rotate", "--role", "root", "--revoke", "ffff", "--new-keys", "x") == 1
    assert "expected the fingerprint of one of its keys" in says()
    assert site.run("keys rotate", "--role", "online") == 1
    assert "1 new key(s) needed" in says()


def test_a_root_is_renewed_with_the_same_keys(site: Site) -> None:
    site.publish("1.0")
    assert site.run("keys renew", "--out", "again") == 0
    assert site.run("keys install", "again", keys=[]) == 0
    first, second = Repository.read(site.repo).roots
    assert first.signed.roles == second.signed.roles
    assert site.get().version == "1.0"


def _without(modules: Sequence[str], *words: str | Path) -> str:
    """What a command says in a process where these modules are not installed, and its code."""
    code = f"""
import sys
for name in {list(modules)}: sys.modules[name] = None
from export.__main__ import main
print(main({[str(word) for word in words]}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return " ".join((done.stdout + done.stderr).split())


def test_publishing_needs_no_torch(site: Site) -> None:
    words = ("publish", site.bundle("1.0"), "--channel", "line", "--repo", site.repo)
    said = _without(("torch", "torchvision", "timm", "onnx"), *words, "--keys", site.keys)
    assert said.startswith("0 channel line: nothing -> tiny 1.0")
    assert site.get().version == "1.0"


def test_without_the_extra_publishing_says_how_to_get_it(site: Site) -> None:
    said = _without(("tuf",), "keys", "show", "--repo", site.repo)
    assert said.startswith("1 export: keys needs more than is installed (")
    assert said.endswith("pip install 'fieldfit[publish]'")


WRITING = ("os.mkdir", "os.rename", "os.remove")


def _interrupted(words: Sequence[str], repo: Path, at: int) -> bool:
    """Run a command in a process that ends, with nothing cleaned up, before its write number
    ``at`` into ``repo``: a file opened for writing, renamed, removed, or a folder made. Whether
    it got that far. Files are opened for writing under a hidden name only."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        left = at

        def count(event: str, values: tuple[object, ...]) -> None:
            nonlocal left
            writes = event in WRITING or (
                event == "open" and isinstance(values[2], int) and values[2] & 3 != os.O_RDONLY
            )
            if writes and str(values[0]).startswith(str(repo)):
                if event == "open" and not Path(str(values[0])).name.startswith("."):
                    os._exit(98)  # a reader could see half of it
                if left == 0:
                    os._exit(99)
                left -= 1

        sys.addaudithook(count)
        os._exit(main(list(words)))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 99)
    return code == 99


def _every_interruption(site: Site, words: Sequence[str]) -> Iterator[int]:
    """Each state that an interruption of the command leaves; the last is that of its end."""
    before = site.folder / "before"
    shutil.copytree(site.repo, before)
    for at in range(1000):
        shutil.rmtree(site.repo)
        shutil.copytree(before, site.repo)
        stopped = _interrupted(words, site.repo, at)
        yield at
        if not stopped:
            return
    raise AssertionError("never ends")


def test_publishing_interrupted_at_any_write_shows_the_old_state_or_the_new(site: Site) -> None:
    site.publish("1.0")
    site.get()
    words = ["publish", str(site.bundle("2.0")), "--channel", "line", "--repo", str(site.repo)]
    words += ["--keys", str(site.keys)]
    seen: list[str] = []
    for at in _every_interruption(site, words):
        shutil.copytree(site.folder / "device", site.folder / f"known{at}")
        offers = {site.get(f"known{at}").version, site.get(f"fresh{at}").version}
        assert len(offers) == 1
        seen += offers
        if at % 5 == 0:
            assert site.publish("2.0") == 0, "the same command again finishes it"
            assert site.get(f"known{at}").version == "2.0"
            assert not list(site.repo.rglob(".*")), "nothing half written is left"
    assert seen == sorted(seen)
    assert set(seen) == {"1.0", "2.0"}
    assert len(seen) > 15


def test_new_keys_interrupted_at_any_write_refuse_no_device(site: Site) -> None:
    """With the old online key at hand, too."""
    site.publish("1.0")
    site.get()
    words = ("--role", "online", "--new-keys", site.folder / "new", "--out", site.folder / "out")
    assert site.run("keys rotate", *words) == 0
    install = ["keys", "install", str(site.folder / "out"), "--repo", str(site.repo)]
    install += ["--keys", str(site.keys), "--keys", str(site.folder / "new")]
    for at in _every_interruption(site, install):
        shutil.copytree(site.folder / "device", site.folder / f"known{at}")
        assert site.get(f"known{at}").version == "1.0"
        assert site.get(f"fresh{at}").version == "1.0"
        assert Repository.read(site.repo)
    assert Repository.read(site.repo).root.version == 2


def test_new_keys_without_the_old_one_can_be_installed_again(site: Site) -> None:
    site.publish("1.0")
    words = ("--role", "online", "--new-keys", site.folder / "new", "--out", site.folder / "out")
    assert site.run("keys rotate", *words) == 0
    install = ["keys", "install", str(site.folder / "out"), "--repo", str(site.repo)]
    install += ["--keys", str(site.folder / "new")]
    for at in _every_interruption(site, install):
        if main(install) == 1:  # it was through already
            assert Repository.read(site.repo).root.version == 2
        assert site.get(f"device{at}").version == "1.0"


def test_a_device_takes_what_is_published_and_what_is_rolled_back(site: Site) -> None:
    """``fieldfit update`` itself, from the publisher's folder."""
    state = site.folder / "state"

    def staged(root: bytes | None = None) -> str:
        request = Request(source=site.repo.as_uri(), channel="line", root=root)
        assert update(state, request, device="0" * 32, now=now).outcome == "staged"
        slots = Slots(state)
        slots.begin_try()
        slots.commit()
        current = slots.current()
        assert current is not None
        return current.version

    site.publish("1.0")
    assert staged(site.trust.read_bytes()) == "1.0"
    site.publish("2.0")
    assert staged() == "2.0"
    site.run("rollback", "--channel", "line", "--to", "1.0")
    assert staged() == "1.0"
