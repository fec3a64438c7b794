"""Files and folders that appear whole or not at all.

The order that survives a power cut: write beside the destination, fsync the data, rename, fsync
the folder that holds the name. Without the fsyncs a rename can outlive the bytes it points to.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def make_folder(path: Path) -> None:
    """Make ``path`` and the folders above it, to stay: a name in a folder is written by the fsync
    of that folder alone."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    _fsync(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` with ``data``; a crash or a full disk leaves the old file as it was."""
    with replacing_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` with ``text`` in UTF-8."""
    write_bytes(path, text.encode())


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it takes that name when the block succeeds."""
    import tempfile  # a start that writes nothing need not wait for it

    make_folder(path.parent)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes it private; results are meant to be read
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; it takes the place of ``path`` when the block succeeds.

    A folder cannot be renamed over a full one, so the old one steps aside for the moment between
    two renames; a crash in that moment leaves it beside ``path`` under a ``.old`` name.
    """
    import tempfile

    make_folder(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    old = path.with_name(f".{path.name}.old")
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            _fsync(file)
        temporary.chmod(0o755)
        _fsync(temporary)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _fsync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove ``path``; a crash on the way leaves the rest of it beside, under a ``.old`` name."""
    old = path.with_name(f".{path.name}.old")
    path.rename(old)
    _fsync(path.parent)
    shutil.rmtree(old)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
