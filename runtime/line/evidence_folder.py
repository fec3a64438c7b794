"""The folder in which evidence lies: images with their records, capped, whole after any crash.

    00000017-abstained-3f2a90c18d77e0b1.png              the image as it came
    00000017-abstained-3f2a90c18d77e0b1.png.json         its record
    00000017-abstained-3f2a90c18d77e0b1.png.packed.json  its record, once it was collected

A record is written when its image is safe, and removed before it: an image without one is what a
crash left. Names say all that is needed to start, so that thousands of files cost no reading. One
process adds; others may read and mark what was packed. It does not know why an image is kept.
"""

import contextlib
import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from runtime import atomic
from runtime.errors import DataError
from runtime.evidence_pack import NAME, Reason, Record, decode_record, encode_record

FOLDER = "evidence"
"""Its name below a device's state."""

_NEW, _PACKED = ".json", ".packed.json"
_MAX_RECORD_BYTES = 256 * 1024
_BLOCK = 4096


class Caps(msgspec.Struct, frozen=True, kw_only=True):
    """What evidence may cost."""

    per_minute: int = 4
    """Images of one reason; so that each reason has its own, no other can crowd it out."""
    per_hour: int = 40
    per_day: int = 200
    files: int = 2000
    """Images in the folder; the oldest of the most plentiful reason goes for a new one."""
    bytes: int = 1024**3
    """Of images and records."""
    reserve: int = 1024**3
    """Bytes of the disk that stay free; evidence gives way to whatever else needs room."""


class NoRoomError(Exception):
    """The disk has too little room, even without any evidence on it."""


class Piece(NamedTuple):
    """An image in the folder, as far as names and sizes tell."""

    name: str
    size: int
    """Bytes on disk that it takes, its record included."""
    packed: bool

    @property
    def number(self) -> int:
        """Running number: the order in which images were kept, whatever the clock said."""
        return int(self.name.partition("-")[0])

    @property
    def why(self) -> Reason:
        """The reason that it is counted under."""
        match = NAME.fullmatch(self.name)
        assert match is not None
        return match[2]  # type: ignore[return-value]  # one of the words: the pattern asks for it

    @property
    def digest(self) -> str:
        """The beginning of the image's SHA-256."""
        return self.name.split("-")[-1].partition(".")[0]


class EvidenceFolder:
    """The evidence below ``path``, open for adding. Every method may raise OSError.

    What a crash left behind is removed. ``caps`` hold from the first image that is added.
    """

    def __init__(self, path: Path, caps: Caps) -> None:
        self.path, self._caps = path, caps
        atomic.make_folder(path)
        path.chmod(0o700)  # images of what goes on at the line are not for everybody
        self._pieces = {piece.name: piece for piece in _clean(path)}
        self._next = 1 + max((piece.number for piece in self._pieces.values()), default=0)
        self._digests = Counter(piece.digest for piece in self._pieces.values())
        self.evicted: Counter[Reason] = Counter()
        """What gave way to newer evidence, since this was opened."""

    @property
    def counts(self) -> Mapping[Reason, int]:
        """Images that are here, by reason."""
        return Counter(piece.why for piece in self._pieces.values())

    @property
    def size(self) -> int:
        """Bytes on disk of all of them."""
        return sum(piece.size for piece in self._pieces.values())

    def has(self, data: bytes) -> bool:
        """Whether an image of these bytes is here."""
        return hashlib.sha256(data).hexdigest()[:16] in self._digests

    def ages(self, now: float) -> list[tuple[Reason, float]]:
        """Seconds since each image was kept, ``now`` being seconds since the epoch."""
        return [
            (piece.why, now - (self.path / piece.name).stat().st_mtime)
            for piece in self._pieces.values()
        ]

    def add(
        self, data: bytes, suffix: str, why: Reason, describe: Callable[[str, str], Record]
    ) -> Record:
        """Keep an image: ``describe`` makes its record of a name and a SHA-256.

        Raises NoRoomError where the disk has none, OSError as writing does; nothing of the image
        is then left.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        name = f"{self._next:08}-{why}-{sha256[:16]}{suffix}"
        record = describe(name, sha256)
        encoded = encode_record(record)
        size = _on_disk(len(data)) + _on_disk(len(encoded))
        self._make_room(size)
        try:
            atomic.write_bytes(self.path / name, data)
            atomic.write_bytes(self.path / f"{name}{_NEW}", encoded)
        except BaseException:
            _unlink(self.path, name)
            raise
        self._pieces[name] = Piece(name, size, packed=False)
        self._digests[sha256[:16]] += 1
        self._next += 1
        return record

    def _make_room(self, size: int) -> None:
        free = shutil.disk_usage(self.path).free
        if free + self.size < size + self._caps.reserve or size > self._caps.bytes:
            raise NoRoomError
        if not self._lacks(size):
            return
        self._see_what_was_packed()
        while self._pieces and self._lacks(size):
            self._evict(first_to_go(self._pieces.values()))
        if self._lacks(size):
            raise NoRoomError

    def _lacks(self, size: int) -> bool:
        caps = self._caps
        return (
            len(self._pieces) >= caps.files
            or self.size + size > caps.bytes
            or shutil.disk_usage(self.path).free < size + caps.reserve
        )

    def _see_what_was_packed(self) -> None:
        for name, packed in _records(self.path).items():
            if name in self._pieces:
                self._pieces[name] = self._pieces[name]._replace(packed=packed)

    def _evict(self, piece: Piece) -> None:
        _unlink(self.path, piece.name)
        del self._pieces[piece.name]
        self._digests[piece.digest] -= 1
        self._digests += Counter()  # forgets what is down to nought
        self.evicted[piece.why] += 1


def first_to_go(pieces: Iterable[Piece]) -> Piece:
    """What gives way: the oldest of the most plentiful reason, of what was collected if any was."""
    pieces = list(pieces)
    pieces = [piece for piece in pieces if piece.packed] or pieces
    counts = Counter(piece.why for piece in pieces)
    return min(pieces, key=lambda piece: (-counts[piece.why], piece.number))


def read_records(path: Path) -> tuple[list[tuple[Record, bool]], list[str]]:
    """The records at ``path`` by number, each with whether it was packed; and what is damaged.

    Raises OSError if the folder cannot be read.
    """
    found, damaged = [], []
    for name, packed in sorted(_records(path).items(), key=lambda item: int(item[0].split("-")[0])):
        try:
            record = decode_record(_read_record(path, name))
        except FileNotFoundError:
            continue  # it gave way just now
        except (DataError, OSError) as error:
            damaged.append(f"{name}: {error}")
            continue
        if record.image == name:
            found.append((record, packed))
        else:
            damaged.append(f"{name}: has the record of {record.image}")
    return found, damaged


def _read_record(path: Path, name: str) -> bytes:
    for ending in (_NEW, _PACKED):  # in this order: another process may mark it meanwhile
        with contextlib.suppress(FileNotFoundError), (path / f"{name}{ending}").open("rb") as file:
            return file.read(_MAX_RECORD_BYTES)
    raise FileNotFoundError(name)


def read_image(path: Path, record: Record) -> bytes | None:
    """The image of ``record``; None if it is gone, or not as it was kept."""
    try:
        with (path / record.image).open("rb") as file:
            data = file.read(record.size + 1)
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == record.sha256 else None


def mark_packed(path: Path, records: Iterable[Record]) -> None:
    """Remember that these were packed. Needs no room on the disk. Raises OSError."""
    for record in records:
        # It may have given way meanwhile, or be marked already.
        with contextlib.suppress(FileNotFoundError):
            (path / f"{record.image}{_NEW}").rename(path / f"{record.image}{_PACKED}")


def _records(path: Path) -> dict[str, bool]:
    """Images that have a record, and whether they were packed."""
    found = {}
    for file in path.iterdir():
        name = file.name.removesuffix(_PACKED).removesuffix(_NEW)
        if name != file.name and NAME.fullmatch(name):
            found[name] = file.name.endswith(_PACKED)
    return found


def _clean(path: Path) -> list[Piece]:
    """Remove what a crash left and nothing else; the rest are whole pieces."""
    records = _records(path)
    images = {file.name for file in path.iterdir() if NAME.fullmatch(file.name)}
    for file in path.iterdir():
        if file.name.startswith(".") and _is_ours(file.name[1:]):
            file.unlink(missing_ok=True)
    for name in images ^ records.keys():
        _unlink(path, name)
    return [
        Piece(name, _on_disk((path / name).stat().st_size) + _record_size(path, name), packed)
        for name, packed in records.items()
        if name in images
    ]


def _record_size(path: Path, name: str) -> int:
    """In this order: another process may mark it as packed meanwhile."""
    for ending in (_NEW, _PACKED):
        with contextlib.suppress(FileNotFoundError):
            return _on_disk((path / f"{name}{ending}").stat().st_size)
    return 0


def _is_ours(hidden: str) -> bool:
    """Whether ``runtime.atomic`` would name a temporary file of ours so: NAME.RANDOM."""
    name = hidden.rpartition(".")[0]
    return NAME.fullmatch(name.removesuffix(_NEW)) is not None


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _unlink(path: Path, name: str) -> None:
    """Record first: whatever happens in between, no record is without its image."""
    for left in (f"{name}{_NEW}", f"{name}{_PACKED}", name):
        (path / left).unlink(missing_ok=True)
