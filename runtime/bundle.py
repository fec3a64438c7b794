"""Open a bundle, and refuse it with the reason unless every byte is as its manifest says.

A bundle is a flat folder, or one stored (uncompressed) zip of it. No byte of a model is parsed
before all digests match: no pickle, no links, no paths, sizes capped before memory is taken.
Who wrote the bundle is a question for signatures, not for this module.
"""

import contextlib
import hashlib
import io
import os
import stat
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import BundleError
from runtime.manifest import MAX_FILES, MAX_MANIFEST_BYTES, FileEntry, Manifest, decode
from runtime.npz import read_npz

MANIFEST = "manifest.json"
MAX_ZIP_BYTES = 4 * 1024 * 1024 * 1024

_CHUNK = 1 << 18
_CHECKING_THREADS = 4


Read = Callable[[str], bytes]
"""The verified bytes of a file of the bundle, by name."""


class Bundle:
    """A verified bundle: ``manifest``, and the bytes of its files.

    Make one with ``Bundle.open``. The bytes handed out are bytes that were verified: a file that
    changes on disk later is an error when it is read, not an answer.
    """

    def __init__(self, path: Path, manifest: Manifest, read: Read) -> None:
        self.path = path
        self.manifest = manifest
        self._read = read

    @classmethod
    def open(cls, path: str | Path, *, whole: bool = True) -> "Bundle":
        """Read and verify the bundle at ``path``, a folder or a ``.zip``.

        Large models take a while to hash. ``whole=False`` looks at the manifest and at the name,
        kind and size of each file of a folder; bytes are verified when they are ``read``.

        Raises BundleError for anything missing, added, changed, linked, oversized or too new.
        """
        path = Path(path)
        if path.is_dir():
            manifest, read = _open_folder(path)
            if whole:
                _check_files(path, manifest.files)
        elif path.is_file():
            manifest, read = _open_zip(path)
        else:
            raise BundleError(
                f"{path}: no such bundle; `make train export` writes build/NAME/bundle"
            )
        return cls(path, manifest, read)

    def read(self, name: str) -> bytes:
        """The verified bytes of file ``name``, which may be the manifest.

        Raises BundleError if the bundle has no such file, or if it was changed.
        """
        if name not in self.names():
            raise BundleError(f"{self.path}: has no file {name!r}")
        return self._read(name)

    def names(self) -> list[str]:
        """All its files, the manifest first."""
        return [MANIFEST, *sorted(entry.name for entry in self.manifest.files)]

    def sha256(self) -> str:
        """The digest of its zip, whether it was opened as one or as a folder.

        Raises BundleError if a file was changed.
        """
        return hashlib.sha256(
            encode_zip({name: self.read(name) for name in self.names()})
        ).hexdigest()

    def model(self, form: str) -> bytes:
        """The verified ONNX bytes of one form: ``fp32``, ``fp16``, ``int8`` or ``int8-cpu``.

        Raises BundleError if that form did not pass the gate.
        """
        artifact = self.manifest.artifact(form)
        if artifact is None:
            forms = ", ".join(a.form for a in self.manifest.artifacts)
            raise BundleError(f"{self.path}: has no {form}; it has {forms}")
        return self.read(artifact.file)

    def golden(self) -> dict[str, npt.NDArray[Any]]:
        """The golden samples: ``images`` uint8 [N, H, W, C], ``logits.FORM`` float32 [N, K].

        Raises BundleError if they are not what the manifest promises.
        """
        try:
            golden = read_npz(self.read(self.manifest.golden))
        except ValueError as error:
            raise BundleError(f"{self.path}: golden samples cannot be read: {error}") from error
        images = golden.get("images")
        if images is None or images.dtype != np.uint8 or images.ndim != 4:
            raise BundleError(f"{self.path}: golden samples have no uint8 [N, H, W, C] images")
        if images.shape[1:] != self.manifest.input.shape:
            expected, got = list(self.manifest.input.shape), list(images.shape[1:])
            raise BundleError(f"{self.path}: golden images are {got}, the model takes {expected}")
        return golden


def _check_files(folder: Path, entries: Sequence[FileEntry]) -> None:
    """Hash files without keeping them, in threads: hashing lets others run."""
    from concurrent.futures import ThreadPoolExecutor  # a start that reads one form does without

    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _CHECKING_THREADS)) as pool:
        largest_first = sorted(entries, key=lambda entry: -entry.size)
        checks = [pool.submit(_check_file, folder / entry.name, entry) for entry in largest_first]
    errors = [error for check in checks if (error := check.exception())]
    if errors:
        raise min(errors, key=str)  # the same one, whichever thread was first


def _check_file(path: Path, entry: FileEntry) -> None:
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(_CHUNK))
    with _reading(path), path.open("rb", buffering=0) as file:
        # One byte more than it should have is enough to know.
        while size <= entry.size and (count := file.readinto(buffer)):
            digest.update(buffer[:count])
            size += count
    _compare_size(entry, size, str(path.parent))
    _compare_digest(entry, digest.hexdigest(), str(path.parent))


def _open_folder(folder: Path) -> tuple[Manifest, Read]:
    found: dict[str, int] = {}
    for file in folder.iterdir():
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a link" if stat.S_ISLNK(status.st_mode) else "a folder or device"
            raise BundleError(f"{file}: expected only plain files in a bundle, got {kind}")
        found[file.name] = status.st_size
        if len(found) > MAX_FILES + 1:
            raise BundleError(f"{folder}: more than {MAX_FILES} files; this is no bundle")
    if MANIFEST not in found:
        raise BundleError(f"{folder}: has no {MANIFEST}; this is no bundle, or it was cut short")
    del found[MANIFEST]
    head = _read_file(folder / MANIFEST, MAX_MANIFEST_BYTES)
    manifest = decode(head)
    _check_names(manifest, set(found), str(folder))
    for entry in manifest.files:
        _compare_size(entry, found[entry.name], str(folder))
    entries = {entry.name: entry for entry in manifest.files}

    def read(name: str) -> bytes:
        if name == MANIFEST:
            return head
        return _verified(entries[name], _read_file(folder / name, entries[name].size), str(folder))

    return manifest, read


def _open_zip(path: Path) -> tuple[Manifest, Read]:
    if path.stat().st_size > MAX_ZIP_BYTES:
        raise BundleError(f"{path}: larger than the limit of {MAX_ZIP_BYTES:,} bytes")
    data = _read_file(path, MAX_ZIP_BYTES)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            _check_zip_entries(path, infos)
            contents = {info.filename: archive.read(info) for info in infos}
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise BundleError(f"{path}: damaged zip: {error}; copy the bundle again") from error
    # A zip can hide bytes before, between and after its files; ours has one encoding.
    if encode_zip(contents) != data:
        raise BundleError(f"{path}: changed since export (bytes outside the files); copy it again")
    manifest = decode(contents[MANIFEST])
    _check_names(manifest, set(contents) - {MANIFEST}, str(path))
    for entry in manifest.files:
        _verified(entry, contents[entry.name], str(path))
    return manifest, contents.__getitem__


def encode_zip(contents: dict[str, bytes]) -> bytes:
    """The one zip encoding of ``contents``, manifest first: stored, no dates, no attributes."""
    names = [MANIFEST, *sorted(set(contents) - {MANIFEST})]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), contents[name])
    return buffer.getvalue()


def _check_zip_entries(path: Path, infos: list[zipfile.ZipInfo]) -> None:
    names = [info.filename for info in infos]
    if len(infos) > MAX_FILES + 1 or len(set(names)) != len(names):
        raise BundleError(f"{path}: expected at most {MAX_FILES} different files")
    if not names or names[0] != MANIFEST:
        raise BundleError(f"{path}: expected {MANIFEST} as the first file; this is no bundle")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise BundleError(f"{path}: {info.filename!r} is compressed; bundles are stored plain")
        if "/" in info.filename or "\\" in info.filename or info.is_dir():
            raise BundleError(f"{path}: {info.filename!r} is a path; bundles are flat")


def _check_names(manifest: Manifest, found: set[str], place: str) -> None:
    listed = {entry.name for entry in manifest.files}
    if missing := sorted(listed - found):
        raise BundleError(f"{place}: missing {', '.join(missing)}; copy the bundle again")
    if extra := sorted(found - listed):
        raise BundleError(
            f"{place}: {', '.join(extra)} is not in the manifest; remove it or copy again"
        )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error


def _read_file(path: Path, limit: int) -> bytes:
    """At most ``limit + 1`` bytes: a limit, or a size that is declared, costs no memory itself."""
    with _reading(path), path.open("rb") as file:
        return file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)


def _verified(entry: FileEntry, data: bytes, place: str) -> bytes:
    _compare_size(entry, len(data), place)
    _compare_digest(entry, hashlib.sha256(data).hexdigest(), place)
    return data


def _compare_size(entry: FileEntry, size: int, place: str) -> None:
    if size != entry.size:
        raise BundleError(
            f"{place}: {entry.name}: expected {entry.size:,} bytes, got "
            f"{'more' if size > entry.size else f'{size:,}'}; copy the bundle again"
        )


def _compare_digest(entry: FileEntry, digest: str, place: str) -> None:
    if digest != entry.sha256:
        raise BundleError(
            f"{place}: {entry.name}: changed since export "
            f"(expected sha256 {entry.sha256[:12]}…, got {digest[:12]}…); copy the bundle again"
        )
