"""What a person writes becomes a source; files come in order; when a camera counts as lost."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from runtime.errors import DataError
from runtime.sources import open_source
from runtime.sources.address import parse
from runtime.sources.frame import Frame, Source
from runtime.sources.frame_ring import PLACES, RingReader, RingWriter, Shape
from runtime.sources.watchdog import Watchdog

ROOT = Path(__file__).resolve().parent.parent


def write_image(path: Path, level: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), level, np.uint8)).save(path)
    return path


def frames(text: Path | str, state: Path) -> list[Frame]:
    return list(open_source(str(text), state=state))


# --- addresses


@pytest.mark.parametrize(
    ("text", "kind", "place", "settings"),
    [
        ("watch:/in", "watch", "/in", {}),
        ("video:a b.mp4", "video", "a b.mp4", {}),
        ("rtsp://10.0.0.9/live?x=1", "stream", "rtsp://10.0.0.9/live?x=1", {}),
        ("http://cam/mjpg", "stream", "http://cam/mjpg", {}),
        ("gst:v4l2src ! appsink", "gstreamer", "v4l2src ! appsink", {}),
        ("aravis:", "aravis", "", {}),
        ("aravis:Basler AG-40?Gain=3&PixelFormat=Mono8", "aravis", "Basler AG-40",
         {"Gain": "3", "PixelFormat": "Mono8"}),
        ("/dev/video2?width=1920&fourcc=MJPG", "v4l2", "/dev/video2",
         {"width": "1920", "fourcc": "MJPG"}),
        ("photos/*.png", "files", "photos/*.png", {}),
    ],
)  # fmt: skip
def test_every_way_to_write_a_source_is_understood(
    text: str, kind: str, place: str, settings: dict[str, str]
) -> None:
    address = parse(text)
    assert (address.kind, address.place, address.settings) == (kind, place, settings)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rstp://camera/1", "did you mean rtsp://?"),
        ("nothing://camera/1", "there is no such file"),
        ("wacth:/in", "did you mean watch:?"),
        ("watch:", "something after the colon"),
        ("", "got nothing"),
        ("/dev/video0?hight=3", "no setting hight"),
        ("/dev/video0?width=wide", "width is a whole number"),
        ("/dev/video0?width", "expected settings like"),
        ("aravis:x?Gain=1 Width=2", "no setting: a name and one word"),
    ],
)
def test_what_is_no_source_is_told_the_ways_to_write_one(text: str, says: str) -> None:
    with pytest.raises(DataError, match=says.replace("?", r"\?")):
        parse(text)


@given(st.text(max_size=40))
@example("\0").via("a zero byte")
@example("x" * 5000).via("longer than any name")
def test_any_text_is_a_source_or_a_data_error(text: str) -> None:
    with contextlib.suppress(DataError):
        if parse(text).kind == "files":
            open_source(text, state=Path("/nowhere"))


def test_a_file_that_looks_like_a_source_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_image(tmp_path / "watch:me.png")
    monkeypatch.chdir(tmp_path)
    assert parse("watch:me.png").kind == "files"
    assert parse(str(path)).kind == "files"


def test_a_source_s_name_holds_no_password(tmp_path: Path) -> None:
    for login in ("admin:hunter2", "admin:p@hunter2", "hunter2"):
        source = open_source(f"rtsp://{login}@10.0.0.9/live", state=tmp_path)
        assert source.name == "rtsp://10.0.0.9/live"
    pipeline = parse("gst:rtspsrc location=rtsp://a/1 user-id=admin user-pw=hunter2 ! appsink")
    assert str(pipeline) == "gst:rtspsrc location=rtsp://a/1 ! appsink"
    with pytest.raises(DataError) as raised:
        parse("rstp://admin:hunter2@10.0.0.9/live")
    assert "hunter2" not in str(raised.value)
    assert open_source("aravis:", name="line 3", state=tmp_path).name == "line 3"


def test_opening_sources_imports_no_library_that_reads_cameras(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from runtime.sources import open_source
for text in ("watch:in", "rtsp://10.0.0.9/live", "/dev/video0"):
    open_source(text, state=Path({str(tmp_path)!r})).close()
print([name for name in ("cv2", "onnxruntime") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_camera_without_its_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'fieldfit\[camera\]'"):
        open_source("rtsp://10.0.0.9/live", state=tmp_path)
    monkeypatch.setattr("runtime.sources.aravis.SONAME", "libnowhere.so.0")
    with pytest.raises(DataError, match=r"apt install libaravis-0\.8-0"):
        open_source("aravis:", state=tmp_path)


# --- files


def test_a_folder_is_brought_in_the_order_of_its_names_and_ends(tmp_path: Path) -> None:
    for name in ("b/2.png", "a.png", "b/1.jpg", ".hidden/3.png", ".4.png"):
        write_image(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no image")

    brought = frames(tmp_path / "in", tmp_path)

    names = ["a.png", "b/1.jpg", "b/2.png"]
    assert [frame.image for frame in brought] == [tmp_path / "in" / name for name in names]
    assert [frame.id for frame in brought] == [str(tmp_path / "in" / name) for name in names]
    assert not any(frame.fault for frame in brought)
    globbed = frames(tmp_path / "in" / "b" / "*", tmp_path)
    assert [frame.image for frame in globbed] == [tmp_path / "in" / name for name in names[1:]]


def test_a_file_that_vanishes_or_cannot_be_read_is_a_fault_and_the_rest_goes_on(
    tmp_path: Path,
) -> None:
    paths = [write_image(tmp_path / f"{number}.png") for number in range(3)]
    source = open_source(str(tmp_path / "?.png"), state=tmp_path)
    paths[0].unlink()
    paths[1].unlink()
    paths[1].symlink_to(paths[1])

    gone, looped, whole = source

    assert gone.image is None
    assert gone.fault == f"{paths[0]}: vanished before it was inspected"
    assert looped.image is None
    assert "cannot be read" in looped.fault
    assert (whole.image, whole.fault) == (paths[2], "")


def test_a_name_that_is_not_text_is_a_fault_that_can_be_written_down(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    write_image(tmp_path / "plain.png").rename(path)

    (frame,) = frames(tmp_path, tmp_path)

    assert frame.image is None
    assert "not UTF-8" in frame.fault
    assert (frame.id + frame.fault).encode()


@pytest.mark.parametrize("place", ["nothing.png", "none/*.png", "empty"])
def test_where_there_is_no_image_that_is_an_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=place.replace("*", r"\*")):
        open_source(str(tmp_path / place), state=tmp_path)


def test_closing_ends_the_iteration(tmp_path: Path) -> None:
    for number in range(3):
        write_image(tmp_path / f"{number}.png")
    source: Source = open_source(str(tmp_path), state=tmp_path)
    iterator = iter(source)
    next(iterator)
    source.close()
    assert list(iterator) == []


# --- when a camera is lost


def watchdog(*taken: float) -> Watchdog:
    dog = Watchdog()
    dog.begin(0.0)
    for moment in taken:
        dog.frame(moment)
    return dog


@pytest.mark.parametrize("period", [0.01, 0.04, 0.4, 0.6, 2.0])
def test_a_loss_is_noticed_within_a_second_or_two_periods(period: float) -> None:
    dog = watchdog(*(1.0 + period * n for n in range(10)))
    last = 1.0 + period * 9
    assert last + period < dog.deadline < last + max(1.0, 2 * period)


def test_one_late_frame_does_not_make_a_camera_slow() -> None:
    assert watchdog(1.0, 1.1, 1.2, 1.3, 2.1, 2.2).deadline == pytest.approx(2.2 + 0.8)


def test_a_camera_may_take_its_time_to_open_and_teaches_how_long() -> None:
    assert watchdog().deadline == 20
    dog = watchdog(4.0, 4.1)
    dog.begin(100.0)
    assert dog.deadline == 108
    quick = watchdog(0.5, 0.6)
    quick.begin(100.0)
    assert quick.deadline == 105


def test_a_camera_that_comes_back_slower_is_given_more_time_until_that_is_known() -> None:
    dog = watchdog(1.0, 1.04, 1.08)
    limits = []
    for began in (10.0, 20.0, 30.0, 40.0):
        dog.lost()
        dog.begin(began)
        dog.frame(began + 1)
        limits.append(dog.deadline - began - 1)
    assert limits == pytest.approx([0.8, 1.6, 3.2, 6.4])
    dog.frame(44.0)
    assert dog.deadline == pytest.approx(44 + 1.8 * 3)


def test_a_camera_that_waits_for_its_trigger_need_only_answer() -> None:
    dog = watchdog()
    dog.alive(1.0)
    for moment in (1.3, 1.6, 60.0):
        dog.alive(moment)
    assert dog.deadline == pytest.approx(60.8)
    dog.frame(61.0)
    assert dog.deadline == pytest.approx(61.8)


def test_a_loss_is_told_at_once_and_then_now_and_again() -> None:
    dog = watchdog(1.0, 1.1)
    assert dog.lost() == 0
    assert dog.news(2.3, "") == "camera lost: no frame for 1.2 s"
    assert dog.news(3.0, "refused") is None
    assert dog.news(13.0, "refused") == "camera lost: no frame for 11.9 s: refused"
    assert dog.news(70.0, "refused") is None
    assert dog.news(73.1, "refused")
    assert [dog.lost() for _ in range(5)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    dog.begin(80.0)
    dog.frame(81.0)
    assert dog.lost() == 0
    assert dog.news(82.0, "refused")
    assert watchdog().news(20.0, "there is none") == "camera lost: no frame yet: there is none"


# --- shared memory


class Ring:
    """Both ends in one process: record locks do not bite here."""

    def __init__(self, shape: Shape) -> None:
        self.descriptor = os.memfd_create("ring", os.MFD_ALLOW_SEALING)
        self.writer = RingWriter(self.descriptor, shape)
        self.reader = RingReader(self.descriptor)

    def write(self, level: int, fault: str = "") -> None:
        with self.writer.place(1.5, 2.5, fault=fault) as place:
            place[:] = level


def test_frames_come_through_memory_in_order_and_the_oldest_make_room() -> None:
    ring = Ring(Shape(2, 3, 3, 1))
    assert ring.reader.take(0) is None
    for level in range(1, 8):
        ring.write(level)

    taken, after = [], 0
    while frame := ring.reader.take(after):
        taken.append(frame)
        after = frame.number

    assert [frame.number for frame in taken] == list(range(8 - PLACES, 8))
    for frame in taken:
        assert frame.image is not None
        assert frame.image.shape == (2, 3, 3)
        assert (frame.image == frame.number).all()
        assert (frame.time, frame.monotonic) == (1.5, 2.5)


def test_a_faulty_frame_has_words_instead_of_pixels_and_a_broken_off_one_is_none() -> None:
    ring = Ring(Shape(4, 4, 1, 2))
    ring.write(7, fault="packets are missing: " + "é" * 300)
    taken = ring.reader.take(0)
    assert taken is not None
    assert taken.image is None
    assert taken.fault.startswith("packets are missing: éé")
    with pytest.raises(ZeroDivisionError), ring.writer.place(0.0, 0.0):
        raise ZeroDivisionError
    assert ring.reader.take(1) is None


def test_neither_side_waits_for_a_place_that_the_other_holds() -> None:
    """The other process has stopped in the middle of reading, or of writing."""
    ring = Ring(Shape(4, 4, 1, 1))
    code = f"""
import fcntl, sys
place = int(sys.argv[1])
fcntl.lockf({ring.descriptor}, fcntl.LOCK_EX, 1, place)
print("held", flush=True)
sys.stdin.read()
"""
    ring.write(1)
    ring.write(2)
    for held in (1, 3):  # where frame 1 is, and where frame 3 would go
        with subprocess.Popen(
            [sys.executable, "-c", code, str(held)],
            pass_fds=(ring.descriptor,), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as holder:  # fmt: skip
            assert holder.stdout
            assert holder.stdout.readline() == b"held\n"
            if held == 1:
                taken = ring.reader.take(0)
                assert taken is not None
                assert taken.number == 2
            else:
                ring.write(3)
                taken = ring.reader.take(2)
                assert taken is not None
                assert taken.number == 3
            holder.communicate()


@pytest.mark.parametrize("shape", [Shape(0, 5, 1, 1), Shape(40_000, 40_000, 1, 1),
                                   Shape(4, 4, 2, 1), Shape(4, 4, 1, 8)])  # fmt: skip
def test_what_is_no_picture_gets_no_memory(shape: Shape) -> None:
    descriptor = os.memfd_create("ring")
    with pytest.raises(DataError, match="expected gray or RGB pictures"):
        RingWriter(descriptor, shape)
    assert os.fstat(descriptor).st_size == 0


def test_memory_that_holds_no_ring_is_refused_and_cannot_shrink_under_its_reader() -> None:
    for content in (b"", b"\0" * 100_000, b"FFRING01" + b"\xff" * 100_000):
        descriptor = os.memfd_create("ring", os.MFD_ALLOW_SEALING)
        os.write(descriptor, content)
        with pytest.raises(DataError):
            RingReader(descriptor)
    ring = Ring(Shape(4, 4, 1, 1))
    with pytest.raises(PermissionError):
        os.ftruncate(ring.descriptor, 0)


# --- the page


def test_the_page_s_python_runs_as_it_is_written(tmp_path: Path) -> None:
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "sources.md").read_text(), re.DOTALL
    )
    write_image(tmp_path / "in" / "a.png")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"{tmp_path / 'in' / 'a.png'} to be inspected" in done.stdout


def test_every_way_that_the_page_names_is_understood() -> None:
    page = (ROOT / "docs" / "sources.md").read_text()
    rows = [row.split(" | ")[0] for row in page.splitlines() if row.startswith("| `")]
    written = [text.strip("'") for row in rows for text in re.findall(r"`([^`]+)`", row)]
    kinds = {parse(text.replace("...", "camera")).kind for text in written}
    assert kinds == {"files", "watch", "video", "v4l2", "stream", "gstreamer", "aravis"}
