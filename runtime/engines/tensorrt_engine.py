"""Run a TensorRT plan on this machine's GPU: buffers, one stream, one execution context.

A plan is executable code. So before TensorRT sees a byte of it, its digest must be the one that
was recorded when it was built here, its header must fit, and CUDA must answer: some TensorRT
builds crash the process without a GPU. It does not build (tensorrt_build) nor cache.
"""

import contextlib
import ctypes
import hashlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.engines import cudart
from runtime.engines.engine import Engine, Outputs, UInt8
from runtime.engines.tensorrt_library import (
    Heard,
    TensorRT,
    listening,
    load_library,
    logger,
    plan_header,
)
from runtime.errors import EngineError


class TensorRTEngine(Engine):
    """A deserialized plan over the graph contract, with memory for its largest batch.

    ``sha256`` is the digest that was recorded when the plan was built. ``device`` is the ordinal
    of the CUDA device.

    Raises EngineError if the plan is another, damaged, or of another TensorRT; if there is no GPU
    or no TensorRT; and if TensorRT refuses it, with the logger's text.
    """

    def __init__(self, plan: bytes, *, sha256: str, form: str, device: int = 0) -> None:
        library = _admit(plan, sha256, device)
        self._resources = contextlib.ExitStack()
        try:
            self._heard = self._resources.enter_context(listening(library))
            self._cuda, self._device = cudart.load(), device
            self._cuda.set_device(device)
            self._runtime, self._engine, self._context = _deserialize(library, plan, self._heard)
            max_batch, *shape = _input_shape(library, self._engine)
            self._stream = self._cuda.stream()
            self._resources.callback(self._cuda.destroy_stream, self._stream)
            self._image = self._buffer("image", (max_batch, *shape), np.uint8)
            self._logits, self._features = (
                self._buffer(name, (max_batch, _width(library, self._engine, name)), np.float32)
                for name in ("logits", "features")
            )
        except BaseException:
            self._resources.close()
            raise
        super().__init__(
            name=library.flavour,
            version=library.version,
            provider="cuda",
            form=form,
            shape=(shape[0], shape[1], shape[2]),
            max_batch=max_batch,
        )
        self._batch = 0

    def _infer(self, images: UInt8) -> Outputs:
        count = len(images)
        cuda, stream = self._cuda, self._stream
        cuda.set_device(self._device)  # CUDA keeps it for each thread
        if count != self._batch:
            if not self._context.set_input_shape("image", images.shape):
                raise EngineError(f"{self}: batch of {count}: {self._heard.reason()}")
            self._batch = count
        self._image.host[:count] = images
        self._image.upload(cuda, count, stream)
        if not self._context.execute_async_v3(stream):
            raise EngineError(f"{self}: the run failed: {self._heard.reason()}")
        self._logits.download(cuda, count, stream)
        self._features.download(cuda, count, stream)
        cuda.synchronize(stream)
        return Outputs(self._logits.host[:count].copy(), self._features.host[:count].copy())

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> "_Buffer":
        """Memory for one tensor on both sides, bound to the context and freed by close."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = self._cuda.malloc(size)
        self._resources.callback(self._cuda.free, address)
        pinned = self._cuda.host_alloc(size)
        self._resources.callback(self._cuda.free_host, pinned)
        if not self._context.set_tensor_address(name, address):
            raise EngineError(f"tensor {name} cannot be bound: {self._heard.reason()}")
        memory = memoryview((ctypes.c_uint8 * size).from_address(pinned))
        host = np.frombuffer(memory, dtype).reshape(shape)
        return _Buffer(host, address, pinned, size // shape[0])

    def _close(self) -> None:
        # The context goes before its engine, that before the runtime, all before the memory.
        self._context = self._engine = self._runtime = None
        del self._image, self._logits, self._features  # views of memory that is freed now
        self._resources.close()


class _Buffer(NamedTuple):
    """One tensor's pinned host memory, seen as ``host``, and its GPU memory."""

    host: npt.NDArray[Any]
    address: int
    pinned: int
    row_bytes: int

    def upload(self, cuda: cudart.Cudart, rows: int, stream: int) -> None:
        cuda.copy_to_device(self.address, self.pinned, rows * self.row_bytes, stream)

    def download(self, cuda: cudart.Cudart, rows: int, stream: int) -> None:
        cuda.copy_to_host(self.pinned, self.address, rows * self.row_bytes, stream)


def _admit(plan: bytes, sha256: str, device: int) -> TensorRT:
    """The library that may run ``plan``; every check that needs no TensorRT, in this order."""
    digest = hashlib.sha256(plan).hexdigest()
    if digest != sha256:
        raise EngineError(
            f"plan: expected sha256 {sha256[:12]}…, got {digest[:12]}…: not the engine that was "
            "built here; build it again"
        )
    header = plan_header(plan)
    found = cudart.probe(device)
    if isinstance(found, str):
        raise EngineError(f"{header.flavour}: no GPU: {found}")
    library = load_library(header.flavour)
    if isinstance(library, str):
        raise EngineError(f"the plan needs {header.flavour}, which does not load: {library}")
    if library.version.split(".")[:3] != header.version.split(".")[:3]:
        raise EngineError(
            f"the plan was built by {header.flavour} {header.version}, this is "
            f"{library.version}; build it again"
        )
    return library


def _deserialize(library: TensorRT, plan: bytes, heard: Heard) -> tuple[Any, Any, Any]:
    try:
        runtime = library.module.Runtime(logger(library))
    except TypeError as error:  # the bindings' way to say that the library returned nothing
        raise EngineError(f"{library.flavour}: no runtime: {heard.reason()}") from error
    # TensorRT reports by None. engine_host_code_allowed stays off, as it is by default.
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"{library.flavour}: the plan was refused: {heard.reason()}")
    context = engine.create_execution_context()
    if context is None:
        raise EngineError(f"{library.flavour}: no execution context: {heard.reason()}")
    return runtime, engine, context


def _input_shape(library: TensorRT, engine: Any) -> tuple[int, int, int, int]:
    """Largest batch, height, width and channels, once the tensors are known to be ours."""
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    if names != {"image", "logits", "features"}:
        raise EngineError(
            f"plan: expected tensors image, logits and features, got {', '.join(sorted(names))}"
        )
    kind = engine.get_tensor_dtype("image")
    if kind != library.module.DataType.UINT8:
        raise EngineError(f"plan: expected image of uint8, got {kind}")
    _, _, largest = engine.get_tensor_profile_shape("image", 0)
    count, height, width, channels = largest
    return count, height, width, channels


def _width(library: TensorRT, engine: Any, name: str) -> int:
    """Columns of an output, float32 [N, columns]."""
    kind, shape = engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name))
    if kind != library.module.DataType.FLOAT or len(shape) != 2 or shape[1] < 1:
        raise EngineError(f"plan: expected {name} of float32 [N, columns], got {kind} {shape}")
    return int(shape[1])
