"""Video files and V4L2, RTSP and GStreamer cameras through OpenCV (extra ``camera``).

It runs in the camera's process only, and knows nothing of the line.
"""

import time
from typing import Any

import numpy as np

from runtime.errors import DataError
from runtime.sources.address import V4L2_SETTINGS, Address
from runtime.sources.frame_ring import Array, Shape
from runtime.sources.grabber import Grabbed

_FIRST_FRAMES = 10
"""So many reads may fail before the first frame: some cameras begin with broken ones."""

_ESTIMATE = 0.02
"""What a file's own count of its frames may be wrong by: containers without an index estimate."""


class OpenCVGrabber:
    """One ``cv2.VideoCapture``. Raises DataError if it cannot be opened or gives no frame."""

    def __init__(self, address: Address) -> None:
        import cv2

        cv2.setNumThreads(1)
        self._cv2: Any = cv2
        self._address = address
        self._capture = cv2.VideoCapture(address.place, self._interface())
        if not self._capture.isOpened():
            raise DataError("OpenCV cannot open it")
        for name in V4L2_SETTINGS:
            if name in address.settings:
                self._set(name, address.settings[name])
        self._frame = self._first()
        height, width = self._frame.shape[:2]
        channels = 1 if self._frame.ndim == 2 or self._frame.shape[2] == 1 else 3
        self._shape = Shape(height, width, channels, self._frame.dtype.itemsize)
        self._count, self._pending = 0, True

    @property
    def shape(self) -> Shape:
        """Of the first frame; all others must have it."""
        return self._shape

    def grab(self) -> Grabbed | None:
        """Wait for the next frame."""
        if self._pending:
            self._pending = False
        else:
            if not self._capture.grab():
                self._check_end()
                return None
            self._taken = time.time(), time.monotonic()
            self._frame = None
        self._count += 1
        return Grabbed(*self._taken)

    def retrieve(self, place: Array) -> None:
        """BGR becomes RGB on the way."""
        frame = self._frame
        if frame is None:
            decoded, frame = self._capture.retrieve()
            if not decoded:
                raise DataError(f"frame {self._count} cannot be decoded")
        shape = *frame.shape[:2], self._shape.channels, frame.dtype.itemsize
        if shape != self._shape:
            raise DataError(
                f"the pictures changed from {self._shape.width}x{self._shape.height} to "
                f"{frame.shape[1]}x{frame.shape[0]}"
            )
        if self._shape.channels == 3:
            self._cv2.cvtColor(frame, self._cv2.COLOR_BGR2RGB, dst=place)
        else:
            place[:] = frame.reshape(place.shape)

    def close(self) -> None:
        """Let go of the device."""
        self._capture.release()

    def _interface(self) -> int:
        cv2 = self._cv2
        kind = self._address.kind
        if kind == "gstreamer" and not cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
            raise DataError(
                "this OpenCV was built without GStreamer, as those of PyPI are; use the one of "
                "JetPack or of your distribution (apt install python3-opencv)"
            )
        interfaces = {"gstreamer": cv2.CAP_GSTREAMER, "v4l2": cv2.CAP_V4L2}
        return int(interfaces.get(kind, cv2.CAP_FFMPEG))

    def _set(self, name: str, value: str) -> None:
        """Raises DataError if the camera does otherwise: a smaller picture would go unnoticed."""
        cv2 = self._cv2
        properties = {
            "width": cv2.CAP_PROP_FRAME_WIDTH, "height": cv2.CAP_PROP_FRAME_HEIGHT,
            "fps": cv2.CAP_PROP_FPS, "fourcc": cv2.CAP_PROP_FOURCC,
        }  # fmt: skip
        wanted = cv2.VideoWriter.fourcc(*value) if name == "fourcc" else float(value)
        self._capture.set(properties[name], wanted)
        got = self._capture.get(properties[name])
        if abs(got - wanted) > 0.5:
            raise DataError(f"asked for {name} {value}, and the camera says {got:g}")

    def _first(self) -> Any:
        for _ in range(_FIRST_FRAMES):
            read, frame = self._capture.read()
            self._taken = time.time(), time.monotonic()
            if read and frame is not None and frame.dtype in (np.uint8, np.uint16):
                return frame
        raise DataError("it opens, but gives no picture")

    def _check_end(self) -> None:
        if self._address.kind != "video":
            raise DataError("the stream ended")
        promised = self._capture.get(self._cv2.CAP_PROP_FRAME_COUNT)
        if promised - self._count > max(1, _ESTIMATE * promised):
            raise DataError(f"the video breaks off after {self._count} of {promised:.0f} frames")
