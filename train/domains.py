"""Where images come from: a folder of class folders, a CSV file, or the embedded sample.

It lists the images of a domain and opens every one once; it does not know splits (train/splits),
nor what makes a usable data set of two domains (train/data).

**Folder.** The class of an image is the name of the first folder below the domain's; deeper folders
do not count. An image beside the class folders has no label, which only a target may have. Hidden
names (``.``) are skipped; files without an image extension are set aside.

**CSV**, UTF-8 with commas: ``path,label[,split][,group]``. Paths are relative to the CSV file. A
target may leave labels empty. ``split`` is train, validation, test or empty; images of one
``group`` (part, module, camera burst) stay together.

**elpv**, ``elpv:mono``, ``elpv:poly``: solar cells from the package elpv-dataset.
"""

import csv
import difflib
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import msgspec

from runtime import atomic
from runtime.dataset import Domain, SetAside, Split
from runtime.errors import DataError
from runtime.preprocess import IMAGE_SUFFIXES, decode
from runtime.recipe import is_embedded

MAX_UNREADABLE = 0.01
"""Share of a domain's images that may be unreadable before that is an error."""

ELPV_LICENCE = (
    "elpv-dataset: solar cell images by Deitsch et al., CC BY-NC-SA 4.0. A sample to try fieldfit "
    "with, not part of it: do not ship these images or a model trained on them."
)

Track = Callable[[Sequence[Any]], Iterable[Any]]
"""Wraps the sequence of images that are about to be opened, e.g. in a progress bar."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """An image as its domain lists it; ``sha256`` is empty until check_images opened it."""

    path: str
    domain: Domain
    label: str | None = None
    group: str | None = None
    stratum: str | None = None
    split: Split | None = None
    """Where the domain says so; None leaves it to train/splits."""
    sha256: str = ""


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """The images of one domain, and the files beside them that are none."""

    candidates: tuple[Candidate, ...]
    set_aside: tuple[SetAside, ...] = ()


def list_domain(place: str, domain: Domain) -> Listing:
    """List the images at ``place``; none is opened.

    Raises DataError if the place is missing, has no images, or contradicts itself.
    """
    if is_embedded(place):
        return _list_elpv(place, domain)
    path = Path(place).absolute()  # for the cache, and for rooms that run elsewhere
    if path.is_dir():
        return _list_folder(path, domain)
    if path.is_file() and path.suffix.lower() == ".csv":
        return _list_csv(path, domain)
    found = "a file" if path.exists() else "nothing there"
    raise DataError(
        f"{domain} {path}: expected a folder of class folders, a .csv file or elpv[:mono|:poly], "
        f"got {found}; correct [data.{domain}]"
    )


def check_images(
    listing: Listing, *, cache: Path | None = None, track: Track | None = None
) -> Listing:
    """Open and hash every image of ``listing``; those that cannot be used are set aside.

    Digests of good images are kept in the folder ``cache``, by path, size and modification time,
    so that a second run opens only what changed. ``track`` wraps the images to open.

    Raises DataError if more than MAX_UNREADABLE of a domain's images cannot be used.
    """
    known = _read_cache(cache)
    verdicts: dict[str, _Known | str] = {}
    for candidate in listing.candidates:
        entry = known.get(candidate.path)
        if entry is not None and entry[:2] == _stamp(candidate.path):
            verdicts[candidate.path] = entry
    unseen = sorted({c.path for c in listing.candidates} - verdicts.keys())
    # Pillow and hashlib release the interpreter lock, so threads do use the cores.
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    try:
        waiting = {path: pool.submit(_examine, path) for path in unseen}
        for path in track(unseen) if track and unseen else unseen:
            verdicts[path] = waiting[path].result()
    finally:
        pool.shutdown(cancel_futures=True)
    good = {path: verdict for path, verdict in verdicts.items() if isinstance(verdict, tuple)}
    _write_cache(cache, known, good)
    bad = {path: verdict for path, verdict in verdicts.items() if isinstance(verdict, str)}
    for domain in get_args(Domain):
        _refuse_many_unreadable(domain, [c for c in listing.candidates if c.domain == domain], bad)
    return Listing(
        candidates=tuple(
            msgspec.structs.replace(c, sha256=good[c.path][2])
            for c in listing.candidates
            if c.path in good
        ),
        set_aside=listing.set_aside
        + tuple(SetAside(path=path, reason=bad[path]) for path in sorted(bad)),
    )


def _refuse_many_unreadable(
    domain: Domain, candidates: Sequence[Candidate], bad: dict[str, str]
) -> None:
    unreadable = [c.path for c in candidates if c.path in bad]
    if len(unreadable) > MAX_UNREADABLE * len(candidates):
        few = "".join(f"\n  {path}: {bad[path]}" for path in unreadable[:5])
        more = f"\n  and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
        raise DataError(
            f"{domain}: {len(unreadable)} of {len(candidates)} images cannot be used, expected at "
            f"most {MAX_UNREADABLE:.0%}; repair or remove them:{few}{more}"
        )


# --- folder


def _list_folder(root: Path, domain: Domain) -> Listing:
    candidates: list[Candidate] = []
    set_aside: list[SetAside] = []

    def add(file: Path, label: str | None) -> None:
        if file.suffix.lower() in IMAGE_SUFFIXES:
            candidates.append(Candidate(path=str(file), domain=domain, label=label))
        else:
            reason = f"not an image by its extension {file.suffix!r}"
            set_aside.append(SetAside(path=str(file), reason=reason))

    for entry in _visible(root):
        if not entry.is_dir():
            add(entry, None)
            continue
        before = len(candidates)
        folders = [entry]
        while folders:
            for inner in _visible(folders.pop()):
                if not inner.is_dir():
                    add(inner, entry.name)
                elif inner.is_symlink():  # following one could walk in a circle
                    set_aside.append(SetAside(path=str(inner), reason="a link to a folder"))
                else:
                    folders.append(inner)
        if domain == "source" and len(candidates) == before:
            raise DataError(f"{domain} {entry}: no images in this class folder; add some or remove")
    if not candidates:
        raise DataError(
            f"{domain} {root}: no images; expected {root}/CLASS/IMAGE with one of the extensions "
            f"{' '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return Listing(candidates=tuple(candidates), set_aside=tuple(set_aside))


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror}") from error


# --- CSV

_REQUIRED = ("path", "label")
_OPTIONAL = ("split", "group")


def _list_csv(file: Path, domain: Domain) -> Listing:
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{file}: expected UTF-8 text with commas: {error}") from error
    rows = [(line, row) for line, row in rows if any(row)]
    if not rows:
        raise DataError(f"{domain} {file}: empty; expected a header path,label[,split][,group]")
    (line, header), *body = rows
    _check_header(f"{file}:{line}", header)
    if not body:
        raise DataError(f"{domain} {file}: no images below the header")
    seen: dict[str, tuple[int, Candidate]] = {}
    for line, row in body:
        candidate = _from_row(f"{file}:{line}", header, row, file.parent, domain)
        first_line, first = seen.setdefault(candidate.path, (line, candidate))
        if first != candidate:
            raise DataError(
                f"{file}:{line}: {row[header.index('path')]} is listed on line {first_line} "
                f"with {_difference(first, candidate)}; keep one of the two lines"
            )
    return Listing(candidates=tuple(candidate for _, candidate in seen.values()))


def _check_header(place: str, header: list[str]) -> None:
    expected = "expected the columns path,label[,split][,group]"
    known = (*_REQUIRED, *_OPTIONAL)
    for column in header:
        if column not in known:
            close = difflib.get_close_matches(column.lower(), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise DataError(f"{place}: {expected}, got {column!r}{hint}")
    if len(set(header)) != len(header):
        raise DataError(f"{place}: {expected} once each, got {','.join(header)}")
    missing = [column for column in _REQUIRED if column not in header]
    if missing:
        raise DataError(f"{place}: {expected}, {' and '.join(missing)} is missing")


def _from_row(
    place: str, header: list[str], row: list[str], folder: Path, domain: Domain
) -> Candidate:
    if len(row) != len(header):
        raise DataError(f"{place}: expected {len(header)} cells ({','.join(header)}), got {row}")
    cells = dict(zip(header, row, strict=True))
    if not cells["path"]:
        raise DataError(f"{place}: the path is empty")
    if not cells["label"] and domain == "source":
        raise DataError(f"{place}: the label is empty; only a target may have unlabelled images")
    split = cells.get("split") or None
    if split not in (None, *get_args(Split)):
        words = ", ".join(get_args(Split))
        raise DataError(f"{place}: expected a split of {words} or nothing, got {split!r}")
    return Candidate(
        path=os.path.normpath(folder / cells["path"]),
        domain=domain,
        label=cells["label"] or None,
        group=cells.get("group") or None,
        split=split,  # type: ignore[arg-type]  # one of the words, or None: checked above
    )


def _difference(one: Candidate, other: Candidate) -> str:
    return " and ".join(
        f"{name} {getattr(one, name)!r} instead of {getattr(other, name)!r}"
        for name in ("label", "split", "group")
        if getattr(one, name) != getattr(other, name)
    )


# --- embedded sample


def _list_elpv(place: str, domain: Domain) -> Listing:
    name, _, kind = place.partition(":")
    if place != name and kind not in ("mono", "poly"):
        raise DataError(f"[data.{domain}]: expected elpv, elpv:mono or elpv:poly, got {place!r}")
    package = importlib.util.find_spec("elpv_dataset")
    if package is None or package.origin is None:
        raise DataError(f"{domain} {place}: the sample is not here; run: pip install elpv-dataset")
    folder = Path(package.origin).parent / "data"
    try:
        lines = (folder / "labels.csv").read_text(encoding="utf-8").split("\n")
        # path probability type, separated by runs of spaces
        cells = [line.split() for line in lines if line.strip()]
        rows = [(path, float(probability), type_) for path, probability, type_ in cells]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{domain} {place}: the sample is damaged ({error}); "
            "run: pip install --force-reinstall elpv-dataset"
        ) from error
    return Listing(
        candidates=tuple(
            Candidate(
                path=str(folder / path),
                domain=domain,
                label="defective" if probability > 0.5 else "functional",
                stratum=f"{type_} {probability:.2f}",
            )
            for path, probability, type_ in rows
            if kind in ("", type_)
        )
    )


# --- opening, with a memory

_Known = tuple[int, int, str]
"""Size in bytes, modification time in nanoseconds, sha256."""


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        status = Path(path).stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def _examine(path: str) -> _Known | str:
    """What is known of a good image, or why this one cannot be used."""
    try:
        stamp = _stamp(path)
        decode(path)
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except DataError as error:
        return str(error).removeprefix(f"{path}: ")
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return (*stamp, digest) if stamp else "vanished while it was read"


class _Cache(msgspec.Struct):
    format: int
    images: dict[str, _Known]


_CACHE_FORMAT = 1  # raise it when decode's policy refuses images that it accepted before


def _read_cache(folder: Path | None) -> dict[str, _Known]:
    if folder is None:
        return {}
    try:
        cache = msgspec.json.decode((folder / "images.json").read_bytes(), type=_Cache)
    except (OSError, ValueError):  # a cache that cannot be read is only a slower run
        return {}
    return cache.images if cache.format == _CACHE_FORMAT else {}


def _write_cache(folder: Path | None, known: dict[str, _Known], good: dict[str, _Known]) -> None:
    if folder is not None and not good.items() <= known.items():
        cache = _Cache(format=_CACHE_FORMAT, images=known | good)
        atomic.write_bytes(folder / "images.json", msgspec.json.encode(cache))
