"""Cameras that vanish, hang and come back, each read in a process that may be killed.

Real ones as far as a machine without cameras can have them: Aravis' fake GigE Vision camera, a web
camera that plays a file, and video files.
"""

import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import camera_loss
from runtime.errors import DataError
from runtime.sources import open_source
from runtime.sources.camera import Camera
from runtime.sources.frame import Frame
from tests.cameras import (
    GIGE_ADDRESS,
    ROOT,
    CameraThere,
    GigECamera,
    WebCamera,
    free_port,
    gige_is_here,
    number_in,
    write_video,
)

PATIENCE_S = 60.0

needs_aravis = pytest.mark.skipif(
    not gige_is_here(), reason="no Aravis here: apt install libaravis-0.8-0"
)


class Watching:
    """A camera that is read in a thread, as the line reads it; frames wait without end."""

    def __init__(self, text: str) -> None:
        source = open_source(text, state=Path("/nowhere"))
        assert isinstance(source, Camera)
        self.camera = source
        self.frames: queue.Queue[Frame] = queue.Queue()
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        for frame in self.camera:
            self.frames.put(frame)

    def __enter__(self) -> "Watching":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.camera.close()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def next(self, wanted: Callable[[Frame], object]) -> Frame:
        """The next frame of this kind; others are passed over."""
        while True:
            frame = self.frames.get(timeout=PATIENCE_S)
            if wanted(frame):
                return frame

    def good(self, count: int = 1) -> list[Frame]:
        """The next good frames."""
        return [self.next(lambda frame: frame.image is not None) for _ in range(count)]

    def lost(self) -> Frame:
        """The next news of a loss."""
        return self.next(lambda frame: frame.fault.startswith("camera lost"))

    def since(self, moment: float) -> Frame:
        """A good frame that was taken after ``moment``."""
        return self.next(lambda frame: frame.image is not None and frame.monotonic > moment)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "numbers.avi", 50)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descriptors() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- video files


def test_a_video_brings_each_frame_once_in_rgb_and_ends(video: Path, tmp_path: Path) -> None:
    frames = []
    for frame in open_source(f"video:{video}", state=tmp_path):
        frames.append(frame)
        if len(frames) % 10 == 0:
            time.sleep(0.05)  # a slow consumer loses nothing
    images = [frame.image for frame in frames if isinstance(frame.image, np.ndarray)]
    assert [number_in(image) for image in images] == list(range(50))
    assert [frame.id for frame in frames] == [f"{number:06d}" for number in range(1, 51)]
    red, green, blue = images[0][4, 4].tolist()
    assert red > 150 > 60 > max(green, blue)


def test_a_truncated_video_ends_with_a_fault_that_says_where(video: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.avi"
    cut.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    *good, last = open_source(f"video:{cut}", state=tmp_path)
    numbers = [number_in(frame.image) for frame in good if isinstance(frame.image, np.ndarray)]
    assert numbers == list(range(len(good)))
    assert 15 < len(good) < 35
    assert last.image is None
    assert f"breaks off after {len(good)} of 50 frames" in last.fault


@pytest.mark.parametrize(
    "content", [b"", b"RIFF no video at all", random.Random(7).randbytes(5000)]
)
def test_what_is_no_video_is_one_fault(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    (frame,) = open_source(f"video:{path}", state=tmp_path)
    assert frame.image is None
    assert frame.fault == f"{path}: OpenCV cannot open it"


def test_a_video_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a video file"):
        open_source(f"video:{tmp_path / 'none.mp4'}", state=tmp_path)


def test_nothing_in_the_current_folder_passes_for_a_library(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runtime").mkdir()
    for name in ("runtime/__init__.py", "cv2.py"):
        (tmp_path / name).write_text("raise SystemExit('planted')")
    monkeypatch.chdir(tmp_path)
    frame = next(iter(open_source(f"video:{video}", state=tmp_path)))
    assert not frame.fault


def test_closing_a_video_half_way_ends_its_process(video: Path, tmp_path: Path) -> None:
    source = open_source(f"video:{video}", state=tmp_path)
    iterator = iter(source)
    next(iterator)
    source.close()
    assert list(iterator) == []


# --- loss and return


def cameras() -> list[object]:
    return [
        pytest.param("web", id="web camera"),
        pytest.param("gige", id="GigE Vision", marks=needs_aravis),
    ]


def there(kind: str, video: Path) -> CameraThere:
    return GigECamera() if kind == "gige" else WebCamera(video)


@pytest.mark.parametrize("kind", cameras())
def test_a_camera_that_vanishes_is_lost_and_its_frames_come_again_when_it_is_back(
    kind: str, video: Path
) -> None:
    with there(kind, video) as camera, Watching(camera.source) as watching:
        before = watching.good(5)
        for _ in range(2):
            camera.vanish()
            lost = watching.lost()
            assert lost.image is None
            camera.come()
            watching.since(time.monotonic())
        assert watching.camera.restarts >= 2
    ids = [frame.id for frame in before]
    assert len(set(ids)) == 5
    assert all(abs(time.monotonic() - frame.monotonic) < PATIENCE_S for frame in before)
    assert all(
        (time.time() - f.time) - (time.monotonic() - f.monotonic) == pytest.approx(0, abs=0.1)
        for f in before
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", cameras())
def test_a_camera_that_hangs_is_lost_too(kind: str, video: Path) -> None:
    """Its connections stay open, and nothing comes through them."""
    with there(kind, video) as camera, Watching(camera.source) as watching:
        watching.good(5)
        camera.hang()
        lost = watching.lost()
        assert "no frame for" in lost.fault
        camera.go_on()
        watching.since(time.monotonic())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_camera_s_process_that_crashes_or_hangs_is_replaced(
    number: signal.Signals, video: Path
) -> None:
    with WebCamera(video) as camera, Watching(camera.source) as watching:
        watching.good(5)
        first = watching.camera.pid
        assert first is not None
        os.kill(first, number)
        lost = watching.lost()
        if number != signal.SIGSTOP:
            assert f"its process crashed ({number.name})" in lost.fault
        after = watching.since(lost.monotonic)
        assert after.image is not None
        assert watching.camera.pid != first
        assert not is_running(first)


@pytest.mark.slow
@needs_aravis
def test_a_gige_camera_s_process_that_is_killed_leaves_no_camera_that_nobody_can_open() -> None:
    """The camera belongs to the dead one until its heartbeat is missed."""
    with GigECamera() as camera, Watching(camera.source) as watching:
        watching.good(5)
        assert watching.camera.pid is not None
        os.kill(watching.camera.pid, signal.SIGKILL)
        watching.since(watching.lost().monotonic)


@needs_aravis
def test_a_gige_camera_is_let_go_of_so_that_the_next_one_has_it_at_once() -> None:
    with GigECamera():
        for _ in range(2):
            with Watching(f"aravis:{GIGE_ADDRESS}") as watching:
                (first,) = watching.good()
                assert watching.camera.restarts == 0, first


@needs_aravis
@pytest.mark.parametrize(
    ("settings", "shape", "dtype"),
    [
        ("Width=256&Height=128", (128, 256), "uint8"),
        ("PixelFormat=Mono16", (512, 512), "uint16"),
        ("PixelFormat=RGB8", (512, 512, 3), "uint8"),
        ("PixelFormat=BayerRG8", (512, 512, 3), "uint8"),
    ],
)
def test_genicam_features_are_set_and_pixels_come_as_gray_or_rgb(
    settings: str, shape: tuple[int, ...], dtype: str
) -> None:
    with GigECamera(), Watching(f"aravis:{GIGE_ADDRESS}?{settings}") as watching:
        (frame,) = watching.good()
    assert isinstance(frame.image, np.ndarray)
    assert (frame.image.shape, str(frame.image.dtype)) == (shape, dtype)
    assert frame.image.std() > 1


@needs_aravis
def test_a_feature_that_the_camera_does_not_have_is_the_reason() -> None:
    with GigECamera(), Watching(f"aravis:{GIGE_ADDRESS}?Shutterspeed=3") as watching:
        assert watching.lost().fault == "camera lost: no frame yet: [Shutterspeed] Not found"


@needs_aravis
def test_a_camera_that_waits_for_its_trigger_is_not_lost_until_it_is() -> None:
    waits = f"aravis:{GIGE_ADDRESS}?TriggerMode=On&TriggerSource=Software"
    with GigECamera() as camera, Watching(waits) as watching:
        with pytest.raises(queue.Empty):
            watching.frames.get(timeout=2)  # a camera without trigger may not be still so long
        camera.vanish()
        assert "no frame yet" in watching.lost().fault


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rtsp://127.0.0.1:{port}/live", "OpenCV cannot open it"),
        ("/dev/video63", "OpenCV cannot open it"),
        ("gst:videotestsrc ! appsink", "without GStreamer"),
        pytest.param("aravis:Nobody-1", "not found", marks=needs_aravis),
    ],
)
def test_a_camera_that_is_not_there_is_a_fault_with_its_reason(text: str, says: str) -> None:
    with Watching(text.format(port=free_port())) as watching:
        lost = watching.lost()
        assert lost.image is None
        assert says in lost.fault


def test_an_address_where_somebody_listens_and_says_nothing_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("runtime.sources.watchdog._FIRST_OPENING_S", 1.0)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        Watching(f"rtsp://127.0.0.1:{silent.getsockname()[1]}/live") as watching,
    ):
        first = watching.lost()
    assert first.fault == "camera lost: no frame yet"


def test_the_benchmark_loses_a_camera_and_waits_for_its_return(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(camera_loss, "_GONE_S", 0.1)
    with WebCamera(video) as camera:
        series = camera_loss.lose("web", camera.source, 2, camera.vanish, camera.come)
    assert all(cycle.noticed_s > 0 and cycle.back_s > 0 for cycle in series.cycles)
    slow = series._replace(cycles=[*series.cycles, camera_loss.Cycle(1.5, 10.5)])
    report = camera_loss._report([slow])
    assert report.tables[0].rows[0][:2] == ("web", "3")
    assert report.tables[0].rows[0][3] == "1.50"
    figures = report.figures["web"]
    assert isinstance(figures, dict)
    assert figures["noticed_misses"] >= figures["back_misses"] >= 1


# --- slowness, and the end


def test_a_slow_consumer_gets_new_frames_and_is_told_of_the_dropped_ones(video: Path) -> None:
    with WebCamera(video, fps=100) as there:
        camera = open_source(there.source, state=Path("/nowhere"))
        assert isinstance(camera, Camera)
        frames = []
        for frame in camera:
            frames.append(frame)
            time.sleep(0.15)
            if len(frames) == 12:
                break
        camera.close()
    numbers = [int(frame.id.rpartition("-")[2]) for frame in frames if frame.image is not None]
    assert numbers == sorted(set(numbers))
    assert camera.dropped == numbers[-1] - len(numbers)
    assert camera.dropped > 50
    told = [frame for frame in frames if frame.image is None]
    assert "frames up to this one were dropped" in told[0].fault
    assert 1 <= len(told) <= 5


def test_closing_ends_process_and_iteration_also_while_no_frame_comes(video: Path) -> None:
    open_before = descriptors()
    with WebCamera(video) as camera:
        watching = Watching(camera.source)
        with watching:
            watching.good(3)
            assert watching.camera.pid is not None
            os.kill(watching.camera.pid, signal.SIGKILL)
            watching.since(watching.lost().monotonic)
            pid = watching.camera.pid
            camera.hang()
        assert pid is not None
        assert not is_running(pid)
        assert watching.camera.pid is None
        assert list(watching.camera) == []
    assert descriptors() == open_before


def test_ctrl_c_and_a_service_that_stops_leave_the_camera_to_the_parent(video: Path) -> None:
    """Both signal every process of the group, and the parent may have a frame in hand."""
    with WebCamera(video) as camera, Watching(camera.source) as watching:
        watching.good(3)
        assert watching.camera.pid is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(watching.camera.pid, number)
        watching.since(time.monotonic())
        watching.good(3)
        assert watching.camera.restarts == 0


@pytest.mark.parametrize("stopped", [False, True], ids=["reading", "stopped"])
def test_the_camera_s_process_dies_with_its_parent(stopped: bool, video: Path) -> None:
    with WebCamera(video) as camera:
        code = f"""
from pathlib import Path
from runtime.sources import open_source
camera = open_source({camera.source!r}, state=Path("/nowhere"))
for frame in camera:
    print(camera.pid, flush=True)
"""
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT
        ) as parent:
            assert parent.stdout
            pid = int(parent.stdout.readline())
            assert is_running(pid)
            if stopped:
                os.kill(pid, signal.SIGSTOP)
            parent.kill()
        wait_until(lambda: not is_running(pid))
