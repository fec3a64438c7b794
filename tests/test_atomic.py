"""Whole or not at all: after an exception, a full disk and a killed process."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import atomic


def listing(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_write_and_replace(tmp_path: Path) -> None:
    file = tmp_path / "new" / "deep" / "a.json"
    atomic.write_bytes(file, b"one")
    atomic.write_text(file, "zwei ü")
    assert file.read_text(encoding="utf-8") == "zwei ü"
    assert listing(file.parent) == ["a.json"]
    assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b"old")
    with pytest.raises(error), atomic.replacing_file(file) as temporary:  # noqa: PT012
        temporary.write_bytes(b"half of the n")
        raise error
    assert file.read_bytes() == b"old"
    assert listing(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "a").write_bytes(b"old")
    with pytest.raises(error), atomic.replacing_folder(folder) as temporary:  # noqa: PT012
        (temporary / "a").write_bytes(b"new")
        raise error
    assert (folder / "a").read_bytes() == b"old"
    assert listing(tmp_path) == ["bundle"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "bundle"
    for content in ("one", "two"):
        with atomic.replacing_folder(folder) as temporary:
            (temporary / content).mkdir()
            (temporary / content / "a").write_text(content)
        assert listing(folder) == [content]
    assert listing(folder.parent) == ["bundle"]
    assert folder.stat().st_mode & 0o777 == 0o755


def test_a_failing_last_rename_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "a").write_bytes(b"old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if Path(target) == folder and not self.name.endswith(".old"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space"), atomic.replacing_folder(folder) as temporary:
        (temporary / "a").write_bytes(b"new")
    assert (folder / "a").read_bytes() == b"old"
    assert listing(tmp_path) == ["bundle"]


SMALL = 4096


@contextlib.contextmanager
def small_disk() -> Iterator[None]:
    """Files may not grow beyond SMALL bytes; the write that would answers EFBIG.

    Only around the write: pytest's own log may be a file that is longer already.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b"old")
    with pytest.raises(OSError, match="File too large"), small_disk():
        atomic.write_bytes(file, bytes(SMALL + 1))
    assert file.read_bytes() == b"old"
    assert listing(tmp_path) == ["a.json"]


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "a").write_bytes(b"old")
    with (
        pytest.raises(OSError, match="too large"),
        small_disk(),
        atomic.replacing_folder(folder) as temporary,
    ):
        (temporary / "a").write_bytes(bytes(SMALL + 1))
    assert (folder / "a").read_bytes() == b"old"
    assert listing(tmp_path) == ["bundle"]


WRITER = """
import os, sys
from pathlib import Path
from runtime import atomic
place, step = Path(sys.argv[1]), sys.argv[2]
def die(*args, **kwargs):
    os._exit(9)
if step == "data":
    os.fsync = die
if step == "rename":
    Path.replace = die
    Path.rename = die
if place.suffix:
    atomic.write_bytes(place, b"new")
else:
    with atomic.replacing_folder(place) as temporary:
        (temporary / "a").write_bytes(b"new")
"""


@pytest.mark.parametrize("step", ["data", "rename", "none"])
@pytest.mark.parametrize("name", ["a.json", "bundle"])
def test_a_killed_process_leaves_old_or_new(tmp_path: Path, name: str, step: str) -> None:
    place = tmp_path / name
    content = place if place.suffix else place / "a"
    content.parent.mkdir(exist_ok=True)
    content.write_bytes(b"old")
    root = Path(atomic.__file__).parents[1]
    command = [sys.executable, "-c", WRITER, str(place), step]
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == (0 if step == "none" else 9)
    assert content.read_bytes() == (b"new" if step == "none" else b"old")
    atomic.write_bytes(tmp_path / "next", b"")  # what was left behind is in nobody's way
    with atomic.replacing_folder(tmp_path / "next folder"):
        pass
