"""Frames of a GenICam camera, with their faults, as the camera's process wants them.

It runs in that process only, and knows nothing of the line.
"""

import importlib.util
import time
from typing import Any, NamedTuple

import numpy as np

from runtime.errors import DataError
from runtime.sources import aravis
from runtime.sources.address import Address
from runtime.sources.frame_ring import Array, Shape
from runtime.sources.grabber import Grabbed

_BUFFERS = 4
_LOST_AT_ONCE = 1000
"""A larger gap in the camera's numbers is no loss: it counts anew."""

_ALIVE_S = 0.3
"""How often a camera that waits for its trigger is asked whether it is there."""


class _Format(NamedTuple):
    name: str
    channels: int
    itemsize: int
    conversion: str = ""
    """Of cv2, where there is one to be done."""


_FORMATS = {
    0x01080001: _Format("Mono8", 1, 1),
    0x01100003: _Format("Mono10", 1, 2),
    0x01100005: _Format("Mono12", 1, 2),
    0x01100025: _Format("Mono14", 1, 2),
    0x01100007: _Format("Mono16", 1, 2),
    0x02180014: _Format("RGB8", 3, 1),
    0x02180015: _Format("BGR8", 3, 1),
    # OpenCV names a pattern by its second row and column, GenICam by the first.
    0x01080008: _Format("BayerGR8", 3, 1, "COLOR_BayerGB2RGB"),
    0x01080009: _Format("BayerRG8", 3, 1, "COLOR_BayerBG2RGB"),
    0x0108000A: _Format("BayerGB8", 3, 1, "COLOR_BayerGR2RGB"),
    0x0108000B: _Format("BayerBG8", 3, 1, "COLOR_BayerRG2RGB"),
}
"""GenICam PFNC 2.4: pixel formats with whole bytes a level."""


class AravisGrabber:
    """One GenICam camera. Raises DataError if it cannot be opened or gives no frame."""

    def __init__(self, address: Address) -> None:
        self._camera = aravis.Camera(address.place, address.settings, _BUFFERS)
        self._triggered = self._camera.waits_for_a_trigger()
        self._newest: int | None = None
        self._buffer: int | None = None
        code, name = self._camera.pixel_format()
        if code not in _FORMATS:
            names = ", ".join(known.name for known in _FORMATS.values())
            raise DataError(f"its pixels are {name}; set ?PixelFormat= to one of {names}")
        self._format = _FORMATS[code]
        if self._format.conversion and importlib.util.find_spec("cv2") is None:
            raise DataError(f"its pixels are {name}, and that takes pip install 'fieldfit[camera]'")
        height, width = self._camera.size()
        self._shape = Shape(height, width, self._format.channels, self._format.itemsize)

    @property
    def shape(self) -> Shape:
        """Of every frame."""
        return self._shape

    def grab(self) -> Grabbed | None:
        """The newest frame; for a camera that waits for its trigger also that it is there."""
        self._give_back()
        skipped = 0
        while (buffer := self._camera.pop(_ALIVE_S)) is None:
            if self._triggered and self._camera.waits_for_a_trigger():
                return Grabbed(time.time(), time.monotonic(), alive=True)
        while (newer := self._camera.pop_at_once()) is not None:
            self._camera.push(buffer)
            buffer, skipped = newer, skipped + 1
        self._buffer = buffer
        moment = time.time(), time.monotonic()
        number, status = self._camera.frame_id(buffer), self._camera.status(buffer)
        lost = number - self._newest - 1 if self._newest is not None else 0
        self._newest = number
        fault = "" if status == aravis.SUCCESS else _fault(status)
        # Numbers of 16 bit begin again at 1; the buffers passed over are counted all the same.
        return Grabbed(*moment, fault, lost if skipped <= lost <= _LOST_AT_ONCE else skipped)

    def retrieve(self, place: Array) -> None:
        """Bayer patterns become RGB, with OpenCV."""
        assert self._buffer is not None, "grab comes first"
        height, width, code, pixels = self._camera.picture(self._buffer)
        if (height, width) != self._shape[:2] or _FORMATS.get(code) is not self._format:
            raise DataError("the camera's pictures have changed their size or format")
        dtype = self._shape.dtype
        if self._format.conversion:
            import cv2

            mosaic = np.frombuffer(pixels, np.uint8, height * width).reshape(height, width)
            conversion: Any = getattr(cv2, self._format.conversion)
            cv2.cvtColor(mosaic, conversion, dst=place)
            return
        picture = np.frombuffer(pixels, dtype, place.size).reshape(place.shape)
        place[:] = picture[:, :, ::-1] if self._format.name == "BGR8" else picture

    def close(self) -> None:
        """Stop the camera."""
        self._give_back()
        self._camera.close()

    def _give_back(self) -> None:
        if self._buffer is not None:
            self._camera.push(self._buffer)
            self._buffer = None


def _fault(status: int) -> str:
    return f"the frame did not come whole: {aravis.FAULTS.get(status, f'status {status}')}"
