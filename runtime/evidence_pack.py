"""Evidence from the line: what is known of each image, and the pack that carries them away.

A pack is one flat zip: ``pack.json`` with a record for each image, the images as they were kept,
and ``labels.csv`` to fill in. It comes from a device that may be lost or lied to, so that a reader
caps every size before it takes memory, wants exactly the files that the records name, and believes
no byte before its digest. It does not know what training makes of it.
"""

import contextlib
import csv
import hashlib
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec

from runtime import atomic
from runtime.errors import DataError

Reason = Literal["flagged", "abstained", "low-margin", "drifted", "sample"]
"""Why an image is worth keeping: a health check flagged it, the score was too low to act on, the
two best classes were close, it came while scores or features drifted, or chance picked it."""

REASONS: tuple[Reason, ...] = get_args(Reason)

CONTENTS, LABELS = "pack.json", "labels.csv"
LABEL_COLUMNS = ("name", "label", "guess", "why")

MAX_IMAGE_BYTES = 64 * 1024 * 1024
MAX_IMAGES = 20_000
MAX_CONTENTS_BYTES = 256 * 1024 * 1024
MAX_PACK_BYTES = 2**32 - 2**20
"""So that a zip needs none of its extensions for large files, and one place tells all sizes."""

_MAX_TEXT = 500
_OVERHEAD = 512
"""Of an image in the zip beside its bytes: two headers with its name, and a line of labels.csv."""
_LEAN = frozenset({".bmp", ".dib", ".pbm", ".pgm", ".pnm", ".ppm", ".tif", ".tiff"})
"""Formats that leave something to compress."""

NAME = re.compile(rf"([0-9]{{8,12}})-({'|'.join(REASONS)})-([0-9a-f]{{16}})(\.[a-z0-9]{{1,8}})")
"""Running number on the device, reason, beginning of the SHA-256, and the format's suffix."""

Text = Annotated[str, msgspec.Meta(max_length=_MAX_TEXT)]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the device knew about one image when it kept it."""

    format: Literal[1] = 1
    image: Annotated[str, msgspec.Meta(pattern=rf"^{NAME.pattern}\Z")]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_IMAGE_BYTES)]
    why: Reason
    """The reason that it was counted under."""
    reasons: tuple[Reason, ...]
    """All that held."""
    time: Text
    """When the frame was taken, ISO 8601 in UTC."""
    source: Text
    frame: Text
    burst: Text
    """Frames of one source within moments of each other have the same; they may show one part."""
    verdict: Text
    said: Text = ""
    """The verdict's own reason."""
    label: Text | None = None
    score: float | None = None
    probabilities: dict[str, float] = {}
    flags: tuple[Text, ...] = ()
    bundle: Text = ""
    version: Text = ""
    bundle_digest: Text = ""
    """Of the manifest of the bundle that answered."""


class Contents(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What ``pack.json`` holds."""

    format: Literal[1] = 1
    device: Text
    """Its random id."""
    device_name: Text
    made: Text
    records: tuple[Record, ...]


def short(text: str) -> str:
    """``text`` as a record may hold it."""
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"


def encode_record(record: Record) -> bytes:
    """``record`` as it lies beside its image."""
    return msgspec.json.encode(record) + b"\n"


def decode_record(data: bytes) -> Record:
    """Raises DataError if ``data`` is no record."""
    try:
        return msgspec.json.decode(data, type=Record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"expected the record of an image, got: {error}") from error


def what_fits(records: Iterable[Record]) -> list[Record]:
    """The first of ``records`` that one pack may hold."""
    chosen: list[Record] = []
    pack = contents = 4096
    for record in records:
        line = len(encode_record(record))
        pack, contents = pack + record.size + line + _OVERHEAD, contents + line
        if pack > MAX_PACK_BYTES or contents > MAX_CONTENTS_BYTES or len(chosen) == MAX_IMAGES:
            break
        chosen.append(record)
    return chosen


Track = Callable[[Iterable[Record]], Iterable[Record]]
"""Wraps the images that are about to be packed, e.g. in a progress bar."""


def write_pack(
    path: Path, contents: Contents, read: Callable[[Record], bytes | None], track: Track = iter
) -> tuple[Record, ...]:
    """Write ``path``, whole or not at all, and return the records of the images that are in it.

    ``read`` gives the bytes of an image, or None where it is gone or damaged: it is left out.
    """
    written = []
    with (
        atomic.replacing_file(path) as temporary,
        zipfile.ZipFile(temporary, "w", allowZip64=False) as archive,
    ):
        for record in track(contents.records):
            data = read(record)
            if data is None:
                continue
            deflate = Path(record.image).suffix in _LEAN
            kind = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(record.image), data, kind)
            written.append(record)
        archive.writestr(zipfile.ZipInfo(LABELS), _labels(written), zipfile.ZIP_DEFLATED)
        left = msgspec.structs.replace(contents, records=tuple(written))
        data = msgspec.json.format(msgspec.json.encode(left), indent=1)
        archive.writestr(zipfile.ZipInfo(CONTENTS), data, zipfile.ZIP_DEFLATED)
    return tuple(written)


def _labels(records: Iterable[Record]) -> bytes:
    """A table to fill in: a line for each image, its label still empty."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(LABEL_COLUMNS)
    table.writerows((r.image, "", r.label or "", r.why) for r in records)
    return text.getvalue().encode()


class Pack:
    """An opened pack: its contents are checked; each image is when it is read."""

    def __init__(self, path: Path, contents: Contents, archive: zipfile.ZipFile) -> None:
        self.path = path
        self.contents = contents
        self._archive = archive

    def read(self, record: Record) -> bytes:
        """The verified bytes of an image. Raises DataError if they are not the record's."""
        with _reading(self.path):
            data = _member(self._archive, record.image, record.size)
        if len(data) != record.size or hashlib.sha256(data).hexdigest() != record.sha256:
            raise DataError(
                f"{self.path}: {record.image} is not as it was packed (its digest differs); copy "
                "the pack again, or collect it again with: fieldfit collect --all"
            )
        return data


@contextlib.contextmanager
def open_pack(path: Path) -> Iterator[Pack]:
    """The pack at ``path``, as long as the block lasts.

    Raises DataError for anything that ``write_pack`` would not have written.
    """
    with _reading(path):
        _check_ends(path)
        archive = zipfile.ZipFile(path)
    with archive:
        _check_members(path, archive.infolist())
        with _reading(path):
            head = _member(archive, CONTENTS, MAX_CONTENTS_BYTES)
        try:
            contents = msgspec.json.decode(head, type=Contents)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DataError(
                f"{path}: {CONTENTS} is damaged or of another version: {error}"
            ) from error
        expected = sorted([CONTENTS, LABELS, *(record.image for record in contents.records)])
        if sorted(archive.namelist()) != expected:
            raise DataError(f"{path}: its images are not those of its records; copy it again")
        yield Pack(path, contents, archive)


def _check_ends(path: Path) -> None:
    """The last bytes say how much memory the list of members will take: look before it is read."""
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        if not _END.size < size <= MAX_PACK_BYTES:
            raise DataError(
                f"{path}: expected a pack of evidence of at most {MAX_PACK_BYTES:,} bytes, got "
                f"{size:,}; fieldfit collect makes one"
            )
        file.seek(max(0, size - _END.size - _LOCATOR_BYTES))
        tail = file.read()
    signature, *_, members, listing, start, comment = _END.unpack(tail[-_END.size :])
    large = tail[:4] == b"PK\x06\x07"  # another list of members, of any size
    if signature != b"PK\x05\x06" or comment or large:
        raise DataError(
            f"{path}: expected a pack of evidence, got no zip, or a part of one; copy it again"
        )
    if members > MAX_IMAGES + 2 or listing > members * _OVERHEAD or start + listing > size:
        raise DataError(f"{path}: expected at most {MAX_IMAGES:,} images, got {members:,}")


_END = struct.Struct("<4s4H2LH")
"""End of central directory record (PKWARE APPNOTE 6.3, 4.3.16)."""
_LOCATOR_BYTES = 20


def _check_members(path: Path, infos: list[zipfile.ZipInfo]) -> None:
    names = {info.filename for info in infos}
    if len(names) != len(infos) or not {CONTENTS, LABELS} <= names:
        raise DataError(f"{path}: expected {CONTENTS}, {LABELS} and images, each once")
    for info in infos:
        if info.filename not in (CONTENTS, LABELS) and not NAME.fullmatch(info.filename):
            raise DataError(f"{path}: {info.filename!r} is no name that evidence has")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{path}: {info.filename!r} is compressed in a way that packs are not")


def _member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """At most ``limit + 1`` bytes, whatever the zip says of their number."""
    with archive.open(name) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise DataError(f"{archive.filename}: {name}: more than {limit:,} bytes")
    return data


_DAMAGE = (
    zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, UnicodeDecodeError, zlib.error,
)  # fmt: skip
"""What ``zipfile`` raises for bytes that are no zip of ours."""


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except _DAMAGE as error:
        raise DataError(f"{path}: damaged: {error}; copy the pack again") from error
