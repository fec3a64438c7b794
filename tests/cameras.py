"""Cameras for tests and benchmarks, in processes of their own, to be killed and brought back.

Aravis' own fake GigE Vision camera, and a web camera (Motion JPEG over HTTP) that plays a file.
"""

import ctypes
import fcntl
import http.server
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

import cv2
import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
SIZE = 64
GIGE_ADDRESS = "127.0.0.1"


def picture(number: int) -> npt.NDArray[np.uint8]:
    """RGB ``[SIZE, SIZE, 3]``: the number's bits as bright and dark columns, on a red ground."""
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[:, :, 0] = 200
    for bit in range(8):
        image[SIZE // 2 :, bit * 8 : bit * 8 + 8] = 255 * (number >> bit & 1)
    return image


def number_in(image: npt.NDArray[np.uint8]) -> int:
    """Of ``picture``, also after lossy compression."""
    return sum(int(image[-16:, bit * 8 + 2 : bit * 8 + 6].mean() > 127) << bit for bit in range(8))


def write_video(path: Path, frames: int, fps: float = 25.0) -> Path:
    """A Motion JPEG video of ``picture`` 0 to frames - 1."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, (SIZE, SIZE))
    for number in range(frames):
        writer.write(cv2.cvtColor(picture(number), cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class CameraThere:
    """A camera process that can be taken away and brought back; ``source`` is what to open."""

    def __init__(self, source: str, *arguments: str) -> None:
        self.source = source
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.come()
        return self

    def __exit__(self, *error: object) -> None:
        self.vanish()

    def come(self) -> None:
        """Start it, and wait until it is there."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cameras", *self._arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT,
        )  # fmt: skip
        assert self._process.stdout
        assert self._process.stdout.readline() == b"there\n"

    def vanish(self) -> None:
        """SIGKILL: nobody is told, as when a cable is pulled."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def hang(self) -> None:
        """It keeps its connections and sends nothing."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After ``hang``."""
        assert self._process
        self._process.send_signal(signal.SIGCONT)


class WebCamera(CameraThere):
    """Plays ``video`` again and again, ``fps`` frames a second."""

    def __init__(self, video: Path, fps: float = 25.0) -> None:
        port = str(free_port())
        super().__init__(f"http://127.0.0.1:{port}/stream.mjpg", "web", str(video), str(fps), port)


class GigECamera(CameraThere):
    """Aravis' fake camera: 512x512, 25 frames a second, on the loopback interface.

    The protocol has one port, so there is one such camera on a machine at a time.
    """

    def __init__(self) -> None:
        super().__init__(f"aravis:{GIGE_ADDRESS}", "gige")
        self._only = (Path(tempfile.gettempdir()) / "fieldfit-gige-camera.lock").open("w")

    def __enter__(self) -> Self:
        fcntl.flock(self._only, fcntl.LOCK_EX)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._only.close()


def gige_is_here() -> bool:
    """Whether the system has the library."""
    try:
        ctypes.CDLL("libaravis-0.8.so.0")
    except OSError:
        return False
    return True


# --- in the camera's process


class _Stream(http.server.BaseHTTPRequestHandler):
    frames: list[bytes]
    fps: float

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        due, number = time.monotonic(), 0
        while True:
            jpeg = self.frames[number % len(self.frames)]
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
            self.wfile.write(head.encode() + jpeg + b"\r\n")
            number, due = number + 1, due + 1 / self.fps
            time.sleep(max(0.0, due - time.monotonic()))

    def log_message(self, *words: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *words: object) -> None:
        pass  # a reader that goes away


def _web(video: str, fps: str, port: str) -> None:
    capture = cv2.VideoCapture(video)
    _Stream.frames, _Stream.fps = [], float(fps)
    while (read := capture.read())[0]:
        _Stream.frames.append(cv2.imencode(".jpg", read[1])[1].tobytes())
    server = _Server(("127.0.0.1", int(port)), _Stream)
    print("there", flush=True)
    server.serve_forever()


def _gige() -> None:
    library = ctypes.CDLL("libaravis-0.8.so.0")
    make, runs = library.arv_gv_fake_camera_new, library.arv_gv_fake_camera_is_running
    make.restype, make.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_char_p]
    runs.argtypes = [ctypes.c_void_p]
    camera = make(GIGE_ADDRESS.encode(), b"GV01")
    assert runs(camera)
    print("there", flush=True)
    sys.stdin.read()  # until whoever started it is gone


if __name__ == "__main__":
    if sys.argv[1] == "web":
        _web(*sys.argv[2:])
    else:
        _gige()
