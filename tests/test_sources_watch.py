"""A watched folder: each image once, when it is whole, through restarts and whatever happens."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from runtime.sources import done_record, open_source, watched_folder
from runtime.sources.done_record import DoneRecord, digest
from runtime.sources.frame import Frame, Source
from runtime.sources.watched_folder import SETTLED_S, Seen, State, judge, writers
from tests.test_sources import write_image

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_folder, "LOOK_S", 0.01)
    monkeypatch.setattr(watched_folder, "SETTLED_S", 0.05)


class Watching:
    """A watched folder on the way, read in a thread like the line reads it."""

    def __init__(self, folder: Path, state: Path) -> None:
        self.source: Source = open_source(f"watch:{folder}", state=state)
        self.frames: list[Frame] = []
        self._came = threading.Condition()
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        for frame in self.source:
            with self._came:
                self.frames.append(frame)
                self._came.notify_all()

    def __enter__(self) -> "Watching":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.source.close()
        self._thread.join()

    def wait_for(self, count: int) -> list[Frame]:
        with self._came:
            assert self._came.wait_for(lambda: len(self.frames) >= count, 30), self.frames
            return self.frames[:count]

    def wait_for_done(self, count: int) -> list[Frame]:
        frames = self.wait_for(count)
        for frame in frames:
            self.source.done(frame)
        return frames

    def names(self) -> list[str]:
        return [Path(frame.id).name for frame in self.frames]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def appear(path: Path, level: int = 0) -> Path:
    """As programs should do it: written beside, then renamed."""
    path.parent.mkdir(exist_ok=True)
    write_image(path.parent.parent / "beside" / path.name, level).rename(path)
    return path


def test_images_of_before_come_oldest_first_and_new_ones_as_they_appear(
    folder: Path, state: Path
) -> None:
    for age, name in enumerate(("c.png", "a.png", "b.png")):
        os.utime(write_image(folder / name), (1000 - age, 1000 - age))
    with Watching(folder, state) as watching:
        watching.wait_for(3)
        appear(folder / "0.png")
        watching.wait_for(4)
        appear(folder / "today" / "1.jpg")
        (folder / "notes.txt").write_text("no image")
        last = watching.wait_for(5)[-1]
    assert watching.names() == ["b.png", "a.png", "c.png", "0.png", "1.jpg"]
    assert last.image == folder / "today" / "1.jpg"
    assert last.time == pytest.approx(time.time(), abs=30)
    assert last.monotonic == pytest.approx(time.monotonic(), abs=30)


def test_nothing_half_written_comes_however_slowly_it_is_written(folder: Path, state: Path) -> None:
    whole = write_image(folder.parent / "whole.bmp", 9).read_bytes()
    with Watching(folder, state) as watching:
        with (folder / "slow.bmp").open("wb") as file:
            for at in range(0, len(whole), len(whole) // 4):
                file.write(whole[at : at + len(whole) // 4])
                file.flush()
                # Far longer than an unchanged file takes to come: it is still open for writing.
                appear(folder / f"{at}.png")
                watching.wait_for(len(list(folder.glob("*.png"))))
        watching.wait_for(len(list(folder.glob("*.png"))) + 1)
        for frame in watching.frames:
            assert isinstance(frame.image, Path)
            with Image.open(frame.image) as image:
                image.load()
    assert watching.names().index("slow.bmp") == len(watching.frames) - 1


def test_another_process_that_writes_is_seen_and_its_open_is_not_disturbed(folder: Path) -> None:
    path = write_image(folder / "a.png")
    assert writers(path) is False
    code = f"file = open({str(path)!r}, 'ab'); print('open', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == b"open\n"
        assert writers(path) is True
        writer.communicate(b"\n")
    assert writers(path) is False
    assert writers(folder / "none.png") is None


def test_when_a_file_counts_as_whole() -> None:
    seen, empty = Seen(State(9, 1, 1), 10.0), Seen(State(0, 1, 1), 10.0)
    assert judge(seen, 10.0, False) == "wait"  # seen once
    assert judge(seen, 10.01, False) == "whole"
    assert judge(seen, 10.01, True) == "wait"
    assert judge(seen, 10.01, None) == "wait"
    assert judge(seen, 10 + SETTLED_S, None) == "whole"
    assert judge(empty, 10.01, False) == "wait"
    assert judge(empty, 10 + SETTLED_S, False) == "whole"
    assert judge(seen, 71.0, True) == "held"


def test_a_file_that_stays_open_for_writing_is_told_of_and_comes_when_it_is_closed(
    folder: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched_folder, "HELD_S", 0.05)
    path = write_image(folder / "held.png")
    with path.open("ab"), Watching(folder, state) as watching:
        (held,) = watching.wait_for(1)
    assert held.image is None
    assert "open for writing" in held.fault
    with path.open("ab") as file, Watching(folder, state) as watching:
        watching.wait_for(1)
        file.close()
        assert watching.wait_for(2)[1].image == path


def test_a_restart_brings_what_is_not_done_and_nothing_twice(folder: Path, state: Path) -> None:
    for number in range(4):
        write_image(folder / f"{number}.png")
    with Watching(folder, state) as watching:
        for frame in watching.wait_for(4)[:2]:
            watching.source.done(frame)
    appear(folder / "4.png")
    with Watching(folder, state) as again:
        again.wait_for(3)
        appear(folder / "last.png")
        again.wait_for(4)
    assert sorted(watching.names()[:2] + again.names()) == [
        "0.png", "1.png", "2.png", "3.png", "4.png", "last.png"
    ]  # fmt: skip


def test_killed_in_the_middle_it_resumes_where_it_was(folder: Path, state: Path) -> None:
    for number in range(40):
        write_image(folder / f"{number}.png")
    code = f"""
from pathlib import Path
from runtime.sources import open_source
source = open_source("watch:{folder}", state=Path({str(state)!r}))
for frame in source:
    source.done(frame)
    print(Path(frame.id).name, flush=True)
    input()
"""
    done = []
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin
        assert process.stdout
        for _ in range(13):
            done.append(process.stdout.readline().decode().strip())
            process.stdin.write(b"\n")
            process.stdin.flush()
        done.append(process.stdout.readline().decode().strip())
        process.send_signal(signal.SIGKILL)
    with Watching(folder, state) as watching:
        watching.wait_for(40 - len(done))
        appear(folder / "last.png")
        watching.wait_for(40 - len(done) + 1)
    assert sorted(done + watching.names()[:-1]) == sorted(f"{n}.png" for n in range(40))


def test_a_file_that_is_written_anew_comes_again(folder: Path, state: Path) -> None:
    path = write_image(folder / "latest.png", 1)
    with Watching(folder, state) as watching:
        watching.wait_for_done(1)
        appear(path, 200)
        os.utime(path, (5000, 5000))
        watching.wait_for_done(2)
    assert watching.names() == ["latest.png", "latest.png"]


def test_a_file_that_vanishes_or_cannot_be_opened_is_a_fault(folder: Path, state: Path) -> None:
    for number in range(3):
        write_image(folder / f"{number}.png")
    source = open_source(f"watch:{folder}", state=state)
    frames: Iterator[Frame] = iter(source)
    first = next(frames)
    (folder / "1.png").unlink()
    (folder / "2.png").unlink()
    (folder / "2.png").symlink_to("2.png")
    gone, looped = next(frames), next(frames)
    source.close()
    assert not first.fault
    assert gone.image is None
    assert gone.fault == f"{folder / '1.png'}: vanished before it was inspected"
    assert looped.image is None
    assert "cannot be read" in looped.fault


def test_a_folder_that_vanishes_is_told_of_and_watched_again_when_it_is_back(
    folder: Path, state: Path
) -> None:
    write_image(folder / "0.png")
    with Watching(folder, state) as watching:
        watching.wait_for_done(1)
        folder.rename(folder.parent / "away")
        _, missing = watching.wait_for(2)
        (folder.parent / "away").rename(folder)
        appear(folder / "1.png")
        watching.wait_for(3)
    assert missing.image is None
    assert missing.fault == f"{folder}: cannot be watched: No such file or directory"
    assert watching.names()[2:] == ["1.png"]


def test_a_folder_that_is_not_there_yet_is_a_fault_and_a_file_an_error(
    folder: Path, state: Path
) -> None:
    folder.rmdir()
    with Watching(folder, state) as watching:
        (missing,) = watching.wait_for(1)
        appear(folder / "0.png")
        watching.wait_for(2)
    assert "cannot be watched" in missing.fault
    with pytest.raises(Exception, match="expected a folder, got a file"):
        open_source(f"watch:{folder / '0.png'}", state=state)


# --- the record


def keys(count: int, start: int = 0) -> list[bytes]:
    return [digest(f"{number}.png", 1, 1) for number in range(start, start + count)]


def test_the_record_keeps_what_was_added_through_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "record.done"
    record = DoneRecord(path)
    for key in keys(5):
        record.add(key)
    record.close()
    with path.open("ab") as file:
        file.write(b"torn")
    again = DoneRecord(path)
    assert all(key in again for key in keys(5))
    assert len(again) == 5
    again.add(keys(6)[5])
    again.close()
    assert len(DoneRecord(path)) == 6


def test_a_damaged_record_is_begun_anew_and_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "record.done"
    path.write_bytes(b"something else")
    record = DoneRecord(path)
    assert len(record) == 0
    assert "begun anew" in caplog.text
    record.add(keys(1)[0])
    record.close()
    assert len(DoneRecord(path)) == 1


def test_the_record_stays_small_while_files_come_and_go_for_months(
    folder: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred thousand files inspected and taken away; three stay for ever."""
    monkeypatch.setattr(done_record, "NEWEST", 50)
    monkeypatch.setattr(watched_folder, "NEWEST", 50)
    (state / "sources").mkdir(parents=True)
    stay = [write_image(folder / f"stay{number}.png") for number in range(3)]
    with Watching(folder, state) as watching:
        watching.wait_for_done(3)
    (path,) = (state / "sources").iterdir()
    record = DoneRecord(path)
    for key in keys(100_000):
        record.add(key)
    record.close()
    assert path.stat().st_size > 800_000
    with Watching(folder, state) as watching:
        appear(folder / "new.png")
        watching.wait_for_done(1)
        appear(folder / "newer.png")
        watching.wait_for_done(2)
    assert watching.names() == ["new.png", "newer.png"]
    assert path.stat().st_size <= 8 * (1 + 2 * (50 + len(stay) + 2))
    after = DoneRecord(path)
    assert all(key in after for key in keys(40, 99_960))
