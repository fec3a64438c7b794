"""The repository on disk: read and verified as a whole, and changed so that devices never notice.

    metadata/N.root.json           who may sign what; 2 of 3 root keys
    metadata/N.targets.json        digests of all bundles and channels; the targets key, offline
    metadata/N.snapshot.json       which targets.json counts; the online key
    metadata/timestamp.json        which snapshot counts; the online key. The only file replaced
    targets/bundles/SHA256.NAME-VERSION.zip
    targets/channels/SHA256.CHANNEL.json

That is TUF with consistent snapshots (https://theupdateframework.github.io/specification/latest/,
sections 3 and 6): whatever a device has begun to read stays as it was. It knows no bundle's
contents and no reason why something is published.
"""

import contextlib
import copy
import datetime
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from export.publish.keys import Ring, fingerprint
from runtime import atomic
from runtime.delivery.channel import MAX_CHANNEL_BYTES, Offer, channel_path, decode
from runtime.errors import ExportError, UpdateError
from runtime.private_files import Lock

METADATA = "metadata"
TARGETS = "targets"
TIMESTAMP = f"{METADATA}/timestamp.json"
LOCK = ".lock"

ROOT_DAYS = 365
TARGETS_DAYS = 365
ONLINE_DAYS = 30
"""Of snapshot and timestamp: for so long at most can devices be kept from what is new."""
USB_DAYS = 180
"""Of snapshot and timestamp, where somebody walks with a stick."""
DAYS_FIELD = "x-fieldfit-days"
"""Field of snapshot: for how many days the online key signs here, until somebody says otherwise."""

_CHUNK = 1 << 20

S = TypeVar("S", Root, Targets, Snapshot, Timestamp)

Progress = Callable[[float, str], None]
"""Told the share that is written, in [0, 1], and the file."""


class File(NamedTuple):
    """A file to write: its path in the repository, and its bytes or where to copy them from."""

    path: str
    content: bytes | Path
    size: int
    sha256: str

    @classmethod
    def of(cls, path: str, data: bytes) -> "File":
        """A file with this content."""
        return cls(path, data, len(data), hashlib.sha256(data).hexdigest())

    @classmethod
    def copy_of(cls, source: Path, path: str) -> "File":
        """A copy of the file ``source``."""
        with source.open("rb") as file:
            return cls(path, source, source.stat().st_size, _sha256(file))


class Repository:
    """The newest metadata in a folder, every signature and digest verified."""

    def __init__(
        self,
        folder: Path,
        roots: Sequence[Metadata[Root]],
        targets: Metadata[Targets],
        snapshot: Metadata[Snapshot],
        timestamp: Metadata[Timestamp],
    ) -> None:
        self.folder = folder
        self.roots = roots
        self.targets = targets
        self.snapshot = snapshot
        self.timestamp = timestamp

    @classmethod
    def read(cls, folder: Path, following: Root | None = None) -> "Repository":
        """Read ``folder``. Expired metadata is read, too: it is there to be renewed.

        ``following`` is a root that is about to be put into force: what it verifies counts, too,
        so that an interrupted change of keys can be made again.

        Raises ExportError if it is no repository, holds foreign files, or is damaged.
        """
        check_files(folder)
        roots = _read_roots(folder)
        judges = [roots[-1].signed, *([following] if following else [])]
        targets = _read_newest(folder, judges, Targets)
        snapshot = _read_newest(folder, judges, Snapshot)
        timestamp = _read(folder, TIMESTAMP, Timestamp, judges)
        if DAYS_FIELD not in snapshot.signed.unrecognized_fields:
            raise ExportError(f"{folder}: was not made by `python -m export keys init`")
        if snapshot.signed.meta["targets.json"].version > targets.signed.version:
            raise ExportError(
                f"{folder}: targets.json of version {snapshot.signed.meta['targets.json'].version} "
                "is missing; restore it from another copy of the repository"
            )
        return cls(folder, roots, targets, snapshot, timestamp)

    @property
    def root(self) -> Root:
        """Who may sign what."""
        return self.roots[-1].signed

    @property
    def days(self) -> int:
        """For how many days snapshot and timestamp are signed here."""
        return int(self.snapshot.signed.unrecognized_fields[DAYS_FIELD])

    @property
    def unfinished(self) -> bool:
        """Whether devices do not see the newest targets: a publication was cut short, or waits."""
        snapshot = self.snapshot.signed
        return (
            snapshot.meta["targets.json"].version != self.targets.signed.version
            or self.timestamp.signed.snapshot_meta.version != snapshot.version
        )

    def offer(self, channel: str) -> Offer | None:
        """What ``channel`` offers, or None if there is no such channel.

        Raises ExportError if its file is missing or damaged, or the name is none.
        """
        try:
            target = self.target(channel_path(channel))
            if target is None:
                return None
            if target.length > MAX_CHANNEL_BYTES:
                raise UpdateError(f"{target.length:,} bytes are too many for a channel")
            return decode(self.check(target).read_bytes())
        except UpdateError as error:
            raise ExportError(f"channel {channel}: {error}") from error

    def channels(self) -> list[str]:
        """The names of all channels, sorted."""
        paths = map(PurePosixPath, self.targets.signed.targets)
        return sorted(path.stem for path in paths if path.parts[0] == "channels")

    def target(self, path: str) -> TargetFile | None:
        """The signed size and digest of a target, or None."""
        return self.targets.signed.targets.get(path)

    def check(self, target: TargetFile) -> Path:
        """Where ``target`` lies. Raises ExportError if it is not there as it was signed."""
        path = self.folder / place(target)
        try:
            with path.open("rb") as file:
                target.verify_length_and_hashes(file)
        except FileNotFoundError:
            raise ExportError(
                f"{path}: missing; restore it from another copy of the repository"
            ) from None
        except RepositoryError as error:
            raise ExportError(
                f"{path}: changed since it was signed ({error}); restore it from another copy"
            ) from error
        return path


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other publishers out of ``folder``. Raises ExportError if one is at work."""
    if not folder.is_dir():
        raise ExportError(
            f"{folder}: expected a repository's folder; `python -m export keys init` makes one"
        )
    lock = Lock.attempt(folder / LOCK)
    if lock is None:
        raise ExportError(
            f"{folder}: another command is writing there; run this one again after it"
        )
    try:
        yield
    finally:
        lock.close()


def target_file(path: str, content: File) -> TargetFile:
    """What is signed about ``content`` as target ``path``."""
    return TargetFile(content.size, {"sha256": content.sha256}, path)


def place(target: TargetFile) -> str:
    """Where a target lies in the repository: its digest is part of its name."""
    return f"{TARGETS}/{target.get_prefixed_paths()[0]}"


def metadata_path(signed: Signed) -> str:
    """Where a metadata file lies in the repository."""
    if isinstance(signed, Timestamp):
        return TIMESTAMP
    return f"{METADATA}/{signed.version}.{signed.type}.json"


def next_targets(
    repository: Repository, added: Mapping[str, File], now: datetime.datetime
) -> Targets:
    """The next version of the targets: those of now, and ``added`` by target path."""
    targets = copy.deepcopy(repository.targets.signed)
    targets.version += 1
    targets.expires = now + datetime.timedelta(days=TARGETS_DAYS)
    targets.targets |= {path: target_file(path, file) for path, file in added.items()}
    return targets


def next_snapshot(
    previous: Snapshot, targets: Targets, days: int, now: datetime.datetime
) -> Snapshot:
    """The snapshot after ``previous``, with ``targets``; valid for ``days``."""
    return Snapshot(
        version=previous.version + 1,
        expires=now + datetime.timedelta(days=days),
        meta={"targets.json": MetaFile(version=targets.version)},
        unrecognized_fields={DAYS_FIELD: days},
    )


def next_timestamp(
    previous: Timestamp, snapshot: Snapshot, days: int, now: datetime.datetime
) -> Timestamp:
    """The timestamp after ``previous``, with ``snapshot``; valid for ``days``."""
    return Timestamp(
        version=previous.version + 1,
        expires=now + datetime.timedelta(days=days),
        snapshot_meta=MetaFile(version=snapshot.version),
    )


def sign(signed: S, root: Root, ring: Ring, *, also: Root | None = None) -> Metadata[S]:
    """Sign with the keys at hand that ``root`` names, and with those of ``also`` for its readers.

    Raises ExportError if those of ``root`` are fewer than it demands.
    """
    metadata = Metadata(signed)
    roots = [root] if also is None else [root, also]
    keyids = {keyid: None for r in roots for keyid in r.roles[signed.type].keyids}
    for signer in ring.signers(keyids):
        metadata.sign(signer, append=True)
    verdict = root.get_verification_result(signed.type, metadata.signed_bytes, metadata.signatures)
    if not verdict:
        lacking = ", ".join(sorted(fingerprint(key) for key in verdict.unsigned))
        raise ExportError(
            f"{signed.type}: {verdict.missing} more signature(s) needed, by key {lacking}; name "
            "the folder that has it with --keys"
        )
    return metadata


def encode(metadata: Metadata[Any]) -> File:
    """The file of signed metadata."""
    return File.of(metadata_path(metadata.signed), metadata.to_bytes(JSONSerializer(compact=True)))


def write(folder: Path, files: Sequence[File], progress: Progress) -> None:
    """Write ``files`` in this order, each whole; what has its name by its content is left alone.

    Raises ExportError if a file to copy is not what it was when it was signed, and OSError.
    """
    sweep(folder)
    total, done = sum(file.size for file in files), 0
    for file in files:
        progress(done / total, Path(file.path).name)
        if not (isinstance(file.content, Path) and _is_there(folder, file)):
            with atomic.replacing_file(folder / file.path) as temporary:
                digest = hashlib.sha256()
                with temporary.open("wb") as out:
                    for chunk in _chunks(file.content):
                        digest.update(chunk)
                        out.write(chunk)
                        progress((done + out.tell()) / total, Path(file.path).name)
                if digest.hexdigest() != file.sha256:
                    raise ExportError(f"{file.path}: its source changed meanwhile; run it again")
        done += file.size


def _is_there(folder: Path, file: File) -> bool:
    try:
        with (folder / file.path).open("rb") as found:
            return _sha256(found) == file.sha256
    except FileNotFoundError:
        return False


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


_FOLDERS = (METADATA, f"{TARGETS}/bundles", f"{TARGETS}/channels")
_OURS = {
    METADATA: re.compile(r"(?:[1-9][0-9]*\.(?:root|targets|snapshot)|timestamp)\.json"),
    f"{TARGETS}/bundles": re.compile(r"[0-9a-f]{64}\..+\.zip"),
    f"{TARGETS}/channels": re.compile(r"[0-9a-f]{64}\..+\.json"),
}


def sweep(folder: Path) -> None:
    """Remove what an interrupted command left half written."""
    for name in _FOLDERS:
        for leftover in (folder / name).glob(".*"):
            leftover.unlink()


def check_files(folder: Path) -> None:
    """Raise ExportError for a file that is not ours: all of ``folder`` is copied to where everybody
    can read it."""
    for path, kind in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if kind == "folder" and name in {METADATA, TARGETS, *_FOLDERS}:
            continue
        parent, _, last = name.rpartition("/")
        if kind == "file" and (name == LOCK or (parent in _FOLDERS and last.startswith("."))):
            continue
        if kind == "file" and parent in _OURS and _OURS[parent].fullmatch(last):
            continue
        raise ExportError(
            f"{path}: does not belong in a repository ({kind}); move it away, because everything "
            "here is copied to where devices and others read it"
        )


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder}: expected a folder, got a file")
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file"
        yield path, kind
        if kind == "folder":
            yield from _walk(path)


def _versions(folder: Path, role: str) -> list[int]:
    """Of the versions of ``role`` on disk, in ascending order."""
    files = (folder / METADATA).glob(f"[1-9]*.{role}.json")
    return sorted(int(file.name.partition(".")[0]) for file in files)


def _read_roots(folder: Path) -> list[Metadata[Root]]:
    """Each verified by the one before it, as a device does."""
    versions = _versions(folder, Root.type)
    if not versions:
        raise ExportError(
            f"{folder}: expected a repository, found no root.json; `python -m export keys init` "
            "makes one"
        )
    roots: list[Metadata[Root]] = []
    for version in range(1, versions[-1] + 1):
        path = f"{METADATA}/{version}.root.json"
        root = _read(folder, path, Root, [roots[-1].signed] if roots else [])
        with _damage(folder / path):
            root.verify_delegate(Root.type, root)
        if root.signed.version != version:
            raise ExportError(f"{folder / path}: holds version {root.signed.version}")
        roots.append(root)
    return roots


def _read_newest(folder: Path, judges: Sequence[Root], kind: type[S]) -> Metadata[S]:
    versions = _versions(folder, kind.type)
    if not versions:
        raise ExportError(
            f"{folder}: has no {kind.type}.json; restore it from another copy of the repository"
        )
    return _read(folder, f"{METADATA}/{versions[-1]}.{kind.type}.json", kind, judges)


def _read(folder: Path, path: str, kind: type[S], judges: Sequence[Root]) -> Metadata[S]:
    with _damage(folder / path):
        metadata: Metadata[Any] = Metadata.from_bytes((folder / path).read_bytes())
        if not isinstance(metadata.signed, kind):
            raise RepositoryError(f"holds {metadata.signed.type}")
        if judges and not any(_verifies(judge, metadata) for judge in judges):
            judges[0].verify_delegate(kind.type, metadata.signed_bytes, metadata.signatures)
    return metadata


def _verifies(judge: Root, metadata: Metadata[Any]) -> bool:
    return bool(
        judge.get_verification_result(
            metadata.signed.type, metadata.signed_bytes, metadata.signatures
        )
    )


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ExportError(
            f"{path}: missing; restore it from another copy of the repository"
        ) from None
    except (RepositoryError, ValueError) as error:
        raise ExportError(
            f"{path}: damaged ({error}); restore it from another copy of the repository"
        ) from error


def ordered(blobs: Iterable[File], *metadata: Metadata[Any]) -> list[File]:
    """The order in which a reader at any moment finds one state or the other, never a mixture.

    What is named comes before what names it: targets, then targets.json, snapshot, timestamp. A
    new root comes last: until then the old one holds for what was signed for both.
    """
    order = (Targets, Snapshot, Timestamp, Root)
    return [
        *blobs,
        *map(encode, sorted(metadata, key=lambda m: order.index(type(m.signed)))),
    ]
