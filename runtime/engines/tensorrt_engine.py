"""Run a TensorRT plan on this machine's GPU: pinned buffers, one stream, CUDA graphs.

A plan is executable code. So before TensorRT sees a byte of it, its digest must be the one that
was recorded when it was built here, its header must fit, and CUDA must answer: some TensorRT
builds crash the process without a GPU. It does not build (tensorrt_build) nor cache.
"""

import contextlib
import ctypes
import hashlib
import logging
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.engines import cudart
from runtime.engines.engine import Engine, Float32, Outputs, Tensor, UInt8, input_shape
from runtime.engines.tensorrt_library import (
    Heard,
    TensorRT,
    listening,
    load_library,
    logger,
    plan_header,
)
from runtime.errors import EngineError

_log = logging.getLogger(__name__)

Memory = Literal["pinned", "mapped"]

MAX_GRAPHS = 4
"""Batch sizes that get a CUDA graph, the first that come twice; each costs an execution context."""

_GRAPH_TOLERANCE = 0.01
"""Of the largest value: the same kernels may add in another order, an empty graph leaves zeros."""


class TensorRTEngine(Engine):
    """A deserialized plan over the graph contract, with memory for its largest batch.

    ``sha256`` is the digest that was recorded when the plan was built. ``device`` is the ordinal
    of the CUDA device. Two settings change no answer; which is faster, only measuring tells:

    ``memory``: ``pinned`` copies each batch to the GPU and the answers back; with ``mapped`` the
    GPU reads and writes the host's memory in place, which may be faster where both share one
    (``cudart.Device.integrated``).

    ``graphs``: from the second call of a batch size on, all that is queued for it is launched as
    one CUDA graph. ``graph_refusal`` says why not, and is empty as long as nothing forbids it.

    Any thread may call, one at a time.

    Raises EngineError: refused artifact if the plan is another, damaged, or refused by TensorRT,
    with the logger's text; wrong version; no device; missing library; failed if memory is short
    or cannot be mapped.
    """

    def __init__(
        self,
        plan: bytes,
        *,
        sha256: str,
        form: str,
        device: int = 0,
        memory: Memory = "pinned",
        graphs: bool = True,
    ) -> None:
        library = _admit(plan, sha256, device, memory)
        self._trt, self._flavour = library.module, library.flavour
        self._cuda, self._device = cudart.load(), device
        self.memory: Memory = memory
        self._batches: dict[int, _Batch] = {}
        self._shaped = 0
        """The batch size that the context was last told."""
        self._resources = contextlib.ExitStack()
        try:
            self._heard = self._resources.enter_context(listening(library))
            self._cuda.set_device(device)
            self._runtime, self._engine = _deserialize(library, plan, self._heard)
            self.graph_refusal = _graph_refusal(library, self._engine, graphs)
            shape = _picture_shape(library, self._engine, form)
            _, _, largest = self._engine.get_tensor_profile_shape("image", 0)
            self._allocate(tuple(largest))
            self._context = self._new_context()
        except BaseException:
            self._resources.close()
            raise
        super().__init__(
            name=library.flavour,
            version=library.version,
            provider="cuda",
            form=form,
            shape=shape,
            max_batch=int(largest[0]),
        )

    def layer_information(self) -> str:
        """TensorRT's description of its kernels, JSON: see tensorrt_inspector.

        Raises EngineError if the engine is closed.
        """
        if self._closed:
            raise EngineError(f"{self}: closed; open it again")
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def _infer(self, images: UInt8) -> Outputs:
        batch = self._batches.get(len(images)) or self._add_batch(len(images))
        cuda, stream = self._cuda, self._stream
        cuda.set_device(self._device)  # CUDA keeps it for each thread
        batch.image[...] = images
        if batch.graph:
            cuda.launch(batch.graph, stream)
        else:
            self._start(batch)
        cuda.synchronize(stream)
        return Outputs(batch.logits.copy(), batch.features.copy())

    def _add_batch(self, count: int) -> "_Batch":
        views = (buffer.host[:count] for buffer in (self._image, self._logits, self._features))
        batch = self._batches[count] = _Batch(*views)
        return batch

    def _start(self, batch: "_Batch") -> None:
        """Queue a run, and make a CUDA graph of it if this batch size may have one."""
        if (
            batch.came_before
            and not self.graph_refusal
            and sum(bool(other.graph) for other in self._batches.values()) < MAX_GRAPHS
        ):
            self._capture(batch)
        batch.came_before = True
        if batch.graph:
            self._cuda.launch(batch.graph, self._stream)
            return
        if len(batch.image) != self._shaped:
            self._shape(self._context, batch)
            self._shaped = len(batch.image)
        self._queue(self._context, batch)

    def _capture(self, batch: "_Batch") -> None:
        """Give this batch size its CUDA graph, or remember for good why there are none.

        A graph has a context of its own: telling a context another shape spoils what was captured
        from it, and the first run after a new shape does work that must not be captured.
        (TensorRT developer guide, "CUDA Graphs".)
        """
        try:
            batch.context = self._new_context()
            self._shape(batch.context, batch)
            self._queue(batch.context, batch)
            self._cuda.synchronize(self._stream)
            graph = self._cuda.capture(self._stream, lambda: self._queue(batch.context, batch))
            self._resources.callback(self._cuda.destroy_graph, graph)
            self._try(graph, batch)
            batch.graph = graph
        except EngineError as error:
            batch.context = None
            self.graph_refusal = str(error)
            self._heard.errors.clear()
            _log.warning("%s: goes on without CUDA graphs: %s", self, error)

    def _try(self, graph: int, batch: "_Batch") -> None:
        """Raise EngineError unless the graph gives the answers that the buffers hold.

        A capture may succeed and be empty (reported in ultralytics/ultralytics#26223), so the
        answers are erased on both sides first.
        """
        expected = Outputs(batch.logits.copy(), batch.features.copy())
        for buffer in (self._logits, self._features):
            buffer.host[...] = 0
            if self.memory == "pinned":
                buffer.upload(self._cuda, len(buffer.host), self._stream)
        self._cuda.launch(graph, self._stream)
        self._cuda.synchronize(self._stream)
        for values, got in zip(expected, (batch.logits, batch.features), strict=True):
            largest = np.max(np.abs(values), initial=0, where=np.isfinite(values))
            if not np.allclose(
                values, got, rtol=0, atol=_GRAPH_TOLERANCE * largest, equal_nan=True
            ):
                raise EngineError(f"{self}: a graph answers otherwise than what it was made from")

    def _shape(self, context: Any, batch: "_Batch") -> None:
        if not context.set_input_shape("image", batch.image.shape):
            raise EngineError(f"{self}: batch of {len(batch.image)}: {self._heard.reason()}")

    def _queue(self, context: Any, batch: "_Batch") -> None:
        """Queue copies and kernels; nothing here may wait, it is captured too."""
        count, stream = len(batch.image), self._stream
        if self.memory == "pinned":
            self._image.upload(self._cuda, count, stream)
        if not context.execute_async_v3(stream):
            raise EngineError(f"{self}: the run failed: {self._heard.reason()}")
        if self.memory == "pinned":
            self._logits.download(self._cuda, count, stream)
            self._features.download(self._cuda, count, stream)

    def _allocate(self, largest: tuple[int, ...]) -> None:
        """A stream and all memory for images of the shape ``largest``, until close."""
        self._stream = self._cuda.stream()
        self._resources.callback(self._cuda.destroy_stream, self._stream)
        self._image = self._buffer("image", largest, np.uint8)
        self._logits, self._features = (
            self._buffer(name, (largest[0], self._engine.get_tensor_shape(name)[1]), np.float32)
            for name in Outputs._fields
        )
        self._scratch: tuple[int, int] | None = None
        """Address and size of what all contexts compute in; None if each has its own."""
        if not self.graph_refusal:
            size = self._engine.device_memory_size_v2
            self._scratch = self._cuda.malloc(max(size, 1)), size
            self._resources.callback(self._cuda.free, self._scratch[0])
        self._resources.callback(self._release)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> "_Buffer":
        """Memory for one tensor: one piece that both sides see, or two."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        mapped = self.memory == "mapped"
        pinned = self._cuda.host_alloc(size, mapped=mapped)
        self._resources.callback(self._cuda.free_host, pinned)
        if mapped:
            address = self._cuda.device_pointer(pinned)
        else:
            address = self._cuda.malloc(size)
            self._resources.callback(self._cuda.free, address)
        memory = memoryview((ctypes.c_uint8 * size).from_address(pinned))
        host = np.frombuffer(memory, dtype).reshape(shape)
        return _Buffer(name, host, address, pinned, size // shape[0])

    def _new_context(self) -> Any:
        if self._scratch is None:
            context = self._engine.create_execution_context()
        else:
            strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise EngineError(f"{self._flavour}: no execution context: {self._heard.reason()}")
        if self._scratch is not None:
            context.set_device_memory(*self._scratch)
        for buffer in (self._image, self._logits, self._features):
            if not context.set_tensor_address(buffer.name, buffer.address):
                raise EngineError(
                    f"{self._flavour}: tensor {buffer.name} cannot be bound: {self._heard.reason()}"
                )
        return context

    def _release(self) -> None:
        """Contexts go before their engine, that before the runtime, all before the memory."""
        self._batches.clear()
        self._context = self._engine = self._runtime = None
        del self._image, self._logits, self._features  # views of memory that is freed next

    def _close(self) -> None:
        self._cuda.set_device(self._device)
        self._resources.close()


class _Batch:
    """What one batch size needs at each call: views of the buffers, and its CUDA graph if any."""

    __slots__ = ("came_before", "context", "features", "graph", "image", "logits")

    def __init__(self, image: UInt8, logits: Float32, features: Float32) -> None:
        self.image, self.logits, self.features = image, logits, features
        self.came_before = False
        self.graph = 0
        self.context: Any = None


class _Buffer(NamedTuple):
    """One tensor's pinned host memory, seen as ``host``, and the GPU's address of it."""

    name: str
    host: npt.NDArray[Any]
    address: int
    pinned: int
    row_bytes: int

    def upload(self, cuda: cudart.Cudart, rows: int, stream: int) -> None:
        cuda.copy_to_device(self.address, self.pinned, rows * self.row_bytes, stream)

    def download(self, cuda: cudart.Cudart, rows: int, stream: int) -> None:
        cuda.copy_to_host(self.pinned, self.address, rows * self.row_bytes, stream)


def _admit(plan: bytes, sha256: str, device: int, memory: Memory) -> TensorRT:
    """The library that may run ``plan``; every check that needs no TensorRT, in this order."""
    digest = hashlib.sha256(plan).hexdigest()
    if digest != sha256:
        raise EngineError(
            f"plan: expected sha256 {sha256[:12]}…, got {digest[:12]}…: not the engine that was "
            "built here; build it again",
            "refused artifact",
        )
    header = plan_header(plan)
    try:
        cudart.require(device)
    except EngineError as error:
        raise EngineError(f"{header.flavour}: no GPU: {error}", error.fault) from error
    if memory == "mapped" and not cudart.load().can_map_host_memory(device):
        raise EngineError(
            f"{header.flavour}: CUDA device {device} cannot map the host's memory; use "
            'memory="pinned"'
        )
    library = load_library(header.flavour)
    if isinstance(library, str):
        raise EngineError(
            f"the plan needs {header.flavour}, which does not load: {library}", "missing library"
        )
    # Some bindings do not tell the fourth number.
    known = library.version.split(".")[:4]
    if header.version.split(".")[: len(known)] != known:
        raise EngineError(
            f"the plan was built by {header.flavour} {header.version}, this is "
            f"{library.version}; build it again",
            "wrong version",
        )
    return library


def _graph_refusal(library: TensorRT, engine: Any, wanted: bool) -> str:
    """Why runs of this engine are not captured; empty if nothing is known to forbid it."""
    if not wanted:
        return "not asked for"
    if library.flavour == "tensorrt-rtx":
        return (
            "tensorrt-rtx replaces its first kernels by ones for the shape while it runs; a graph "
            "would keep the first ones"
        )
    if not hasattr(engine, "device_memory_size_v2"):
        return f"{library.flavour} {library.version} cannot share memory between contexts"
    return ""


def _deserialize(library: TensorRT, plan: bytes, heard: Heard) -> tuple[Any, Any]:
    try:
        runtime = library.module.Runtime(logger(library))
    except TypeError as error:  # the bindings' way to say that the library returned nothing
        raise EngineError(f"{library.flavour}: no runtime: {heard.reason()}") from error
    # TensorRT reports by None. engine_host_code_allowed stays off, as it is by default.
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(
            f"{library.flavour}: the plan was refused: {heard.reason()}", "refused artifact"
        )
    return runtime, engine


def _picture_shape(library: TensorRT, engine: Any, form: str) -> tuple[int, int, int]:
    """Height, width and channels, once the tensors are known to be those of the graph contract."""
    trt = library.module
    dtypes = {trt.DataType.UINT8: "uint8", trt.DataType.FLOAT: "float32"}
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = engine.get_tensor_dtype(name)
        sides = [None if side < 0 else int(side) for side in engine.get_tensor_shape(name)]
        of_its_kind = inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs
        of_its_kind.append((name, dtypes.get(kind, str(kind)), sides))
    return input_shape(form, inputs, outputs)
