"""From what a person writes to the source that brings frames."""

import hashlib
import importlib.util
import os
from pathlib import Path

from runtime.errors import DataError
from runtime.sources.address import CAMERAS, Address, parse
from runtime.sources.frame import Source


def open_source(text: str, *, name: str | None = None, state: Path) -> Source:
    """The source that ``text`` names; docs/sources.md lists the ways to write one.

    ``name`` is what frames say they come from; default ``text``, without user name and password.
    ``state`` is the device's folder, where a watched folder keeps what is done with. No camera is
    opened before its frames are asked for: one that is not there yet is a fault frame, no error.

    Raises DataError for a text that names no source, files that are not there, and cameras that
    need a library which is not installed.
    """
    address = parse(text)
    name = name or str(address)
    if address.kind == "files":
        from runtime.sources.files import Files

        return Files(address.place, name)
    if address.kind == "watch":
        return _watch(Path(address.place), name, state)
    _check_library(address)
    if address.kind in CAMERAS:
        from runtime.sources.camera import Camera

        return Camera(address, name)
    from runtime.sources.video import Video

    if not Path(address.place).is_file():
        raise DataError(f"{address}: expected a video file, there is none")
    return Video(address, name)


def _watch(folder: Path, name: str, state: Path) -> Source:
    from runtime.sources.done_record import DoneRecord
    from runtime.sources.watched_folder import WatchedFolder

    if folder.exists() and not folder.is_dir():
        raise DataError(f"watch:{folder}: expected a folder, got a file; leave out watch:")
    folder = folder.absolute()
    which = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return WatchedFolder(folder, name, DoneRecord(state / "sources" / f"{which}.done"))


def _check_library(address: Address) -> None:
    if address.kind == "aravis":
        from runtime.sources.aravis import Aravis

        Aravis()
    elif importlib.util.find_spec("cv2") is None:
        raise DataError(f"{address}: reading it takes OpenCV: pip install 'fieldfit[camera]'")
