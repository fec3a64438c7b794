"""Open a bundle, and refuse it with the reason unless every byte is as its manifest says.

A bundle is a flat folder, or one stored (uncompressed) zip of it. No byte of a model is parsed
before all digests match: no pickle, no links, no paths, sizes capped before memory is taken.
Who wrote the bundle is a question for signatures, not for this module.
"""

import hashlib
import io
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import BundleError
from runtime.manifest import MAX_FILES, MAX_MANIFEST_BYTES, FileEntry, Manifest, decode

MANIFEST = "manifest.json"
MAX_ZIP_BYTES = 4 * 1024 * 1024 * 1024


class Bundle:
    """A verified bundle: ``manifest``, and the bytes of its files.

    Make one with ``Bundle.open``. The bytes handed out are the bytes that were verified: they are
    kept in memory, so a file that changes on disk afterwards changes nothing.
    """

    def __init__(self, path: Path, manifest: Manifest, contents: dict[str, bytes]) -> None:
        self.path = path
        self.manifest = manifest
        self._contents = contents

    @classmethod
    def open(cls, path: str | Path) -> "Bundle":
        """Read and verify the bundle at ``path``, a folder or a ``.zip``.

        Raises BundleError for anything missing, added, changed, linked, oversized or too new.
        """
        path = Path(path)
        if path.is_dir():
            return cls(path, *_read_folder(path))
        if path.is_file():
            return cls(path, *_read_zip(path))
        raise BundleError(f"{path}: no such bundle; `make train export` writes build/NAME/bundle")

    def read(self, name: str) -> bytes:
        """The verified bytes of file ``name``.

        Raises BundleError if the bundle has no such file.
        """
        if name not in self._contents:
            raise BundleError(f"{self.path}: has no file {name!r}")
        return self._contents[name]

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
            with np.load(io.BytesIO(self.read(self.manifest.golden)), allow_pickle=False) as arrays:
                golden = {name: arrays[name] for name in arrays.files}
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise BundleError(f"{self.path}: golden samples cannot be read: {error}") from error
        images = golden.get("images")
        if images is None or images.dtype != np.uint8 or images.ndim != 4:
            raise BundleError(f"{self.path}: golden samples have no uint8 [N, H, W, C] images")
        if images.shape[1:] != self.manifest.input.shape:
            expected, got = list(self.manifest.input.shape), list(images.shape[1:])
            raise BundleError(f"{self.path}: golden images are {got}, the model takes {expected}")
        return golden


def _read_folder(folder: Path) -> tuple[Manifest, dict[str, bytes]]:
    found: dict[str, Path] = {}
    for entry in folder.iterdir():
        mode = entry.lstat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a link" if stat.S_ISLNK(mode) else "a folder or device"
            raise BundleError(f"{entry}: expected only plain files in a bundle, got {kind}")
        found[entry.name] = entry
        if len(found) > MAX_FILES + 1:
            raise BundleError(f"{folder}: more than {MAX_FILES} files; this is no bundle")
    if MANIFEST not in found:
        raise BundleError(f"{folder}: has no {MANIFEST}; this is no bundle, or it was cut short")
    manifest = decode(_read_file(found.pop(MANIFEST), MAX_MANIFEST_BYTES))
    _check_names(manifest, set(found), str(folder))
    contents = {
        entry.name: _verified(entry, _read_file(found[entry.name], entry.size), str(folder))
        for entry in manifest.files
    }
    return manifest, contents


def _read_zip(path: Path) -> tuple[Manifest, dict[str, bytes]]:
    data = _read_file(path, MAX_ZIP_BYTES)
    if len(data) > MAX_ZIP_BYTES:
        raise BundleError(f"{path}: larger than the limit of {MAX_ZIP_BYTES:,} bytes")
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
    manifest = decode(contents.pop(MANIFEST))
    _check_names(manifest, set(contents), str(path))
    for entry in manifest.files:
        _verified(entry, contents[entry.name], str(path))
    return manifest, contents


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


def _read_file(path: Path, limit: int) -> bytes:
    """At most ``limit + 1`` bytes, so that a file that lies about its size costs no memory."""
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error


def _verified(entry: FileEntry, data: bytes, place: str) -> bytes:
    if len(data) != entry.size:
        raise BundleError(
            f"{place}: {entry.name}: expected {entry.size:,} bytes, got "
            f"{'more' if len(data) > entry.size else f'{len(data):,}'}; copy the bundle again"
        )
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry.sha256:
        raise BundleError(
            f"{place}: {entry.name}: changed since export "
            f"(expected sha256 {entry.sha256[:12]}…, got {digest[:12]}…); copy the bundle again"
        )
    return data
