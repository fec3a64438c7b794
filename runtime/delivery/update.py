"""Fetch what a channel offers, believe none of it unproven, and put it on trial in a slot.

Signatures, rollback and expiry of metadata are python-tuf's (https://theupdateframework.io); what
it leaves open is closed by ``floor``. Whatever goes wrong is one sentence, and what runs goes on
running. It knows no engine, and does not judge whether a bundle is any good.
"""

import contextlib
import datetime
import errno
import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec

from runtime import atomic
from runtime.command import MACHINE_ERRORS
from runtime.delivery.channel import (
    MAX_CHANNEL_BYTES,
    Decision,
    Offer,
    channel_path,
    decide,
    decode,
)
from runtime.delivery.floor import Clock, Floor, Floors, Seen, check_metadata, judge_clock, merge
from runtime.delivery.slots import Slot, Slots
from runtime.errors import BundleError, FieldfitError, UpdateError
from runtime.private_files import Lock

if TYPE_CHECKING:
    from tuf.api.metadata import TargetFile
    from tuf.ngclient import Updater

    from runtime.delivery.transport import Transport

SETTINGS, TRUST, CHANNEL = "update.json", "trust/root.json", "channel.json"
METADATA, DOWNLOADS = "tuf", "downloads"
_PROVISIONING = "tuf.new"
"""Where metadata is kept until a root that was handed over is known to fit its source."""

ROLES = ("root", "timestamp", "snapshot", "targets")
EXPIRES_SOON = datetime.timedelta(days=30)
"""Before then somebody must sign again: renewing root needs people, and a fleet depends on it."""

_SPARE_BYTES = 16 * 1024 * 1024
"""Left free by a download: what is inspected meanwhile must find room for its results."""
_MAX_SETTINGS_BYTES = 64 * 1024
_MAX_ROOT_BYTES = 512_000

Progress = Callable[[int, int], object]
"""Told how many bytes of how many there are."""

Now = Callable[[], datetime.datetime]

_log = logging.getLogger(__name__)


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where this device gets its updates; remembered, so that a timer needs no options."""

    source: str
    """Of the repository: https, or file for a stick or a mounted folder."""
    channel: str
    allow_http: bool = False


class Request(NamedTuple):
    """What is asked of one update; what is left out is as it was at provisioning."""

    source: str | None = None
    channel: str | None = None
    root: bytes | None = None
    """Provisioning: the root metadata to trust from now on."""
    allow_http: bool = False
    dry_run: bool = False
    """Fetch metadata and say what would be done; neither slots nor trust are changed."""


AS_PROVISIONED = Request()

Result = Literal[
    "nothing new", "would withdraw", "withdrawn", "pending", "failed here before", "not in cohort",
    "would stage", "staged",
]  # fmt: skip


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What an update came to."""

    outcome: Result
    reason: str
    offer: Offer
    expires: dict[str, datetime.datetime]
    """By role of the signed metadata."""
    requests: int
    received: int
    """Bytes of bodies."""

    def expiring(self, now: datetime.datetime) -> str:
        """Which offline metadata must soon be signed again, in one sentence, or nothing."""
        soon = [
            f"{role} on {self.expires[role]:%Y-%m-%d}"
            for role in ("root", "targets")
            if self.expires[role] < now + EXPIRES_SOON
        ]
        return f"{' and '.join(soon)} expires; sign again before" if soon else ""


class _Role(NamedTuple):
    version: int
    expires: datetime.datetime


def utc_now() -> datetime.datetime:
    """What the clock of this device says."""
    return datetime.datetime.now(datetime.timezone.utc)


def update(
    state: Path,
    request: Request = AS_PROVISIONED,
    *,
    device: str,
    now: Now = utc_now,
    progress: Progress = lambda *_: None,
) -> Outcome:
    """Put the bundle that the channel offers on trial, if it is new, and meant for ``device``.

    ``state`` is the device's state folder, ``device`` its id.

    Raises UpdateError for everything that goes wrong, and nothing else; what runs is untouched.
    """
    try:
        outcome = _locked(state, request, device, now, progress)
    except Exception as error:
        sentence = f"{_sentence(error, now())} (what runs goes on running)"
        if not request.dry_run:
            _record(state, sentence, failed=True)
        raise UpdateError(sentence) from error
    if not request.dry_run:
        _record(state, f"{outcome.outcome}: {outcome.reason}", failed=False)
    return outcome


def read_settings(state: Path) -> Settings | None:
    """What was remembered. Raises UpdateError if it is damaged."""
    path = state / SETTINGS
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_MAX_SETTINGS_BYTES), type=Settings)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UpdateError(f"{path}: {error}; remove it and say --from and --channel") from error


def _locked(state: Path, request: Request, device: str, now: Now, progress: Progress) -> Outcome:
    atomic.make_folder(state)
    lock = Lock.attempt(state / "update.lock")
    if lock is None:
        raise UpdateError("another update is at work on this device; run it again after that")
    with contextlib.closing(lock):
        _sweep(state)
        settings = _settings(state, request)
        trust = request.root or _trust(state)
        with contextlib.closing(_transport(settings)) as transport:
            run = _Run(state, settings, trust, device, transport, now, progress)
            try:
                return run(provision=request.root is not None, dry_run=request.dry_run)
            finally:
                shutil.rmtree(state / _PROVISIONING, ignore_errors=True)


class _Run:
    """One update, after what it is of is settled."""

    def __init__(
        self,
        state: Path,
        settings: Settings,
        trust: bytes,
        device: str,
        transport: "Transport",
        now: Now,
        progress: Progress,
    ) -> None:
        self._state, self._settings, self._trust = state, settings, trust
        self._device, self._transport, self._now = device, transport, now
        self._progress = progress
        self._slots = Slots(state)
        self._floors = Floors(state)
        self._base = settings.source.rstrip("/")
        self._online = urlsplit(settings.source).scheme != "file"

    def __call__(self, *, provision: bool, dry_run: bool) -> Outcome:
        floor = merge(self._floors.read(), Floor(version=self._slots.status().state.floor))
        self._check_clock(judge_clock(self._now(), floor))
        metadata = self._apart() if provision else self._state / METADATA
        updater = self._updater(metadata)
        updater.refresh()
        roles = _roles(metadata)
        trusted = hashlib.sha256(self._trust).hexdigest()
        seen = Seen(roles["root"].version, roles["targets"].version)
        check_metadata(floor, trusted, seen)
        offer = self._offer(updater)
        # Only holders of offline keys can say how late it is, and not later than all expires.
        signed = min(offer.published, *(role.expires for role in roles.values()))
        reached = Floor(time=int(signed.timestamp()), metadata={trusted: seen})
        clock = judge_clock(self._now(), merge(floor, reached))
        stale = _stale(roles, clock)
        if not (stale or clock.wrong):
            reached = merge(reached, Floor(time=int(clock.reference.timestamp())))
        floor = merge(floor, reached)
        if not dry_run:
            floor = self._floors.lift(floor)
        self._check_clock(clock)
        if stale:
            raise UpdateError(_expired(stale, self._now()))
        if not dry_run:
            self._remember(metadata, provision=provision)
        decision = decide(
            offer,
            self._slots.status().state,
            floor=floor.version,
            only_higher=clock.wrong,
            device=self._device,
        )
        return Outcome(
            outcome=(_foretold(decision) if dry_run else self._carry_out(decision, offer, updater)),
            reason=decision.reason,
            offer=offer,
            expires={name: role.expires for name, role in roles.items()},
            requests=self._transport.requests,
            received=self._transport.received,
        )

    def _check_clock(self, clock: Clock) -> None:
        if clock.wrong and self._online:
            raise UpdateError(
                f"the clock of this device says {self._now():%Y-%m-%d %H:%M}, and it has been "
                f"{clock.reference:%Y-%m-%d %H:%M} already, so that old updates would look new; "
                "set the clock, or update from a stick: fieldfit update --from file:///PATH"
            )

    def _apart(self) -> Path:
        """A copy of the metadata, for a root that its source may not fit."""
        known, apart = self._state / METADATA, self._state / _PROVISIONING
        if known.is_dir():
            shutil.copytree(known, apart, symlinks=True)
        return apart

    def _remember(self, metadata: Path, *, provision: bool) -> None:
        """Whom to trust, and where to ask, from now on."""
        if provision:
            atomic.write_bytes(self._state / TRUST, self._trust)
            shutil.rmtree(self._state / METADATA, ignore_errors=True)
            metadata.rename(self._state / METADATA)
        if provision or not (self._state / SETTINGS).exists():
            atomic.write_bytes(self._state / SETTINGS, msgspec.json.encode(self._settings))

    def _updater(self, metadata: Path) -> "Updater":
        from tuf.api.exceptions import RepositoryError
        from tuf.ngclient import Updater

        try:
            return Updater(
                metadata_dir=str(metadata),
                metadata_base_url=f"{self._base}/metadata/",
                fetcher=self._transport,
                bootstrap=self._trust,
            )
        except RepositoryError as error:
            raise UpdateError(
                f"the root to be trusted is none ({error}); get root.json from the publisher again"
            ) from error

    def _offer(self, updater: "Updater") -> Offer:
        path = channel_path(self._settings.channel)
        target = updater.get_targetinfo(path)
        if target is None:
            raise UpdateError(
                f"{self._settings.source} has no channel {self._settings.channel!r}; "
                "check the name with the publisher"
            )
        kept = self._state / CHANNEL
        with contextlib.suppress(OSError, ValueError, _mismatch()):
            data = kept.read_bytes()
            target.verify_length_and_hashes(data)
            return decode(data)
        limit = min(target.length, MAX_CHANNEL_BYTES)
        data = self._transport.download_bytes(self._url(target), limit)
        target.verify_length_and_hashes(data)
        atomic.write_bytes(kept, data)
        return decode(data)

    def _url(self, target: "TargetFile") -> str:
        return f"{self._base}/targets/{target.get_prefixed_paths()[0]}"

    def _carry_out(self, decision: Decision, offer: Offer, updater: "Updater") -> Result:
        if decision.action == "fetch":
            slot = self._staged(offer) or self._fetch(offer, updater)
            self._forget_downloads()
            self._slots.activate(slot.sha256, allow_lower=offer.allow_lower)
            return "staged"
        self._forget_downloads()
        if decision.action == "withdraw":
            self._slots.activate(offer.sha256)
            return "withdrawn"
        return decision.action

    def _staged(self, offer: Offer) -> Slot | None:
        """The slot that holds the bundle already, after a look at every byte of it."""
        folder = self._state / "slots" / offer.sha256 / "bundle"
        if not folder.is_dir():
            return None
        try:
            return self._slots.stage(folder, allow_lower=offer.allow_lower)
        except FieldfitError as error:
            _log.warning("fetching it again: %s", error)
            return None

    def _fetch(self, offer: Offer, updater: "Updater") -> Slot:
        target = updater.get_targetinfo(offer.path)
        if target is None or (target.length, target.hashes.get("sha256")) != (
            offer.size,
            offer.sha256,
        ):
            raise UpdateError(
                f"the channel names {offer.path} of {offer.sha256[:12]}, which the repository does "
                "not have; publish it again"
            )
        part = self._state / DOWNLOADS / f"{offer.sha256}.part"
        self._make_room(part, offer.size)
        self._download(target, part)
        try:
            slot = self._slots.stage(part, allow_lower=offer.allow_lower)
        except BundleError:  # signed, and no better for being kept
            part.unlink()
            raise
        got = slot.release
        if (got.sha256, got.name, got.version) != (offer.sha256, offer.name, offer.version):
            raise UpdateError(
                f"the channel says {offer.name} {offer.version}, the bundle {got}; publish it again"
            )
        return slot

    def _download(self, target: "TargetFile", part: Path) -> None:
        """Make ``part`` the target, every byte of it verified after the last one was written."""
        resumed = part.exists()
        try:
            self._transport.download(
                self._url(target), part, target.length, lambda n: self._progress(n, target.length)
            )
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                part.unlink(missing_ok=True)  # results of inspection come first
                raise UpdateError(_no_room(part.parent, target.length)) from error
            raise
        try:
            with part.open("rb") as file:
                target.verify_length_and_hashes(file)
        except _mismatch() as error:
            part.unlink()
            if resumed:  # a power cut can spoil what lay there
                return self._download(target, part)
            raise UpdateError(
                f"{self._url(target)}: not what was signed; the server or the way to it is damaged"
            ) from error
        return None

    def _make_room(self, part: Path, size: int) -> None:
        """For the rest of the download and for the slot; other downloads are given up."""
        part.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._forget_downloads(but=part)
        needed = size - (part.stat().st_size if part.exists() else 0) + size + _SPARE_BYTES
        if shutil.disk_usage(part.parent).free < needed:
            self._slots.collect()
        if shutil.disk_usage(part.parent).free < needed:
            raise UpdateError(_no_room(part.parent, needed))

    def _forget_downloads(self, but: Path | None = None) -> None:
        for file in (self._state / DOWNLOADS).glob("*"):
            if file != but:
                file.unlink()


def _foretold(decision: Decision) -> Result:
    if decision.action == "fetch":
        return "would stage"
    return "would withdraw" if decision.action == "withdraw" else decision.action


def _sweep(state: Path) -> None:
    """Remove what a crash left half written; only the lock's holder may."""
    from runtime.delivery.device_status import UPDATE

    shutil.rmtree(state / _PROVISIONING, ignore_errors=True)
    for path in (state / name for name in (SETTINGS, TRUST, CHANNEL, UPDATE)):
        for leftover in path.parent.glob(f".{path.name}.*"):
            leftover.unlink()
    for leftover in (state / METADATA).glob("tmp*"):  # python-tuf's
        leftover.unlink()


def _settings(state: Path, request: Request) -> Settings:
    known = read_settings(state)
    source = request.source or (known.source if known else None)
    channel = request.channel or (known.channel if known else None)
    if source is None or channel is None:
        raise UpdateError(
            "this device does not know its channel yet; provision it: fieldfit update --from URL "
            "--channel NAME --root root.json"
        )
    allow_http = request.allow_http or bool(known and known.allow_http)
    return Settings(source=source, channel=channel, allow_http=allow_http)


def _trust(state: Path) -> bytes:
    try:
        with (state / TRUST).open("rb") as file:
            return file.read(_MAX_ROOT_BYTES)
    except FileNotFoundError:
        raise UpdateError(
            f"{state} has no root to trust yet; provision it with --root root.json, which the "
            "publisher hands over by another way than this source"
        ) from None


def _transport(settings: Settings) -> "Transport":
    try:
        from runtime.delivery.transport import Transport
    except ImportError as error:
        raise UpdateError(
            f"updates need python-tuf ({error}); pip install 'fieldfit[fleet]'"
        ) from None
    transport = Transport(allow_http=settings.allow_http)
    transport.check(settings.source)
    return transport


def _roles(folder: Path) -> dict[str, _Role]:
    """What was verified just now, as python-tuf keeps it."""
    from tuf.api.metadata import Metadata

    signed = {role: Metadata.from_file(str(folder / f"{role}.json")).signed for role in ROLES}
    return {role: _Role(data.version, data.expires) for role, data in signed.items()}


def _stale(roles: Mapping[str, _Role], clock: Clock) -> str:
    """What has expired, by the floor, too: python-tuf knows the clock alone."""
    return ", ".join(
        f"{name} expired on {role.expires:%Y-%m-%d}"
        for name, role in roles.items()
        if role.expires <= clock.reference
    )


def _expired(what: str, now: datetime.datetime) -> str:
    return (
        f"the source is out of date: {what}, and the clock of this device says {now:%Y-%m-%d}; "
        "publish again, copy the newest repository, or set the clock"
    )


def _mismatch() -> type[Exception]:
    from tuf.api.exceptions import LengthOrHashMismatchError

    return LengthOrHashMismatchError


def _no_room(folder: Path, needed: int) -> str:
    free = shutil.disk_usage(folder).free
    return f"{folder}: no room: expected {needed:,} bytes, got {free:,}; make room and run it again"


def _sentence(error: Exception, now: datetime.datetime) -> str:
    """What to tell people about ``error``."""
    if isinstance(error, FieldfitError):
        return str(error)
    if isinstance(error, OSError):
        way_out = MACHINE_ERRORS.get(error.errno or 0, "look at the disk")
        return f"{error.filename or 'the disk'}: {error.strerror or error}: {way_out}"
    from tuf.api import exceptions
    from tuf.api.serialization import DeserializationError

    if isinstance(error, exceptions.DownloadHTTPError):
        return f"{error}; is this the repository's address, and was it copied whole?"
    if isinstance(error, exceptions.ExpiredMetadataError):
        return _expired(str(error), now)
    if isinstance(error, exceptions.BadVersionNumberError):
        return (
            f"the source is older than what this device has seen, or mixed ({error}); copy or "
            "publish the newest repository"
        )
    if isinstance(error, exceptions.UnsignedMetadataError):
        return f"not signed by those whom this device trusts ({error}); nothing of it is believed"
    if isinstance(error, DeserializationError):
        return (
            f"expected signed metadata, got something else ({error}); a captive portal, a login "
            "page of a proxy, or a damaged file"
        )
    if isinstance(error, exceptions.RepositoryError):
        return f"not what was signed ({error}); nothing of it is believed"
    return f"{type(error).__name__}: {error}"


def _record(state: Path, sentence: str, *, failed: bool) -> None:
    """For the device's status; a disk that refuses it is no second problem."""
    from runtime.delivery.device_status import record_update

    with contextlib.suppress(OSError, UpdateError):
        time = datetime.datetime.fromtimestamp(Floors(state).read().time, datetime.timezone.utc)
        record_update(state, sentence, failed=failed, time_floor=time)
