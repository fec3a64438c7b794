"""Many devices at once: a folder of their keys and documents becomes one row for each.

    DIR/devices/ID.pub.json   public documents; who can write here decides whom to believe
    DIR/devices/seen.json     the newest document seen of each device, against replays
    DIR/status/ID.json        what devices reported; anybody may write here

The folder is any folder: a share, a USB stick, the target of a copy. Documents from elsewhere
(see fleet_mqtt) are surveyed in the same way. It judges nothing: fleet_health does.
"""

import datetime
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from runtime import atomic
from runtime.delivery.fleet_health import EXPECTED, LEVELS, Health, judge
from runtime.delivery.identity import PublicKey, encode_public, read_public
from runtime.delivery.status_document import MAX_STATUS_BYTES, Known, Status, known_by, read_status
from runtime.errors import FleetError

DEVICES, REPORTS, SEEN = "devices", "status", "seen.json"
MAX_DEVICES = 100_000
_MAX_SEEN_BYTES = 32 * 1024 * 1024


class Row(NamedTuple):
    """One device as it is shown, or one document that nobody may believe."""

    device: str
    """Its id; of a document that is refused the name of its file or topic."""
    name: str
    """What its operator enrolled it as, or it says itself; empty for a refused document."""
    status: Status | None
    """None unless it is signed by the device's enrolled key."""
    health: Health


class Fleet(NamedTuple):
    """All devices, those to look at first in front."""

    rows: tuple[Row, ...]
    seen: dict[str, Known]
    """What to remember against replays."""

    @property
    def documents(self) -> list[Status]:
        """The verified documents, one a device."""
        return [row.status for row in self.rows if row.status]


def survey(
    documents: Iterable[tuple[str, bytes]],
    keys: Mapping[str, PublicKey],
    seen: Mapping[str, Known],
    now: datetime.datetime,
    expected: datetime.timedelta = EXPECTED,
) -> Fleet:
    """Verify and judge ``documents``, names and bytes, and add the enrolled that are silent."""
    known = dict(seen)
    rows: dict[str, Row] = {}
    refused: list[Row] = []
    for name, data in documents:
        try:
            status = read_status(data, keys, known)
        except FleetError as error:
            refused.append(Row(name, "", None, Health("unknown", (str(error),))))
            continue
        known[status.device] = known_by(status, data)
        rows[status.device] = Row(status.device, status.name, status, judge(status, now, expected))
    silent = [
        Row(key.id, key.name, None, Health("unknown", ("no document of it can be believed",)))
        for key in keys.values()
        if key.id not in rows
    ]
    everything = [*rows.values(), *silent, *refused]
    everything.sort(key=lambda row: (LEVELS.index(row.health.level), row.name, row.device))
    return Fleet(tuple(everything), known)


def read_fleet(
    folder: Path,
    now: datetime.datetime,
    *,
    expected: datetime.timedelta = EXPECTED,
    devices: Path | None = None,
) -> Fleet:
    """The devices of a fleet folder; ``devices`` is where their keys are, if elsewhere.

    Raises FleetError if there is no such folder, or a key in it is damaged.
    """
    trusted = devices or folder / DEVICES
    documents = _documents(folder / REPORTS)
    return survey(documents, read_keys(trusted), read_seen(trusted / SEEN), now, expected)


def read_keys(folder: Path) -> dict[str, PublicKey]:
    """The enrolled devices' public documents by id. Raises FleetError if one is damaged."""
    if not folder.is_dir():
        raise FleetError(
            f"{folder}: expected a folder of devices' keys; on each device: "
            "fieldfit fleet enroll --to DIR"
        )
    publics = [read_public(path) for path in _listed(folder, ".pub.json")]
    return {public.id: public for public in publics}


def read_seen(path: Path) -> dict[str, Known]:
    """What was seen before; nothing if there is no such file. FleetError if it is damaged."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_SEEN_BYTES + 1)
        if len(data) > _MAX_SEEN_BYTES:
            raise msgspec.DecodeError("too large")
        return msgspec.json.decode(data, type=dict[str, Known])
    except FileNotFoundError:
        return {}
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise FleetError(
            f"{path}: cannot be read ({error}); remove it to see the fleet again, and mind that "
            "old documents may then be played again"
        ) from error


def write_seen(path: Path, seen: Mapping[str, Known]) -> str:
    """Remember what was seen; why that is not possible, or nothing."""
    try:
        atomic.write_bytes(path, msgspec.json.encode(seen))
    except OSError as error:
        return f"{path}: {error.strerror}: replays will not be noticed"
    return ""


def write_report(folder: Path, device: str, document: bytes) -> Path:
    """Put a device's document into a fleet folder, whole or not at all."""
    path = folder / REPORTS / f"{device}.json"
    atomic.write_bytes(path, document)
    return path


def write_key(folder: Path, public: PublicKey) -> Path:
    """Put a device's public document into a fleet folder.

    Raises FleetError if another key is enrolled there under this id.
    """
    path = folder / DEVICES / f"{public.id}.pub.json"
    if path.exists() and read_public(path).ed25519 != public.ed25519:
        raise FleetError(
            f"{path}: another key is enrolled for this device; if it was renewed on purpose, "
            "remove the old document first"
        )
    atomic.write_bytes(path, encode_public(public))
    return path


def _documents(folder: Path) -> Iterable[tuple[str, bytes]]:
    """Names and bytes; of a file that is too large one byte too many, which is enough to know."""
    if not folder.is_dir():
        return
    for path in _listed(folder, ".json"):
        yield path.name, _head(path)


def _head(path: Path) -> bytes:
    """What cannot be read is an empty document, and refused as such."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_STATUS_BYTES + 1)
    except OSError:
        return b""


def _listed(folder: Path, ending: str) -> list[Path]:
    """Plain files with this ending, sorted. Raises FleetError for more than a fleet has."""
    found = [
        entry
        for entry in folder.iterdir()
        if entry.name.endswith(ending) and entry.name[0] != "." and entry.is_file()
    ]
    if len(found) > MAX_DEVICES:
        raise FleetError(f"{folder}: expected at most {MAX_DEVICES:,} files, got {len(found):,}")
    return sorted(found)
