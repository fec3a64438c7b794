"""CUDA memory, streams and events through the CUDA runtime library, with ctypes and nothing else.

Every CUDA machine has ``libcudart``; no small binding for it has wheels for every Jetson. It
does not know TensorRT. ``probe`` says whether there is a GPU *before* TensorRT is touched: some
TensorRT builds crash the process without one.

Names follow the library (CUDA Runtime API reference); constants are equal in CUDA 11.8 to 13.0.
"""

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Callable, Iterator
from ctypes import (
    POINTER,
    byref,
    c_char_p,
    c_float,
    c_int,
    c_size_t,
    c_uint,
    c_ulonglong,
    c_void_p,
)
from pathlib import Path
from typing import Any, NamedTuple

from runtime.errors import EngineError

_SONAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")

_INSUFFICIENT_DRIVER = 35
_NO_DEVICE = 100
_INVALID_DEVICE = 101
_HOST_ALLOC_DEFAULT = 0
_HOST_ALLOC_MAPPED = 2
_STREAM_NON_BLOCKING = 1
_CAPTURE_THREAD_LOCAL = 1
_MEMCPY_HOST_TO_DEVICE = 1
_MEMCPY_DEVICE_TO_HOST = 2
_ATTRIBUTE_INTEGRATED = 18
_ATTRIBUTE_CAN_MAP_HOST_MEMORY = 19
_ATTRIBUTE_CAPABILITY_MAJOR = 75
_ATTRIBUTE_CAPABILITY_MINOR = 76

_SIGNATURES: dict[str, list[Any]] = {
    "cudaGetDeviceCount": [POINTER(c_int)],
    "cudaSetDevice": [c_int],
    "cudaDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cudaMemGetInfo": [POINTER(c_size_t), POINTER(c_size_t)],
    "cudaRuntimeGetVersion": [POINTER(c_int)],
    "cudaDriverGetVersion": [POINTER(c_int)],
    "cudaMalloc": [POINTER(c_void_p), c_size_t],
    "cudaFree": [c_void_p],
    "cudaHostAlloc": [POINTER(c_void_p), c_size_t, c_uint],
    "cudaFreeHost": [c_void_p],
    "cudaHostGetDevicePointer": [POINTER(c_void_p), c_void_p, c_uint],
    "cudaMemcpyAsync": [c_void_p, c_void_p, c_size_t, c_int, c_void_p],
    "cudaStreamCreateWithFlags": [POINTER(c_void_p), c_uint],
    "cudaStreamSynchronize": [c_void_p],
    "cudaStreamDestroy": [c_void_p],
    "cudaStreamBeginCapture": [c_void_p, c_int],
    "cudaStreamEndCapture": [c_void_p, POINTER(c_void_p)],
    # The one way to instantiate whose arguments are the same in CUDA 11, 12 and 13.
    "cudaGraphInstantiateWithFlags": [POINTER(c_void_p), c_void_p, c_ulonglong],
    "cudaGraphLaunch": [c_void_p, c_void_p],
    "cudaGraphDestroy": [c_void_p],
    "cudaGraphExecDestroy": [c_void_p],
    "cudaEventCreateWithFlags": [POINTER(c_void_p), c_uint],
    "cudaEventRecord": [c_void_p, c_void_p],
    "cudaEventSynchronize": [c_void_p],
    "cudaEventElapsedTime": [POINTER(c_float), c_void_p, c_void_p],
    "cudaEventDestroy": [c_void_p],
    "cudaGetLastError": [],
}


class Device(NamedTuple):
    """One CUDA device, as far as engines care."""

    ordinal: int
    compute_capability: tuple[int, int]
    """Major and minor, e.g. (8, 7) for Orin; a plan is bound to it."""
    integrated: bool
    """True on Jetson: GPU and CPU share one memory."""
    free_bytes: int
    total_bytes: int
    runtime_version: str
    driver_version: str
    """The newest CUDA that the driver supports."""

    @property
    def capability(self) -> str:
        """The compute capability as people write it, e.g. ``8.7``."""
        return ".".join(map(str, self.compute_capability))


_HINTS = {
    2: "free GPU memory, or build the engine for smaller batches",
    _INSUFFICIENT_DRIVER: "there is no NVIDIA driver, or one older than this CUDA: install one",
    _NO_DEVICE: "no GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES",
}
_WITHOUT_DEVICE = (_INSUFFICIENT_DRIVER, _NO_DEVICE, _INVALID_DEVICE)


class CudaError(EngineError):
    """A CUDA call failed; ``code`` is the library's cudaError_t."""

    def __init__(self, name: str, code: int, text: str) -> None:
        hint = f" ({_HINTS[code]})" if code in _HINTS else ""
        super().__init__(
            f"{name}: CUDA error {code}: {text}{hint}",
            "no device" if code in _WITHOUT_DEVICE else "failed",
        )
        self.code = code


class Cudart:
    """A loaded CUDA runtime library. Pointers, streams and events are plain integers.

    Every method raises EngineError with the library's own text if the call fails.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        """Declare the functions of ``library``; EngineError if it lacks one."""
        self._library = library
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name, None)
            if function is None:
                raise EngineError(
                    f"{library._name}: expected the function {name}, got none", "missing library"
                )
            function.argtypes, function.restype = arguments, c_int
        library.cudaGetErrorString.argtypes = [c_int]
        library.cudaGetErrorString.restype = c_char_p

    def device_count(self) -> int:
        """Number of GPUs; without a driver this is EngineError 35, without a GPU 100."""
        return self._int("cudaGetDeviceCount")

    def set_device(self, ordinal: int) -> None:
        """Make ``ordinal`` the calling thread's device."""
        self._call("cudaSetDevice", ordinal)

    def describe(self, ordinal: int) -> Device:
        """Make ``ordinal`` the calling thread's device and say what it is."""
        self.set_device(ordinal)
        free, total = c_size_t(), c_size_t()
        self._call("cudaMemGetInfo", byref(free), byref(total))
        return Device(
            ordinal=ordinal,
            compute_capability=(
                self._attribute(_ATTRIBUTE_CAPABILITY_MAJOR, ordinal),
                self._attribute(_ATTRIBUTE_CAPABILITY_MINOR, ordinal),
            ),
            integrated=bool(self._attribute(_ATTRIBUTE_INTEGRATED, ordinal)),
            free_bytes=free.value,
            total_bytes=total.value,
            runtime_version=_version(self._int("cudaRuntimeGetVersion")),
            driver_version=_version(self._int("cudaDriverGetVersion")),
        )

    def malloc(self, size: int) -> int:
        """Address of ``size`` new bytes on the GPU."""
        return self._pointer("cudaMalloc", size)

    def free(self, pointer: int) -> None:
        """Give back what malloc gave."""
        self._call("cudaFree", pointer)

    def can_map_host_memory(self, ordinal: int) -> bool:
        """True if this GPU can read and write the host's memory in place."""
        return bool(self._attribute(_ATTRIBUTE_CAN_MAP_HOST_MEMORY, ordinal))

    def host_alloc(self, size: int, *, mapped: bool = False) -> int:
        """Address of ``size`` new pinned bytes: copies from and to them need no staging.

        With ``mapped`` the GPU has an address of its own for them, see ``device_pointer``.
        """
        return self._pointer(
            "cudaHostAlloc", size, _HOST_ALLOC_MAPPED if mapped else _HOST_ALLOC_DEFAULT
        )

    def device_pointer(self, host: int) -> int:
        """The GPU's address of what host_alloc mapped."""
        return self._pointer("cudaHostGetDevicePointer", host, 0)

    def free_host(self, pointer: int) -> None:
        """Give back what host_alloc gave; arrays over it must be gone."""
        self._call("cudaFreeHost", pointer)

    def copy_to_device(self, device: int, host: int, size: int, stream: int) -> None:
        """Queue a copy of ``size`` bytes from host to GPU."""
        self._call("cudaMemcpyAsync", device, host, size, _MEMCPY_HOST_TO_DEVICE, stream)

    def copy_to_host(self, host: int, device: int, size: int, stream: int) -> None:
        """Queue a copy of ``size`` bytes from GPU to host."""
        self._call("cudaMemcpyAsync", host, device, size, _MEMCPY_DEVICE_TO_HOST, stream)

    def stream(self) -> int:
        """A new stream that does not wait for the legacy default stream."""
        return self._pointer("cudaStreamCreateWithFlags", _STREAM_NON_BLOCKING)

    def synchronize(self, stream: int) -> None:
        """Wait until everything queued on ``stream`` is done; errors of kernels surface here."""
        self._call("cudaStreamSynchronize", stream)

    def destroy_stream(self, stream: int) -> None:
        """Give back what stream gave."""
        self._call("cudaStreamDestroy", stream)

    def capture(self, stream: int, queue: Callable[[], None]) -> int:
        """An executable graph of what ``queue`` queues on ``stream``, which does not run now.

        ``queue`` must not wait for anything. Whatever it raises comes through, and the stream is
        as usable afterwards as before. (CUDA programming guide, "Creating a Graph Using Stream
        Capture".)
        """
        # Thread-local: what other threads do with CUDA meanwhile is their business.
        self._call("cudaStreamBeginCapture", stream, _CAPTURE_THREAD_LOCAL)
        try:
            queue()
        except BaseException:
            # Until its capture ends, one way or the other, a stream captures.
            with contextlib.suppress(CudaError):
                self._call("cudaGraphDestroy", self._end_capture(stream))
            raise
        graph = self._end_capture(stream)
        try:
            return self._pointer("cudaGraphInstantiateWithFlags", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        """Queue a run of what capture gave."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """Give back what capture gave."""
        self._call("cudaGraphExecDestroy", graph)

    def event(self) -> int:
        """A new event that records time."""
        return self._pointer("cudaEventCreateWithFlags", 0)

    def record(self, event: int, stream: int) -> None:
        """Let ``event`` happen when ``stream`` gets here."""
        self._call("cudaEventRecord", event, stream)

    def elapsed_ms(self, start: int, end: int) -> float:
        """Milliseconds of GPU time between two events; waits for the second."""
        elapsed = c_float()
        self._call("cudaEventSynchronize", end)
        self._call("cudaEventElapsedTime", byref(elapsed), start, end)
        return elapsed.value

    def destroy_event(self, event: int) -> None:
        """Give back what event gave."""
        self._call("cudaEventDestroy", event)

    def _end_capture(self, stream: int) -> int:
        graph = c_void_p()
        self._call("cudaStreamEndCapture", stream, byref(graph))
        return graph.value or 0

    def _attribute(self, attribute: int, ordinal: int) -> int:
        value = c_int()
        self._call("cudaDeviceGetAttribute", byref(value), attribute, ordinal)
        return value.value

    def _int(self, name: str) -> int:
        value = c_int()
        self._call(name, byref(value))
        return value.value

    def _pointer(self, name: str, *arguments: int) -> int:
        value = c_void_p()
        self._call(name, byref(value), *arguments)
        return value.value or 0

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            self._library.cudaGetLastError()  # clears it, or the next call would report it again
            raise CudaError(name, code, self._library.cudaGetErrorString(code).decode())


def require(ordinal: int = 0) -> Device:
    """The CUDA device of this number.

    Raises EngineError, with the fault no device or missing library, if there is none.
    """
    cuda = load()
    count = cuda.device_count()
    if ordinal >= count:
        raise EngineError(
            f"expected CUDA device {ordinal}, got devices 0 to {count - 1}", "no device"
        )
    return cuda.describe(ordinal)


def probe(ordinal: int = 0) -> Device | str:
    """The CUDA device of this number, or the reason why there is none."""
    try:
        return require(ordinal)
    except EngineError as error:
        return str(error)


def load() -> Cudart:
    """The CUDA runtime library that fits this machine's driver best.

    Several may be installed, and one that is newer than the driver answers every call with error
    35, so the first without that error wins. Raises EngineError if there is no library at all.
    """
    global _loaded
    if _loaded is not None:
        return _loaded
    found: list[Cudart] = []
    refused: list[str] = []
    for name in _candidates():
        try:
            cuda = Cudart(ctypes.CDLL(name))
        except OSError:  # not here
            continue
        except EngineError as error:  # too old, or not the CUDA runtime
            refused.append(str(error))
            continue
        found.append(cuda)
        try:
            cuda.device_count()
        except CudaError as error:
            if error.code == _INSUFFICIENT_DRIVER:
                continue
        break
    else:
        if not found:
            raise EngineError(
                f"no CUDA runtime library: expected one of {', '.join(_SONAMES)}"
                f"{''.join(f'; {words}' for words in refused[:1])}; install CUDA, or use an "
                "onnxruntime engine on the CPU",
                "missing library",
            )
        return found[0]  # not kept: a driver may be installed while we run
    _loaded = found[-1]
    return _loaded


_loaded: Cudart | None = None


def _candidates() -> Iterator[str]:
    """The loader's own search path, then CUDA packages of this Python, then the CUDA toolkit."""
    yield from _SONAMES
    package = importlib.util.find_spec("nvidia")
    folders = [
        folder
        for location in (package.submodule_search_locations or () if package else ())
        for folder in sorted(Path(location).glob("*/lib"), reverse=True)
    ]
    folders += [
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "lib64",
        Path("/usr/local/cuda/lib64"),
    ]
    for folder in folders:
        for soname in _SONAMES:
            if (folder / soname).exists():
                yield str(folder / soname)


def _version(number: int) -> str:
    """CUDA counts 13020 for 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"
