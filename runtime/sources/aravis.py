"""GenICam cameras through the system's Aravis library, with ctypes and nothing else.

PyGObject, Aravis' own way into Python, needs a compiler and GObject introspection on the device.
It knows no frame and no process. Names follow the library (Aravis 0.8 API reference, ArvCamera,
ArvStream, ArvBuffer); enumerations are those of arvbuffer.h and arvenums.h.
"""

import contextlib
import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

from runtime.errors import DataError

SONAME = "libaravis-0.8.so.0"

SUCCESS = 0
FAULTS = {
    1: "cleared",
    2: "timeout: not all packets came",
    3: "packets are missing",
    4: "a packet has a wrong number",
    5: "larger than its buffer",
    7: "aborted",
    8: "its payload is no picture",
}
"""ArvBufferStatus in words."""

_CONTINUOUS = 0


class _GError(ctypes.Structure):
    _fields_ = [("domain", c_uint), ("code", c_int), ("message", c_char_p)]


_ERROR = POINTER(POINTER(_GError))

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    # Those whose last argument is a GError raise DataError with its text.
    "arv_camera_new": (c_void_p, [c_char_p, _ERROR]),
    "arv_camera_get_device": (c_void_p, [c_void_p]),
    "arv_device_set_features_from_string": (c_int, [c_void_p, c_char_p, _ERROR]),
    "arv_camera_is_feature_available": (c_int, [c_void_p, c_char_p, _ERROR]),
    "arv_camera_get_string": (c_char_p, [c_void_p, c_char_p, _ERROR]),
    "arv_camera_get_region": (None, [c_void_p, *[POINTER(c_int)] * 4, _ERROR]),
    "arv_camera_get_pixel_format": (c_uint, [c_void_p, _ERROR]),
    "arv_camera_get_pixel_format_as_string": (c_char_p, [c_void_p, _ERROR]),
    "arv_camera_get_payload": (c_uint, [c_void_p, _ERROR]),
    "arv_camera_set_acquisition_mode": (None, [c_void_p, c_int, _ERROR]),
    "arv_camera_create_stream": (c_void_p, [c_void_p, c_void_p, c_void_p, _ERROR]),
    "arv_camera_start_acquisition": (None, [c_void_p, _ERROR]),
    "arv_camera_stop_acquisition": (None, [c_void_p, _ERROR]),
    "arv_stream_push_buffer": (None, [c_void_p, c_void_p]),
    "arv_stream_timeout_pop_buffer": (c_void_p, [c_void_p, c_uint64]),
    "arv_stream_try_pop_buffer": (c_void_p, [c_void_p]),
    "arv_buffer_new_allocate": (c_void_p, [c_size_t]),
    "arv_buffer_get_status": (c_int, [c_void_p]),
    "arv_buffer_get_frame_id": (c_uint64, [c_void_p]),
    "arv_buffer_get_image_width": (c_int, [c_void_p]),
    "arv_buffer_get_image_height": (c_int, [c_void_p]),
    "arv_buffer_get_image_pixel_format": (c_uint, [c_void_p]),
    "arv_buffer_get_image_data": (c_void_p, [c_void_p, POINTER(c_size_t)]),
}


class Aravis:
    """The loaded library: each function by its name, less ``arv_``; pointers are integers.

    Raises DataError if it is missing, or too old to have what is needed.
    """

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL(SONAME)
        except OSError as error:
            raise DataError(
                f"GenICam cameras need {SONAME}: apt install libaravis-0.8-0 ({error})"
            ) from error
        self._functions: dict[str, Any] = {}
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name, None)
            if function is None:
                raise DataError(f"{SONAME}: expected the function {name}; install a newer Aravis")
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function
        # They come with Aravis, whose symbols they satisfy.
        self._free = ctypes.CDLL("libglib-2.0.so.0").g_error_free
        self._free.restype, self._free.argtypes = None, [c_void_p]
        self._unref = ctypes.CDLL("libgobject-2.0.so.0").g_object_unref
        self._unref.restype, self._unref.argtypes = None, [c_void_p]

    def call(self, name: str, *arguments: Any) -> Any:
        """Call ``arv_NAME``. Raises DataError with the library's own text if it fails."""
        function = self._functions[f"arv_{name}"]
        if function.argtypes[-1] is not _ERROR:
            return function(*arguments)
        error = POINTER(_GError)()
        result = function(*arguments, byref(error))
        if error:
            text = error.contents.message.decode(errors="replace")
            self._free(error)
            raise DataError(text)
        return result

    def unref(self, thing: int) -> None:
        """Give an object back."""
        self._unref(thing)


class Camera:
    """One open camera that sends frames.

    ``name`` is an id as ``arv-tool-0.8`` lists it, an IP address, or empty for the first one;
    ``features`` are set before it starts. Raises DataError if it is not there or refuses one.
    """

    def __init__(self, name: str, features: dict[str, str], buffers: int) -> None:
        self._aravis = Aravis()
        call = self._aravis.call
        self._camera = call("camera_new", name.encode() or None)
        if not self._camera:
            raise DataError("there is no GenICam camera; arv-tool-0.8 lists them")
        # A camera whose last master died may still send to that one, until it is told to stop.
        with contextlib.suppress(DataError):
            call("camera_stop_acquisition", self._camera)
        if features:
            words = " ".join(f"{key}={value}" for key, value in features.items())
            device = call("camera_get_device", self._camera)
            call("device_set_features_from_string", device, words.encode())
        call("camera_set_acquisition_mode", self._camera, _CONTINUOUS)
        payload = call("camera_get_payload", self._camera)
        self._stream = call("camera_create_stream", self._camera, None, None)
        for _ in range(buffers):
            self.push(call("buffer_new_allocate", payload))
        call("camera_start_acquisition", self._camera)

    def size(self) -> tuple[int, int]:
        """Height and width of its pictures."""
        region = [c_int() for _ in range(4)]
        self._aravis.call("camera_get_region", self._camera, *map(byref, region))
        return region[3].value, region[2].value

    def pixel_format(self) -> tuple[int, str]:
        """Its PFNC code and name."""
        call = self._aravis.call
        name = call("camera_get_pixel_format_as_string", self._camera)
        return int(call("camera_get_pixel_format", self._camera)), name.decode()

    def waits_for_a_trigger(self) -> bool:
        """Asks the camera itself: also a proof that it is still there."""
        call = self._aravis.call
        if not call("camera_is_feature_available", self._camera, b"TriggerMode"):
            return False
        return bool(call("camera_get_string", self._camera, b"TriggerMode") == b"On")

    def pop(self, timeout_s: float) -> int | None:
        """The next filled buffer, to be pushed back; None if there is none in time."""
        buffer = self._aravis.call("stream_timeout_pop_buffer", self._stream, int(timeout_s * 1e6))
        return int(buffer) if buffer else None

    def pop_at_once(self) -> int | None:
        """A buffer that is filled already, or None."""
        buffer = self._aravis.call("stream_try_pop_buffer", self._stream)
        return int(buffer) if buffer else None

    def push(self, buffer: int) -> None:
        """Let it be filled."""
        self._aravis.call("stream_push_buffer", self._stream, buffer)

    def status(self, buffer: int) -> int:
        """SUCCESS, or one of FAULTS."""
        return int(self._aravis.call("buffer_get_status", buffer))

    def frame_id(self, buffer: int) -> int:
        """The camera's own number, which may begin again."""
        return int(self._aravis.call("buffer_get_frame_id", buffer))

    def picture(self, buffer: int) -> tuple[int, int, int, memoryview]:
        """Height, width, PFNC pixel format and bytes of a good buffer, valid until pushed."""
        call, size = self._aravis.call, c_size_t()
        address = call("buffer_get_image_data", buffer, byref(size))
        pixels = (ctypes.c_ubyte * size.value).from_address(address)
        return (
            int(call("buffer_get_image_height", buffer)),
            int(call("buffer_get_image_width", buffer)),
            int(call("buffer_get_image_pixel_format", buffer)),
            memoryview(pixels),
        )

    def close(self) -> None:
        """Stop it and let go of it, so that the next process may have it at once."""
        self._aravis.call("camera_stop_acquisition", self._camera)
        self._aravis.unref(self._stream)
        self._aravis.unref(self._camera)
