"""Image files as a source of frames: named ones, those of a folder or glob; then it ends.

It decodes nothing: whether a file is a picture is found out where it is inspected.
"""

import glob
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from runtime.errors import DataError
from runtime.preprocess import IMAGE_SUFFIXES
from runtime.sources.frame import Frame


def find_images(places: Iterable[str]) -> Iterator[Path]:
    """Files as named, images below folders, matches of glob patterns; sorted within each place.

    Raises DataError for a place that gives no image.
    """
    for place in places:
        path = Path(place)
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if is_image(f.relative_to(path), f))
        elif path.exists() or not glob.has_magic(place):
            found = [path]
        else:
            found = sorted(Path(match) for match in glob.glob(place, recursive=True))  # noqa: PTH207
        if not found:
            raise DataError(f"{place}: no images there ({', '.join(sorted(IMAGE_SUFFIXES))})")
        yield from found


def is_image(inside: Path, file: Path) -> bool:
    """By its suffix; hidden files and folders are skipped, as in training."""
    hidden = any(part.startswith(".") for part in inside.parts)
    return not hidden and file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()


def unreadable(path: Path) -> str:
    """Why nothing can be said about the file; empty if it can be opened."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return f"{readable(path)}: its name is not UTF-8, so no record could name it; rename it"
    try:
        # NONBLOCK: opening a pipe would wait for its other end.
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"{path}: vanished before it was inspected"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    return ""


def readable(path: Path) -> str:
    """The path as text that JSON can hold."""
    return os.fsencode(path).decode(errors="backslashreplace")


class Files:
    """The images that are there when it is made, in the order of their names.

    Raises DataError if there is none.
    """

    live = False
    dropped = 0

    def __init__(self, place: str, name: str) -> None:
        self.name = name
        try:
            self._paths = list(find_images([place]))
            there = glob.has_magic(place) or Path(place).exists()
        except (OSError, ValueError) as error:  # too long a name, a zero byte in it
            raise DataError(f"{place}: {error}") from error
        if not there:
            raise DataError(f"{place}: expected an image, a folder or a glob, there is nothing")
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[Frame]:
        """Their time is that of being picked up: a copy's date says little about the picture."""
        for path in self._paths:
            if self._closed.is_set():
                return
            fault = unreadable(path)
            image = None if fault else path
            yield Frame(self.name, readable(path), image, time.time(), time.monotonic(), fault)

    def done(self, frame: Frame) -> None:
        """After a restart they all come again: they are asked for again."""

    def close(self) -> None:
        """Iteration ends."""
        self._closed.set()
